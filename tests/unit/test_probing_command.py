"""`saescope eval --suite probing`: what is written, which only its settings change."""

import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from pyarrow import parquet

import sae
from sae.commands import evaluate_runs as several
from sae.evaluation import OwnTexts, metric_family
from sae.evaluation.on_texts import OnTexts
from sae.evaluation.probing import summary
from sae.evaluation.written import read_evaluation
from sae.probing import suite
from sae.probing.tables import by_set, lines, over_sets
from saescope.__main__ import main
from saescope.artefact import write_json
from saescope.config import Config
from saescope.errors import InputError
from saescope.metrics import Metric
from tests.artefacts import train_config
from tests.tiny import make_tiny_harvest, make_tiny_model

WORDS = ("river", "bridge", "library", "winter", "harbour", "bread")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/a on a tiny harvest; first.csv and second.csv, labelled by how the texts end."""
    root = tmp_path_factory.mktemp("probing")
    harvest = make_tiny_harvest(root, make_tiny_model(root / "model"), documents=30)
    sae.train(train_config(harvest, root / "runs" / "a"))
    for name, seed in (("first", 0), ("second", 1)):
        draw = np.random.default_rng(seed)
        with (root / f"{name}.csv").open("w", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(("prompt", "target"))
            for number in range(90):
                words = " ".join(draw.choice(WORDS, 3))
                yes = bool(draw.random() < 0.5)
                rows.writerow((f"{number} {words} {'doors' if yes else 'mill'}", int(yes)))
    return root


def words(root: Path, out: Path, *sets: str) -> list[str]:
    """A command line of a few seeds and k."""
    named = [str(root / f"{name}.csv") for name in sets or ("first", "second")]
    return [
        *("eval", str(root / "runs" / "a"), "--suite", "core,probing", "--tokens", "0"),
        *("--out", str(out), "--replace", "--probing.sets", *named),
        *("--probing.ks", "1", "2", "--probing.seeds", "2", "--probing.scarce", "8"),
        *("--probing.cache", str(out.parent / "texts")),
    ]


def results(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """The evaluation, the table of means, and all rows."""
    evaluation = read_evaluation(folder / "e.json")
    means = json.loads((folder / "e.probing.json").read_text())
    return evaluation, means, parquet.read_table(folder / "e.probing.parquet").to_pylist()


def test_core_and_probing_are_measured_and_written(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(root, tmp_path / "e.json")) == 0
    evaluation, means, rows = results(tmp_path)
    assert evaluation["reconstruction"]["fvu"] > 0
    assert evaluation["probing"]["sets"] == 2
    assert evaluation["protocol_hash"] == means["protocol_hash"]
    metadata = parquet.read_schema(tmp_path / "e.probing.parquet").metadata
    assert metadata[b"protocol_hash"].decode() == evaluation["protocol_hash"]
    told = evaluation["protocol"]["probing"]
    assert told["sets"]["first.csv"][0]["source"] == "first.csv"
    assert len(told["sets"]["first.csv"][0]["sha256"]) == 64
    assert (told["rows"]["representation"], told["ks"]) == ("last", [1, 2])
    assert {row["setting"] for row in rows} == {"normal", "scarce-8", "imbalanced"}
    assert {row["method"] for row in rows} == set(means["methods"])
    own = [
        row["auc"]
        for row in rows
        if (row["method"], row["k"], row["setting"]) == ("sae", 1, "normal")
    ]
    assert len(own) == 4
    assert evaluation["probing"]["probing_auc_k1"] == pytest.approx(np.mean(own), abs=1e-12)
    # the texts end in one of two words: the last activation tells which
    assert evaluation["probing"]["probing_auc_raw"] == 1.0
    shown = capsys.readouterr().out
    assert "on 2 sets of labelled texts" in shown
    assert "probe AUC, k=1" in shown


def test_only_the_suites_chosen_are_measured(root: Path, tmp_path: Path) -> None:
    given = [w for w in words(root, tmp_path / "e.json", "first") if w != "core,probing"]
    given.insert(given.index("--suite") + 1, "probing")
    assert main(given) == 0
    evaluation = results(tmp_path)[0]
    assert evaluation["reconstruction"] is None
    assert evaluation["probing"]["sets"] == 1
    core = sae.evaluate(
        sae.EvaluateConfig(run=str(root / "runs" / "a"), tokens=0, out=str(tmp_path / "c.json"))
    )
    assert core["probing"] is None


def test_an_unknown_suite_is_named_with_those_there_are(root: Path) -> None:
    with pytest.raises(InputError, match=r"suite: no such suite.*'beauty'.*core, .*probing"):
        sae.evaluate(
            sae.EvaluateConfig(run=str(root / "runs" / "a"), suite=("core,beauty",), tokens=0)
        )


def test_a_second_run_has_the_same_bits_and_a_killed_one_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    assert main(words(root, tmp_path / "whole" / "e.json")) == 0
    of_set = suite.probe_set
    probed: list[str] = []

    def dies_at_the_second(data: Any, *more: Any) -> Any:
        if probed:
            raise KeyboardInterrupt
        probed.append(data.name)
        return of_set(data, *more)

    monkeypatch.setattr(suite, "probe_set", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        main_without_catching(words(root, tmp_path / "killed" / "e.json"))
    assert not (tmp_path / "killed" / "e.json").exists()

    def counts(data: Any, *more: Any) -> Any:
        probed.append(data.name)
        return of_set(data, *more)

    monkeypatch.setattr(suite, "probe_set", counts)
    assert main(words(root, tmp_path / "killed" / "e.json")) == 0
    assert probed == ["first.csv", "second.csv"]  # the first was not probed again
    for name in ("e.json", "e.probing.json", "e.probing.parquet"):
        one, other = (tmp_path / folder / name for folder in ("whole", "killed"))
        assert one.read_bytes() == other.read_bytes(), name
    assert not list((tmp_path / "killed" / "texts").glob("results-*"))


def main_without_catching(given: list[str]) -> None:
    from saescope.config import parse

    config = parse(
        several.EvaluateRunsConfig, given[1:], program="x", description="x", positional="run"
    )
    several.evaluate_runs(config)


def test_a_run_measured_under_this_protocol_is_left_until_its_texts_change(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of several runs those that are measured already are left as they are."""
    texts = tmp_path / "mine.csv"
    texts.write_bytes((root / "first.csv").read_bytes())
    from sae.probing.config import ProbingConfig

    config = several.EvaluateRunsConfig(
        run=str(root / "runs" / "a"),
        runs=(str(root / "runs" / "b"),),
        suite=("probing",),
        probing=ProbingConfig(sets=(str(texts),), ks=(1,), seeds=1, cache=str(tmp_path / "texts")),
        replace=True,
    )
    told = []
    for change in (b"", b"", b"one more river,1\n"):
        texts.write_bytes(texts.read_bytes() + change)
        several.evaluate_runs(config)
        told.append(capsys.readouterr().out)
    assert ["measured already" in each for each in told] == [False, True, False]


# ---- a family of texts in one place ------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GreetingConfig(Config):
    """Settings of a family that nobody else knows."""

    text: str = "the river in winter"

    def quick(self) -> Self:
        return replace(self, text="river")


def greeting(given: OnTexts[GreetingConfig]) -> dict[str, Any]:
    rows = given.row_cache("mean", 16).rows("greeting", [given.settings.text])
    given.tables["greeting"] = [{"said": given.settings.text}]
    return {"greetings": 1, "greeting_norm": float(given.seen(rows.x.float()).norm())}


@pytest.fixture
def _greeting(own_metrics: None) -> None:
    row = Metric(name="greeting_norm", label="greeting", better="neither", help="A norm.")
    metric_family(
        "greeting",
        needs="texts",
        metrics=[row],
        suite="greetings",
        texts=OwnTexts(
            settings=GreetingConfig,
            facts=lambda config, model, site: {"text": config.text, "site": site},
            counted=("greetings", "greetings in all"),
            unit="greetings",
            write=lambda path, rows, digest: write_json(
                path.with_name("greeting.json"), {"rows": rows, "protocol_hash": digest}
            ),
            lines=lambda rows: [f"  said {row['said']!r}" for row in rows],
        ),
    )(greeting)


@pytest.mark.usefixtures("_greeting")
def test_a_family_of_texts_brings_all_that_the_command_needs(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        *("eval", str(root / "runs" / "a"), "--suite", "greetings", "--replace"),
        *("--out", str(tmp_path / "e.json"), "--probing.cache", str(tmp_path / "texts")),
    ]
    said, hashes = [], set()
    for quick in ((), ("--quick",)):
        assert main([*given, *quick]) == 0
        evaluation = read_evaluation(tmp_path / "e.json")
        table = json.loads((tmp_path / "greeting.json").read_text())
        said.append(evaluation["protocol"]["greeting"]["text"])
        assert table["rows"] == [{"said": said[-1]}]
        assert table["protocol_hash"] == evaluation["protocol_hash"]
        assert evaluation["greeting"]["greeting_norm"] > 0
        hashes.add(table["protocol_hash"])
        shown = capsys.readouterr().out
        assert "on 1 greetings in all" in shown
        assert "greetings as the unit" in shown
        assert f"said {said[-1]!r}" in shown
    assert said == ["the river in winter", "river"]
    assert len(hashes) == 2


def test_a_family_of_texts_says_what_it_needs() -> None:
    with pytest.raises(TypeError, match="'deaf': texts= goes with needs='texts'"):
        metric_family("deaf", needs="texts", metrics=())(greeting)


# ---- tables --------------------------------------------------------------------------------------


def row(name: str, method: str, k: int, seed: int, auc: float, setting: str = "normal") -> dict:
    return {
        "set": name,
        "setting": setting,
        "method": method,
        "k": k,
        "seed": seed,
        "auc": auc,
        "accuracy": auc - 0.1,
        "majority": 0.5,
        "train": 10,
        "test": 4,
    }


ROWS = [
    row("a", "sae", 1, 0, 0.8),
    row("a", "sae", 1, 1, 1.0),
    row("b", "sae", 1, 0, 0.6),
    row("b", "sae", 1, 1, 0.6),
    row("a", "untrained", 1, 0, 0.5),
    row("b", "untrained", 1, 0, 0.6),
    row("a", "raw", 32, 0, 1.0),
    row("b", "raw", 32, 0, 0.8),
    row("a", "sae", 1, 0, 0.1, setting="ood"),
]


def test_means_and_intervals_by_hand() -> None:
    """t(0.975, 1) = 12.706; of a: mean 0.9, half 12.706 * sqrt(0.02 / 2)."""
    sets = by_set(ROWS)
    assert sets[0]["auc"] == pytest.approx(0.9)
    assert sets[0]["auc_interval"] == pytest.approx(12.7062047 * 0.1)
    assert sets[1]["auc_interval"] == 0.0
    own = over_sets(sets)[0]
    assert (own["method"], own["sets"]) == ("sae", 2)
    assert own["auc"] == pytest.approx(0.75)
    assert own["auc_interval"] == pytest.approx(12.7062047 * 0.15)
    assert own["above_untrained"] == pytest.approx((0.4 + 0.0) / 2)
    found = summary(ROWS)
    assert found["probing_auc_k1"] == pytest.approx(0.75)
    assert found["probing_above_untrained_k1"] == pytest.approx(0.2)
    assert found["probing_auc_raw"] == pytest.approx(0.9)


def test_the_lines_show_methods_by_k() -> None:
    shown = lines(ROWS)
    assert shown[0].split() == ["AUC", "k=1", "all"]
    assert [line.split() for line in shown[1:3]] == [["sae", "0.7500"], ["untrained", "0.5500"]]
    assert shown[-1].split() == ["raw", "0.9000"]
