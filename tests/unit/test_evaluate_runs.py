"""`saescope eval` of several runs: each measured once, by whichever process, whatever fails."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sae
from sae.commands import evaluate_runs as module
from sae.commands.evaluate_runs import EvaluateRunsConfig, evaluate_runs
from sae.commands.sweep import SweepConfig, sweep
from sae.kernels import matmul
from saescope.__main__ import main
from saescope.errors import InputError
from tests.tiny import make_tiny_harvest, make_tiny_model

GRID = ({"sae.kind": "topk", "sae.k": [3, 5], "outliers": [10.0]}, {"sae.kind": "relu"})
NAMES = ["topk-k=3-outliers=10", "topk-k=5-outliers=10", "relu"]


@pytest.fixture(autouse=True)
def one_product() -> Iterator[None]:
    """Products go to one library, where each process would time which one is faster."""
    with matmul.using("default"):
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A harvest, and a sweep of three runs on it."""
    root = tmp_path_factory.mktemp("eval")
    harvest = make_tiny_harvest(root / "data", make_tiny_model(root / "model"))
    base = {"sae": {"d_sae": 32}, "trainer": {"batch_size": 64}}
    sweep(SweepConfig(harvest=str(harvest), out=str(root / "sweep"), base=base, grid=GRID))
    return root


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy of the sweep."""
    return Path(shutil.copytree(trained / "sweep", tmp_path / "sweep"))


@pytest.fixture
def alone(trained: Path, tmp_path: Path) -> dict[str, Any]:
    """What measuring each run by itself gives."""
    copied = shutil.copytree(trained / "sweep", tmp_path / "alone")
    for name in NAMES:
        sae.evaluate(sae.EvaluateConfig(run=str(copied / name), tokens=64))
    return {name: evaluation(copied / name) for name in NAMES}


def evaluation(run: Path) -> Any:
    return json.loads((run / "evaluation.json").read_text())


def different(one: Any, other: Any, where: str = "") -> list[str]:
    """What two evaluations say otherwise, value by value."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if one == other else [f"{where}: {one!r}, {other!r}"]
    keys = sorted({*one, *other})
    pairs = [(f"{where}/{key}", one.get(key), other.get(key)) for key in keys]
    return [line for path, a, b in pairs for line in different(a, b, path)]


def written(folder: Path) -> dict[str, int]:
    return {name: (folder / name / "evaluation.json").stat().st_mtime_ns for name in NAMES}


def test_a_sweep_is_all_of_its_runs_and_each_is_measured_as_alone(
    runs: Path, alone: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(runs), str(runs / NAMES[0]), "--tokens", "64"]) == 0
    assert {name: evaluation(runs / name) for name in NAMES} == alone
    out = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in out[:3]] == ["1 of 3", "2 of 3", "3 of 3"]
    assert all("measured in" in line for line in out[:3])
    head, *rows, beside, one, other = out[3:]
    assert beside.startswith(f"beside {runs / NAMES[0]}, by the intervals of both figures")
    assert one.startswith(f"  {runs / NAMES[1]}: ")
    assert other.startswith(f"  {runs / NAMES[2]}: not compared, as it was measured under another")
    assert head.split()[:3] == ["run", "L0", "FVU"]
    assert [row.split()[0] for row in rows] == [str(runs / name) for name in NAMES]
    assert rows[0].split()[1] == "3.00"
    assert rows[0].split()[-1] == alone[NAMES[0]]["protocol_hash"][:12]


def test_what_is_measured_under_this_protocol_is_left(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["eval", str(runs), "--tokens", "64"]
    assert main(words) == 0
    before = written(runs)
    (runs / NAMES[1] / "evaluation.json").unlink()
    measured: list[str] = []
    real = module.HeldOut.measure
    monkeypatch.setattr(
        module.HeldOut,
        "measure",
        lambda self, wanted: measured.append(Path(self.config.run).name) or real(self, wanted),
    )
    capsys.readouterr()
    assert main(words) == 0
    assert measured == [NAMES[1]]
    assert capsys.readouterr().out.count("is measured already") == 2
    after = written(runs)
    assert [name for name in NAMES if after[name] != before[name]] == [NAMES[1]]


@pytest.mark.parametrize(
    "other",
    [["--rows", "40"], ["--tokens", "32"], ["--tokens", "0"], ["--metrics", "density"]],
    ids=" ".join,
)
def test_another_protocol_is_measured_only_with_replace(
    runs: Path, other: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", *(str(runs / name) for name in NAMES[1:])]
    assert main([*words, "--tokens", "64"]) == 0
    before = evaluation(runs / NAMES[1])
    capsys.readouterr()
    assert main([*words, "--tokens", "64", *other]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("holds an evaluation already; --replace") == 2
    assert evaluation(runs / NAMES[1]) == before
    assert main([*words, "--tokens", "64", *other, "--replace"]) == 0
    after = evaluation(runs / NAMES[1])
    assert after["protocol_hash"] != before["protocol_hash"] or after != before
    capsys.readouterr()
    assert main([*words, "--tokens", "64", *other]) == 0
    assert capsys.readouterr().out.count("is measured already") == 2


def test_one_that_fails_is_named_and_the_others_go_on(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(runs / NAMES[0] / "sae")
    absent = str(runs / "absent")
    words = ["eval", absent, str(runs), "--tokens", "0"]
    assert main(words) == 2
    shown = capsys.readouterr()
    assert f"1 of 4  {absent} is not measured: " in shown.err
    assert f"2 of 4  {runs / NAMES[0]} is not measured: " in shown.err
    assert "this run is not finished" in shown.err
    assert shown.err.splitlines()[-1].endswith("2 of 4 runs could not be measured; see above")
    assert [line.split()[0] for line in shown.out.splitlines()[-4:-2]] == [
        str(runs / name) for name in NAMES[1:]
    ]
    assert not (runs / "absent").exists()


def test_wrong_input_for_several_is_said_before_any_is_measured(runs: Path) -> None:
    several = {"run": str(runs / NAMES[0]), "runs": (str(runs / NAMES[1]),), "tokens": 0}
    with pytest.raises(InputError, match="out: is one file, for several runs"):
        evaluate_runs(EvaluateRunsConfig(**several, out=str(runs / "e.json")))
    with pytest.raises(InputError, match="no such family of metrics"):
        evaluate_runs(EvaluateRunsConfig(**several, metrics=("fvu",)))
    assert not list(runs.rglob("evaluation.json"))


WORKER = """
import os, sys, time
from pathlib import Path
from sae.commands import evaluate_runs as module
from sae.commands.evaluate import HeldOut
from sae.kernels import matmul
if sys.argv[1] == "0":
    os.environ["LOCAL_WORLD_SIZE"] = "1"
real = HeldOut.measure
def counted(self, wanted):
    os.write(1, f"rank {os.environ['RANK']} measures {self.config.run}\\n".encode())
    Path(__file__).with_name(f"rank {os.environ['RANK']}").touch()
    for _ in range(600):  # so that each measures one
        if len(list(Path(__file__).parent.glob("rank *"))) == 2:
            break
        time.sleep(0.1)
    return real(self, wanted)
HeldOut.measure = counted
config = module.EvaluateRunsConfig(run=sys.argv[2], runs=tuple(sys.argv[3:]), tokens=64)
with matmul.using("default"):
    sys.exit(module.evaluate_runs(config))
"""


@pytest.mark.slow
@pytest.mark.parametrize("one_machine", [True, False], ids=["lock file", "rendezvous"])
def test_two_processes_measure_each_run_once(
    runs: Path, alone: dict[str, Any], tmp_path: Path, one_machine: bool
) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)

    def torchrun(*names: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        root = str(Path(__file__).parents[2])
        return subprocess.run(
            [*command, "--nproc-per-node", "2", str(script), str(int(one_machine)), *names],
            text=True, capture_output=True, timeout=240, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        )  # fmt: skip

    found = torchrun(str(runs))
    assert not found.returncode, found.stderr
    begun = re.compile(r"\S+ \d+ measures ")
    lines = [line.split() for line in found.stdout.splitlines() if begun.match(line)]
    assert sorted(words[3] for words in lines) == sorted(str(runs / name) for name in NAMES)
    assert {words[1] for words in lines} == {"0", "1"}
    assert found.stdout.count(" of 3  ") == 3
    assert different({name: evaluation(runs / name) for name in NAMES}, alone) == []
    assert not list(tmp_path.rglob(".*.ranks"))
    failed = torchrun(str(runs), str(runs / "absent"))
    assert failed.returncode
    assert f" of 4  {runs / 'absent'} is not measured: " in failed.stderr
    assert failed.stdout.count("is measured already") == 3
