"""Several processes of torchrun share the runs of a sweep: each is trained by exactly one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from activations.harvesting import window_locks
from sae.commands.sweep import MEMBERS, MEMBERS_SCHEMA, read_members, sweep
from saescope.errors import ArtefactError, InputError
from saescope.locks import locked
from saescope.seals import write_sealed
from tests.tiny import make_tiny_harvest, make_tiny_model
from tests.unit.test_sweep import SITES, config, same

WORKER = """
import os, sys
from pathlib import Path
from sae.commands import sweep
from tests.unit.test_sweep import config

harvest, out, one_machine = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "1"
if not one_machine:
    os.environ["LOCAL_WORLD_SIZE"] = "1"
real = sweep._train_together
def counted(runs, beginning):
    for run in runs:
        # in one piece: both write to one pipe
        os.write(1, f"rank {os.environ['RANK']} trains {run.folder.name}\\n".encode())
    real(runs, beginning)
sweep._train_together = counted
sweep.sweep(config(harvest, out))
"""


@pytest.fixture(scope="module")
def harvest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep-ranks")
    return make_tiny_harvest(folder / "data", make_tiny_model(folder / "model"), sites=SITES)


@pytest.fixture(scope="module")
def whole(harvest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes."""
    out = tmp_path_factory.mktemp("whole") / "sweep"
    sweep(config(harvest, out))
    return out


def torchrun(harvest: Path, out: Path, script: Path, *, one_machine: bool) -> list[list[str]]:
    """The ranks, and the runs that they trained."""
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    found = subprocess.run(
        [*command, "2", str(script), str(harvest), str(out), str(int(one_machine))],
        text=True, capture_output=True, timeout=240, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert not found.returncode, found.stderr
    lines = [line.split() for line in found.stdout.splitlines() if " trains " in line]
    return [[words[1], words[3]] for words in lines]


@pytest.mark.slow
@pytest.mark.parametrize("one_machine", [True, False], ids=["lock file", "rendezvous"])
def test_two_processes_make_what_one_does(
    harvest: Path, whole: Path, tmp_path: Path, one_machine: bool
) -> None:
    out = tmp_path / "out" / "sweep"
    trained = torchrun(harvest, out, tmp_path / "worker.py", one_machine=one_machine)
    names = list(read_members(whole))
    assert {rank for rank, _ in trained} == {"0", "1"}
    assert sorted(name for _, name in trained) == sorted(names)
    for name in names:
        assert same(whole / name, out / name), name
    table, other = (
        [{**each, "out": None} for each in read_members(folder).values()] for folder in (whole, out)
    )
    assert table == other
    assert sorted(each.name for each in out.iterdir()) == sorted([*names, MEMBERS])
    assert [each.name for each in out.parent.iterdir()] == ["sweep"]  # no locks are left
    assert not torchrun(harvest, out, tmp_path / "worker.py", one_machine=one_machine)


def as_rank_1(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("RANK", "1")
    patch.setenv("WORLD_SIZE", "2")
    patch.setattr(window_locks, "_PATIENCE", 0.3)


def test_without_rank_0_the_others_train_nothing(
    harvest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_rank_1(monkeypatch)
    with pytest.raises(ArtefactError, match="rank 0, which alone finishes a sweep, has not been"):
        sweep(config(harvest, tmp_path / "sweep"))
    assert list(tmp_path.iterdir()) == []


def test_a_rank_with_other_members_is_refused(
    harvest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_rank_1(monkeypatch)
    monkeypatch.setattr(window_locks.Team, "led", lambda _: True)
    out = tmp_path / "sweep"
    write_sealed(out / MEMBERS, {"schema": MEMBERS_SCHEMA, "members": {}})
    grid: Any = ({"sae.kind": "topk", "sae.k": [7], "site": SITES[0]},)
    with pytest.raises(InputError, match=r"rank 0 sweeps other members.*topk-k=7"):
        sweep(config(harvest, out, grid=grid))
    assert not (out / "topk-k=7").exists()


@pytest.mark.slow
def test_a_single_process_goes_on_where_ranks_were_killed(
    harvest: Path, whole: Path, tmp_path: Path
) -> None:
    """It takes part as they did, as some may still be at work, and removes their file of locks."""
    left = window_locks.ranks_file(tmp_path / "sweep")
    left.touch()
    grid: Any = ({"sae.kind": "relu", "site": [*SITES]},)
    folders = sweep(config(harvest, tmp_path / "sweep", grid=grid))
    assert all(same(each, whole / each.name) for each in folders)
    assert not left.exists()


def test_a_second_sweep_is_refused_at_rank_0(
    harvest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = tmp_path / "sweep"
    with locked(out, "sweep"), pytest.raises(ArtefactError, match="in use by sweep"):
        sweep(config(harvest, out))
    assert not out.exists()


@pytest.mark.slow
def test_what_one_process_trains_alone_is_shared_too(
    harvest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """End-to-end training, which several processes cannot do together."""
    as_rank_1(monkeypatch)
    grid: Any = ({"sae.kind": "topk", "sae.k": 3, "objective": "end_to_end", "site": SITES[1]},)
    assert sweep(config(harvest, tmp_path / "sweep", grid=grid, plan=True)) == []
