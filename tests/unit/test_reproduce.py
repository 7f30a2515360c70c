"""`saescope reproduce`: trials that are kept, claims beside their nulls, pages."""

import base64
import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import sae.papers
from dashboards.reproduce_command import (
    ReproduceConfig,
    read_results,
    reproduce,
    write_page,
    write_verdicts,
)
from sae.reproduction.claims import claim, column
from sae.reproduction.paper import Findings, Paper, Picture
from sae.reproduction.trials import TRIALS, flat, run_trials
from saescope.errors import ArtefactError, InputError
from saescope.pieces import Chart, Series, Table

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "papers"
PNG = base64.b64encode(b"\x89PNG of a coin").decode()


def fake(*, ends_at: int | None = None, measured: list[int] | None = None) -> Paper:
    """A paper that claims that a coin with more weight falls further."""

    def measure(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        if settings["seed"] == ends_at:
            raise KeyboardInterrupt
        if measured is not None:
            measured.append(settings["seed"])
        return {"fell": settings["seed"] + 2.0 * settings["weight"]}

    def findings(rows: Any) -> Findings:
        heavy, light = (column(rows, "fell", weight=weight) for weight in (1, 0))
        series = Series(name="a < b", x=(0.0, 1.0), y=(0.5, None))
        return Findings(
            claims=(claim("heavy | far", heavy, light), claim("heavy, near", light, heavy)),
            why="It fell.",
            tables=(Table(title="T", columns=("a", "b"), rows=(("x", "1"),)),),
            charts=(Chart(key="one", title="One & only", x="x", y="y", series=(series, series)),),
            pictures=(Picture(key="two", title="A coin", about="Seen.", png=PNG),),
        )

    return Paper(
        title="On coins", citation="Nobody, 2020", claim="Heavier is further.", run=("A coin.",),
        easier="Easier.", measure=measure, findings=findings,
        trials=lambda quick: [
            {"seed": seed, "weight": weight} for seed in range(2 if quick else 3)
            for weight in (0, 1)
        ],
    )  # fmt: skip


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_trials("coins", fake(ends_at=1), tmp_path, quick=False)
    assert len((tmp_path / TRIALS).read_text().splitlines()) == 2
    again: list[int] = []
    rows = run_trials("coins", fake(measured=again), tmp_path, quick=False)
    assert again == [1, 1, 2, 2]
    assert [row["fell"] for row in flat(rows)] == [0, 2, 1, 3, 2, 4]
    more: list[int] = []
    assert run_trials("coins", fake(measured=more), tmp_path, quick=False) == rows
    assert more == []


def test_damaged_trials_are_named(tmp_path: Path) -> None:
    run_trials("coins", fake(), tmp_path, quick=True)
    path = tmp_path / TRIALS
    whole = path.read_text()
    path.write_text(whole + '{"settings"')
    with pytest.raises(ArtefactError, match="remove that line"):
        run_trials("coins", fake(), tmp_path, quick=True)
    path.write_text("[]\n" + whole)
    with pytest.raises(ArtefactError, match="line 1"):
        run_trials("coins", fake(), tmp_path, quick=True)


def test_a_claim_holds_by_its_paired_interval() -> None:
    found = claim("c", [1.0, 2.0, 4.0], [0.0, 1.0, 2.0])
    mean, deviation = 4 / 3, math.sqrt(1 / 3)
    assert found.gain == pytest.approx(mean)
    assert found.half == pytest.approx(4.302652729911275 * deviation / math.sqrt(3))
    assert not found.holds, "1.33 ± 1.43"
    assert claim("c", [1.0, 2.0, 3.1], [0.0, 1.0, 2.0]).holds
    assert not claim("c", [0.0, 1.0, 2.0], [1.0, 2.0, 3.1]).holds
    assert claim("c", [0.0, 1.0, 2.0], [1.0, 2.0, 3.1], lower=True).holds
    assert not claim("c", [5.0], [1.0]).holds, "of one pair nothing can be said"
    with pytest.raises(ValueError, match="same seed"):
        column([{"seed": 0, "a": 1}, {"seed": 0, "a": 2}], "a")


def test_the_page_says_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sae.papers, "paper", lambda name: fake())
    monkeypatch.setattr(sae.papers, "names", lambda: ["coins"])
    reproduce(ReproduceConfig(papers=("coins",), quick=True, out=str(tmp_path / "work")))
    text = (tmp_path / "work" / "coins.md").read_text()
    assert "**Partly reproduced.** It fell." in text
    assert r"| heavy \| far | 2.500 | 0.500 | 2.000 ± 0.000 | 2 seeds | yes |" in text
    assert "| -2.000 ± 0.000 | 2 seeds | no |" in text
    assert "saescope reproduce coins --quick" in text
    assert "![One & only](coins-one.svg)" in text
    drawn = ElementTree.parse(tmp_path / "work" / "coins-one.svg").getroot()
    assert "a < b" in "".join(drawn.itertext())
    assert "### A coin\n\n![A coin](coins-two.png)\n\nSeen.\n" in text
    assert (tmp_path / "work" / "coins-two.png").read_bytes() == b"\x89PNG of a coin"
    assert "[coins](coins.md)" in (tmp_path / "work" / "README.md").read_text()
    quick, trials = read_results(tmp_path / "work" / "coins.trials.jsonl")
    assert quick
    assert len(trials) == 4
    reproduce(ReproduceConfig(papers=("coins",), quick=True, out=str(tmp_path / "work")))
    assert (tmp_path / "work" / "coins.md").read_text() == text, "what is there is replaced"


def test_what_others_wrote_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sae.papers, "names", list)
    (tmp_path / "README.md").write_text("my own\n")
    with pytest.raises(InputError, match=r"README\.md"):
        write_verdicts(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own\n"


def test_wrong_input() -> None:
    with pytest.raises(InputError, match=r"hiding-data"):
        reproduce(ReproduceConfig(papers=("hiding-dta",)))
    with pytest.raises(InputError, match="all papers"):
        ReproduceConfig(papers=("mdl",), all=True)


@pytest.mark.parametrize("path", sorted(PAGES.glob("*.trials.jsonl")), ids=lambda path: path.name)
def test_committed_pages_are_what_their_trials_give(path: Path, tmp_path: Path) -> None:
    name = path.name.removesuffix(".trials.jsonl")
    quick, trials = read_results(path)
    assert not quick
    wanted = [dict(each) for each in sae.papers.paper(name).trials(False)]
    assert [each["settings"] for each in trials] == wanted
    write_page(name, trials, tmp_path, quick=quick)
    for written in tmp_path.iterdir():
        assert (PAGES / written.name).read_bytes() == written.read_bytes(), written.name


def test_the_committed_table_has_all_committed_papers(tmp_path: Path) -> None:
    for path in PAGES.glob("*.trials.jsonl"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_verdicts(tmp_path)
    assert (PAGES / "README.md").read_text() == (tmp_path / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", sae.papers.names())
def test_quick_trials_have_the_direction_that_is_published(name: str, tmp_path: Path) -> None:
    """Each claim that the committed page has as holding goes the same way, as surely, in few."""
    paper = sae.papers.paper(name)
    whole = paper.findings(flat(read_results(PAGES / f"{name}.trials.jsonl")[1]))
    held = {each.says for each in whole.claims if each.holds}
    rows = run_trials(name, paper, tmp_path / name, quick=True)
    json.dumps(rows)
    found = {each.says: each for each in paper.findings(flat(rows)).claims}
    assert held & set(found), "the quick trials show something of what holds"
    assert [says for says in held & set(found) if not found[says].holds] == []
