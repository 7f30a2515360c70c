"""`saescope eval`: what an interruption leaves, what goes on after it, and a quick look."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sae.commands import held_out
from sae.commands.compare_metrics import summary_lines
from sae.commands.evaluate import evaluate
from sae.commands.evaluate_config import QUICK_ROWS, QUICK_TOKENS, EvaluateConfig
from sae.commands.sweep import SweepConfig, sweep
from sae.evaluation import families, geometry, metric_family
from sae.evaluation.description_length import CodeDistribution
from sae.evaluation.unfinished_file import Unfinished
from sae.evaluation.written import read_evaluation
from saescope.__main__ import main
from saescope.errors import InputError
from tests.tiny import make_tiny_harvest, make_tiny_model

SUITES = "core,geometry"
FILES = ("evaluation.json", "evaluation.parquet")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a tiny harvest."""
    root = tmp_path_factory.mktemp("unfinished")
    harvest = make_tiny_harvest(root / "data", make_tiny_model(root / "model"))
    base = {"sae": {"kind": "topk", "d_sae": 32, "k": 4}, "trainer": {"batch_size": 64}}
    grid = ({"name": "run"},)
    sweep(SweepConfig(harvest=str(harvest), out=str(root / "sweep"), base=base, grid=grid))
    return root / "sweep" / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def words(run: Path, *more: str) -> list[str]:
    return ["eval", str(run), "--suite", SUITES, "--tokens", "64", *more]


def interrupted(run: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    """Measure activations, and be interrupted when the model's turn comes."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(held_out.HeldOut, "measure_model", stop)
        assert main(words(run, *more)) == 130


def test_an_interrupted_evaluation_goes_on_and_has_the_same_bytes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(run)) == 0
    expected = {name: (run / name).read_bytes() for name in FILES}
    assert not (run / "evaluation.unfinished").exists()
    for name in FILES:
        (run / name).unlink()
    interrupted(run, monkeypatch)
    assert (run / "evaluation.unfinished").exists()
    assert not (run / "evaluation.json").exists()
    capsys.readouterr()
    assert main(["doctor", str(run)]) == 0
    assert "an evaluation was interrupted, and goes on" in capsys.readouterr().out

    def again(*_: object) -> None:
        raise AssertionError("activations are measured a second time")

    with monkeypatch.context() as patch:
        patch.setattr(held_out.HeldOut, "measure_rows", again)
        assert main(words(run)) == 0
    assert (
        "geometry, reconstruction, row_groups, shrinkage: measured before"
        in capsys.readouterr().out
    )
    assert {name: (run / name).read_bytes() for name in FILES} == expected
    assert not (run / "evaluation.unfinished").exists()


@pytest.mark.parametrize("more", [["--rows", "40"], ["--quick"]], ids=" ".join)
def test_what_another_protocol_measured_is_not_taken(
    run: Path, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(run, monkeypatch)
    measured: list[object] = []
    real = held_out.HeldOut.measure_rows

    def counted(self: Any, *given: Any) -> Any:
        measured.append(given)
        return real(self, *given)

    monkeypatch.setattr(held_out.HeldOut, "measure_rows", counted)
    assert main(words(run, *more)) == 0
    assert len(measured) == 1


def test_a_damaged_file_is_told_and_measured_again(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(run, monkeypatch)
    file = run / "evaluation.unfinished"
    text = file.read_text()
    assert '"fvu": 0.' in text
    file.write_text(text.replace('"fvu": 0.', '"fvu": 1.', 1))
    capsys.readouterr()
    assert main(["doctor", str(run)]) == 1
    assert "evaluation.unfinished: its content does not match" in capsys.readouterr().out
    assert main(words(run)) == 0
    assert "measured again from the start" in capsys.readouterr().out
    assert read_evaluation(run / "evaluation.json")["reconstruction"]["fvu"] < 1


def test_something_else_there_is_left(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "evaluation.unfinished").write_text("mine")
    assert main(words(run)) == 2
    assert "holds something else than an unfinished evaluation" in capsys.readouterr().err
    assert (run / "evaluation.unfinished").read_text() == "mine"
    assert not (run / "evaluation.json").exists()


def test_interrupted_controls_go_on_with_the_next(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["eval", str(run), "--controls", "--metrics", "reconstruction"]
    assert main(words) == 0
    expected = (run / "controls.json").read_bytes()
    (run / "controls.json").unlink()
    real = held_out.HeldOut.measure_rows
    calls: list[int] = []

    def twice(self: Any, *given: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return real(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(held_out.HeldOut, "measure_rows", twice)
        assert main(words) == 130
    calls.clear()
    with monkeypatch.context() as patch:  # two of four are left
        patch.setattr(held_out.HeldOut, "measure_rows", twice)
        assert main(words) == 0
    assert (run / "controls.json").read_bytes() == expected
    assert not (run / "evaluation.unfinished").exists()


# ---- --quick -------------------------------------------------------------------------------------


def test_quick_measures_less_and_says_so_in_the_protocol(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae.commands.evaluate_config.QUICK_ROWS", 48)
    monkeypatch.setattr("sae.commands.evaluate_config.QUICK_TOKENS", 32)
    found = {}
    for name, more in (("whole", []), ("quick", ["--quick"])):
        out = str(tmp_path / f"{name}.json")
        suites = "core,geometry,description_length"
        assert main(words(run, "--suite", suites, "--out", out, *more)) == 0
        found[name] = read_evaluation(tmp_path / f"{name}.json")
    protocol = {name: each["protocol"] for name, each in found.items()}
    assert protocol["quick"]["rows"] == 48 < protocol["whole"]["rows"]
    assert protocol["quick"]["sequences"] < protocol["whole"]["sequences"]
    assert protocol["quick"]["description_length"]["training_rows"] == 4096
    assert protocol["whole"]["description_length"]["training_rows"] == 16_384
    assert protocol["quick"]["geometry"]["aligned_rows"] == 512
    assert protocol["whole"]["geometry"]["projected_rows"] == 4096
    told = summary_lines({"whole": found["whole"], "quick": found["quick"]})
    assert any("not compared, as it was measured under another" in line for line in told)


def test_quick_is_an_upper_bound_of_what_was_asked_for() -> None:
    quick = EvaluateConfig(run="x", quick=True)
    assert (quick.most_rows, quick.most_tokens) == (QUICK_ROWS, QUICK_TOKENS)
    less = EvaluateConfig(run="x", quick=True, rows=9, tokens=7)
    assert (less.most_rows, less.most_tokens) == (9, 7)
    whole = EvaluateConfig(run="x")
    assert (whole.most_rows, whole.most_tokens) == (None, 8192)


def test_families_look_at_as_many_rows_as_their_quick_protocol_says(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {}
    counting = CodeDistribution.finish

    def finish(self: CodeDistribution) -> None:
        counting(self)
        seen["training"] = self.rows

    monkeypatch.setattr(CodeDistribution, "finish", finish)
    cknna = geometry.cknna

    def aligned(x: Any, codes: Any, **more: Any) -> float | None:
        seen["aligned"] = len(x)
        return cknna(x, codes, **more)

    monkeypatch.setattr(geometry, "cknna", aligned)
    for name, value in (("QUICK_ALIGNED_ROWS", 20), ("QUICK_PROJECTED_ROWS", 20)):
        monkeypatch.setattr(geometry, name, value)
    monkeypatch.setattr("sae.evaluation.description_length.QUICK_TRAINING_ROWS", 70)
    evaluate(
        EvaluateConfig(
            run=str(run),
            suite=("geometry,description_length",),
            quick=True,
            out=str(tmp_path / "e.json"),
        )
    )
    assert seen == {"training": 70, "aligned": 20}


def test_a_quick_setting_is_one_of_the_protocol() -> None:
    with pytest.raises(TypeError, match="'hasty': quick= has others than protocol="):
        metric_family("hasty", needs="model", metrics=(), protocol={"n": 1}, quick={"rows": 2})
    assert "hasty" not in families()


def test_progress_is_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(run, "--suite", "core,description_length", "--quick")) == 0
    shown = capsys.readouterr().out
    assert "fitting DescriptionLength on training rows: done, 12,288 rows in" in shown
    rows = json.loads((run / "evaluation.json").read_text())["reconstruction"]["rows"]
    assert f"measuring activations: done, {rows:,} rows in" in shown


def test_an_unfinished_file_is_of_one_evaluation(run: Path) -> None:
    kept = Unfinished(run / "e.json")
    assert kept.part({"n": 1}, "one", lambda: {"v": 0.1}) == {"v": 0.1}
    again = Unfinished(run / "e.json")
    assert again.part({"n": 1}, "one", lambda: {"v": 2}) == {"v": 0.1}
    assert again.part({"n": 2}, "two", lambda: {"v": 2}) == {"v": 2}
    other = Unfinished(run / "f.json")
    assert other.part({"n": 1}, "one", lambda: {"v": 3}) == {"v": 3}
    again.forget()
    assert not (run / "e.unfinished").exists()
    (run / "e.unfinished").mkdir()
    (run / "e.unfinished" / "mine").write_text("")
    with pytest.raises(InputError):
        Unfinished(run / "e.json")
