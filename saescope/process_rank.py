"""The rank of this process, as torchrun or SLURM's srun say it in environment variables."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from saescope.errors import InputError


@dataclass(frozen=True)
class Rank:
    """One of `size` processes with the same command; `local` of `local_size` on this machine."""

    number: int = 0
    size: int = 1
    local: int = 0
    local_size: int = 1


def this_rank(environment: Mapping[str, str] = os.environ) -> Rank:
    """The rank by torchrun's variables, else by srun's; rank 0 of 1 without either.

    SLURM_NTASKS does not count: it is what a job may start, and is set for a plain process in the
    job's shell too. What srun has started has SLURM_STEP_NUM_TASKS. Raises InputError for variables
    that make no sense.

    >>> this_rank({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"})
    Rank(number=0, size=1, local=0, local_size=1)
    """
    if "WORLD_SIZE" in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return torchrun_rank(environment)
    return _checked(
        Rank(
            number=_read(environment, "SLURM_PROCID", 0),
            size=_read(environment, "SLURM_STEP_NUM_TASKS", 1),
            local=_read(environment, "SLURM_LOCALID", 0),
            local_size=_tasks_of_node(environment),
        )
    )


def torchrun_rank(environment: Mapping[str, str] = os.environ) -> Rank:
    """The rank by torchrun's variables alone; rank 0 of 1 without them.

    >>> torchrun_rank({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"})
    Rank(number=5, size=8, local=1, local_size=4)
    """
    if "WORLD_SIZE" not in environment:
        return Rank()
    return _checked(
        Rank(
            number=_read(environment, "RANK", 0),
            size=_read(environment, "WORLD_SIZE", 1),
            local=_read(environment, "LOCAL_RANK", 0),
            local_size=_read(environment, "LOCAL_WORLD_SIZE", 1),
        )
    )


def _read(environment: Mapping[str, str], name: str, otherwise: int) -> int:
    given = environment.get(name)
    if given is not None and not re.fullmatch(r"\d+", given):
        raise InputError("is no number", where=f"${name}", given=given, allowed="0, 1, 2, ...")
    return otherwise if given is None else int(given)


def _tasks_of_node(environment: Mapping[str, str]) -> int:
    """How many processes an srun has started here, from a list a node such as "4(x2),3"."""
    counts: list[int] = []
    listed = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", listed):
        counts += [int(count)] * int(times or 1)
    node = _read(environment, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else 1


def _checked(rank: Rank) -> Rank:
    if rank.number >= rank.size:
        raise InputError(
            "the environment gives this process a number that its group does not have",
            where="rank",
            given=rank.number,
            allowed=f"0 to {rank.size - 1}",
        )
    return rank
