"""`saescope eval --suite scr,tpp`: what is written, the same every time."""

import csv
import json
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import sae
from sae.evaluation import scr as scr_family
from sae.evaluation import tpp as tpp_family
from sae.evaluation.on_texts import OnTexts
from sae.evaluation.written import read_evaluation
from sae.probing.text_rows import TextModel
from saescope.__main__ import main
from saescope.errors import InputError
from tests.artefacts import train_config
from tests.tiny import make_tiny_harvest, make_tiny_model

WORDS = ("river", "bridge", "library", "winter", "harbour", "bread")
KINDS = ("doors", "mill", "garden")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/a on a tiny harvest; ends.csv and begins.csv of the same texts; a file a kind."""
    root = tmp_path_factory.mktemp("removal")
    harvest = make_tiny_harvest(root, make_tiny_model(root / "model"), documents=30)
    sae.train(train_config(harvest, root / "runs" / "a"))
    draw = np.random.default_rng(0)
    ends, begins, kinds = [], [], []
    for number in range(120):
        middle = " ".join(draw.choice(WORDS, 2))
        end, begin = number % 2, number // 2 % 2
        text = f"{'bread' if begin else 'winter'} {number} {middle} {'doors' if end else 'mill'}"
        ends.append((text, end))
        begins.append((text, begin))
        kinds.append((f"{middle} {number} {KINDS[number % 3]}", KINDS[number % 3]))
    _write(root / "ends.csv", ends)
    _write(root / "begins.csv", begins)
    for kind in KINDS:
        _write(root / f"kind-{kind}.csv", [(text, int(own == kind)) for text, own in kinds])
    return root


def _write(path: Path, rows: list[tuple[str, int]]) -> None:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("prompt", "target"), *rows])


def words(root: Path, folder: Path, *more: str) -> list[str]:
    return [
        *("eval", str(root / "runs" / "a"), "--suite", "scr,tpp", "--out", str(folder / "e.json")),
        *("--replace", "--probing.cache", str(folder / "texts")),
        *("--scr.pairs", f"{root / 'ends.csv'}::{root / 'begins.csv'}", "--scr.ns", "2", "5"),
        *("--tpp.groups", str(root / "kind-*.csv"), "--tpp.ns", "5"),
        *(more or ("--scr.seeds", "2", "--tpp.seeds", "2")),
    ]


FILES = ("e.json", "e.scr.json", "e.tpp.json")


def test_both_are_measured_and_written(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(root, tmp_path)) == 0
    evaluation = read_evaluation(tmp_path / "e.json")
    told = evaluation["protocol"]["scr"]
    assert [origin["source"] for each in told["sets"].values() for origin in each] == [
        "ends.csv",
        "begins.csv",
    ]
    assert told["error"] == "kept"
    assert (evaluation["scr"]["crossings"], evaluation["tpp"]["groups"]) == (1, 1)
    for name in ("scr", "tpp"):
        table = json.loads((tmp_path / f"e.{name}.json").read_text())
        assert table["protocol_hash"] == evaluation["protocol_hash"]
        assert {row["method"] for row in table["results"]} == set(table["methods"])
        assert {row["seed"] for row in table["results"]} == {0, 1}
        own = [r for r in table["scores"] if (r["method"], r["n"]) == ("sae", 5)]
        assert own[0][name] == evaluation[name][f"{name}_n5"]
    shown = capsys.readouterr().out
    assert "SCR               n=2      n=5" in shown
    assert "on 1 pairs of attributes of texts" in shown
    assert "untrained" in shown


def test_a_second_run_and_one_that_was_killed_have_the_same_bytes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    assert main(words(root, tmp_path / "whole")) == 0
    measured: list[str] = []
    of_pair, of_group = scr_family.scr_rows, tpp_family.tpp_rows

    def counts(pair: Any, *more: Any) -> Any:
        measured.append(pair.name)
        return of_pair(pair, *more)

    def dies(*_: Any) -> Any:
        raise InputError("killed here", where="test")

    monkeypatch.setattr(scr_family, "scr_rows", counts)
    monkeypatch.setattr(scr_family, "remove", lambda _: None)
    monkeypatch.setattr(tpp_family, "tpp_rows", dies)
    assert main(words(root, tmp_path / "killed")) == 2
    monkeypatch.setattr(tpp_family, "tpp_rows", of_group)
    assert main(words(root, tmp_path / "killed")) == 0
    assert measured == ["ends.csv::begins.csv"]  # not measured again
    for name in FILES:
        one, other = (tmp_path / folder / name for folder in ("whole", "killed"))
        assert one.read_bytes() == other.read_bytes(), name


def test_the_size_of_runs_of_the_model_changes_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for tokens in (64, 4096):
        folder = tmp_path / str(tokens)
        folder.mkdir()
        rows = TextModel.rows
        monkeypatch.setattr(TextModel, "rows", partialmethod(rows, tokens_a_run=tokens))
        assert main(words(root, folder, "--scr.seeds", "1", "--tpp.seeds", "1")) == 0
        monkeypatch.setattr(TextModel, "rows", rows)
        evaluation = read_evaluation(folder / "e.json")
        found.append({**evaluation["scr"], **evaluation["tpp"]})
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, abs=1e-5), name


def test_wrong_sets_and_saes_are_named(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words(root, tmp_path)
    several = given.index("--scr.pairs") + 1
    given[several] = f"{root / 'kind-*.csv'}::{root / 'begins.csv'}"
    assert main(given) == 2
    assert "scr.pairs: stands for several sets" in capsys.readouterr().err
    transcoder = SimpleNamespace(sae=SimpleNamespace(transcodes=True))
    with pytest.raises(InputError, match="scr is of SAEs that reconstruct"):
        OnTexts.reconstructing(transcoder, "scr")  # type: ignore[arg-type]
