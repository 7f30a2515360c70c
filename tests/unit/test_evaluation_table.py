"""evaluation.parquet: the metrics of evaluation.json as rows, sealed, and known to the doctor."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import sae
from sae.data.provenance import weights_hash
from sae.evaluation.metric_table import read_metric_table
from sae.evaluation.written import read_evaluation
from saescope.__main__ import main
from saescope.artefact import DamagedError
from saescope.errors import InputError
from tests.artefacts import flip, train_config
from tests.sealing import change_sealed
from tests.tiny import make_tiny_harvest, make_tiny_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/a and runs/b, both evaluated."""
    root = tmp_path_factory.mktemp("table")
    harvest = make_tiny_harvest(root, make_tiny_model(root / "model"), documents=30)
    sae.train(train_config(harvest, root / "runs" / "a"))
    shutil.copytree(root / "runs" / "a", root / "runs" / "b")
    for name in "ab":
        sae.evaluate(sae.EvaluateConfig(run=str(root / "runs" / name), tokens=64))
    return root


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "runs" / "a", tmp_path / "a"))


def doctor(run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    return main(["doctor", str(run)]), capsys.readouterr().out


def test_metrics_of_many_runs_are_one_table(made: Path) -> None:
    table = pd.concat(map(pd.read_parquet, sorted(made.rglob("evaluation.parquet"))))
    assert sorted(table["run"].unique()) == [str(made / "runs" / name) for name in "ab"]
    written = read_evaluation(made / "runs" / "a" / "evaluation.json")
    rows = table[table["run"] == str(made / "runs" / "a")].set_index("name")
    assert rows["value"]["fvu"] == written["reconstruction"]["fvu"]
    assert rows["interval"]["fvu"] == written["reconstruction"]["fvu_interval"]
    assert rows["value"]["delta_ce"] == written["downstream"]["delta_ce"]
    assert rows["value"]["fvu_early"] == written["row_groups"]["fvu_early"]
    assert set(rows["protocol_hash"]) == {written["protocol_hash"]}
    assert set(rows["sae_hash"]) == {weights_hash(sae.load(made / "runs" / "a"))}
    about = ("architecture", "d_in", "d_sae", "suite")
    assert [set(rows[name]) for name in about] == [{"topk"}, {32}, {48}, {"core"}]
    of_fvu = rows.loc["fvu", ["family", "section", "label", "unit", "better"]]
    assert of_fvu.tolist() == ["reconstruction", "reconstruction", "FVU", "", "lower"]
    assert rows["site"].isna().tolist() == [True] * len(rows), "one site"
    numbers = {
        name: float("nan") if value is None else value
        for section in written.values()
        if isinstance(section, dict)
        for name, value in section.items()
        if name in rows.index
    }
    assert rows["value"].to_dict() == pytest.approx(numbers, abs=0, nan_ok=True), "each metric once"
    assert {"l0", "kl", "fvu_document_p90", "dead_fraction"} <= numbers.keys()


def test_what_is_measured_already_gets_the_table_it_lacks(made: Path, tmp_path: Path) -> None:
    runs = [Path(shutil.copytree(made / "runs" / name, tmp_path / name)) for name in "ab"]
    before = [(run / "evaluation.parquet").read_bytes() for run in runs]
    (runs[0] / "evaluation.parquet").unlink()
    assert main(["eval", *map(str, runs), "--tokens", "64"]) == 0
    written = [pd.read_parquet(run / "evaluation.parquet") for run in runs]
    assert [str(run) for run in runs] == [table["run"][0] for table in written]
    assert before != [(run / "evaluation.parquet").read_bytes() for run in runs], "other names"


def test_the_table_is_bit_for_bit_the_same_again(run: Path, tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        out = tmp_path / f"{name}.json"
        sae.evaluate(sae.EvaluateConfig(run=str(run), tokens=64, out=str(out)))
        found.append((out.read_bytes(), out.with_suffix(".parquet").read_bytes()))
    assert found[0] == found[1]


def test_something_else_in_its_place_is_said_before_measuring(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "evaluation.parquet").write_text("mine")

    def measure(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("sae.commands.evaluate.HeldOut.measure", measure)
    with pytest.raises(InputError, match=r"evaluation\.parquet: holds something else than a table"):
        sae.evaluate(sae.EvaluateConfig(run=str(run), tokens=0))
    assert (run / "evaluation.parquet").read_text() == "mine"


def test_the_doctor_finds_damage_to_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(run, capsys)[0] == 0
    path = run / "evaluation.parquet"
    before, chance = path.read_bytes(), random.Random(0)
    written = read_evaluation(run / "evaluation.json")
    rows = read_metric_table(run / "evaluation.json", written)
    broken = b""
    for _ in range(200):
        flip(path, chance)
        try:  # a byte of the name of the library that wrote it says nothing
            assert read_metric_table(run / "evaluation.json", written) == rows
        except DamagedError:
            broken = path.read_bytes()
        path.write_bytes(before)
    path.write_bytes(broken)
    assert doctor(run, capsys)[0] == 1
    path.write_bytes(before[: len(before) // 2])
    code, text = doctor(run, capsys)
    assert (code, "damaged     evaluation.parquet: damaged table" in text) == (1, True)


def test_the_doctor_tells_a_table_of_another_evaluation(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def better(found: dict[str, Any]) -> None:
        found["reconstruction"]["fvu"] = 0.0

    change_sealed(run / "evaluation.json", better)
    code, text = doctor(run, capsys)
    assert code == 1
    assert "evaluation.parquet: is not of what evaluation.json says" in text
    (run / "evaluation.json").unlink()
    code, text = doctor(run, capsys)
    assert code == 1
    assert "missing     evaluation.parquet: the evaluation that it is a table of" in text


def test_the_doctor_knows_tables_of_families(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "evaluation.absorption.json"
    protocol = json.loads((run / "evaluation.json").read_text())["protocol_hash"]
    path.write_text(json.dumps({"protocol_hash": protocol, "by_letter": [], "sha256": ""}))
    change_sealed(path)
    assert doctor(run, capsys)[0] == 0
    change_sealed(path, lambda found: found.update(protocol_hash="of something else"))
    code, text = doctor(run, capsys)
    assert (code, "absorption.json: is of another evaluation" in text) == (1, True)
    path.write_text(path.read_text().replace("[]", "[1]"))
    code, text = doctor(run, capsys)
    assert (code, "absorption.json: its content does not match" in text) == (1, True)


def test_another_evaluation_is_refused_before_anything_is_measured(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sae.EvaluateConfig(run=str(run), tokens=64)
    before = (run / "evaluation.json").read_bytes()
    sae.evaluate(config)
    assert (run / "evaluation.json").read_bytes() == before, "the same again is no other"

    def measure(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("sae.commands.evaluate.HeldOut.measure", measure)
    with pytest.raises(InputError, match="holds an evaluation already; --replace"):
        sae.evaluate(sae.EvaluateConfig(run=str(run), tokens=32))
    (run / "evaluation.json").write_bytes(before.replace(b'"fvu": 0', b'"fvu": 1'))
    with pytest.raises(InputError, match="holds an evaluation already; --replace"):
        sae.evaluate(config)
    with pytest.raises(AssertionError):
        sae.evaluate(sae.EvaluateConfig(run=str(run), tokens=32, replace=True))
