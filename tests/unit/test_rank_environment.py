"""Which of several processes this one is, and the card it takes, by what started it."""

import pytest
import torch

from activations.models.devices import own_device
from saescope.errors import InputError
from saescope.process_rank import Rank, this_rank, torchrun_rank


def test_the_environment_tells_the_rank() -> None:
    assert this_rank({}) == torchrun_rank({}) == Rank()
    of_torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert this_rank(of_torchrun) == torchrun_rank(of_torchrun) == Rank(5, 8, 1, 4)
    # a plain process in a job's shell: it is alone
    shell = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
    assert this_rank(shell) == Rank()
    srun = {
        **shell, "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
        "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "11", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    }  # fmt: skip
    assert this_rank(srun) == Rank(9, 11, 1, 3)
    assert this_rank({**srun, "SLURM_NODEID": "1"}).local_size == 4
    assert torchrun_rank(srun) == Rank()
    assert this_rank({**srun, **of_torchrun}) == Rank(5, 8, 1, 4)  # torchrun, started by an srun
    assert this_rank({**srun, "WORLD_SIZE": "1"}) == Rank()  # to be alone all the same
    with pytest.raises(InputError, match=r"\$RANK.*is no number.*three"):
        this_rank({"WORLD_SIZE": "4", "RANK": "three"})
    with pytest.raises(InputError, match=r"number that its group does not have.*4.*0 to 3"):
        this_rank({"WORLD_SIZE": "4", "RANK": "4"})


def test_each_rank_of_a_machine_takes_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device("cuda") == "cuda"
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert own_device("auto") == "auto"  # one on each machine may use all its cards
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert [own_device(d) for d in ("cuda", "auto", "cuda:1", "cpu")] == [
        "cuda:0", "cuda:0", "cuda:1", "cpu",
    ]  # fmt: skip
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device("cuda") == "cuda:1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert own_device("auto") == "auto"
