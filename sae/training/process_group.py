"""Training in several processes: joining those that torchrun started.

    torchrun --nproc-per-node 4 -m saescope train CONFIG.toml

Every rank reads the same stream and takes its share of each batch, so all have the same state. Only
rank 0 writes files and prints.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from sae import distributed
from sae.distributed import ROWS, Split
from saescope import progress
from saescope.errors import InputError, SaescopeError
from saescope.process_rank import torchrun_rank

_TIMEOUT = timedelta(minutes=30)
"""longest wait for the other ranks, while rank 0 may write a checkpoint of many GB"""
_FAILED = "failed"


def device(kind: Literal["cpu", "cuda"]) -> torch.device:
    """Where this process computes: the CPU, or its own card.

    Raises InputError if there is no card for it.
    """
    if kind == "cpu":
        return torch.device("cpu")
    rank, cards = torchrun_rank(), torch.cuda.device_count()
    if rank.local_size > cards:
        raise InputError(
            "not a card for each process",
            where="device",
            given=f"{kind}, {rank.local_size} processes",
            allowed="cpu" + (f", or up to {cards} processes" if cards else ""),
        )
    return torch.device("cuda", rank.local)


@contextmanager
def session(split: Split = "rows", kind: Literal["cpu", "cuda"] = "cpu") -> Iterator[None]:
    """A context in which the ranks that torchrun started, if it did, train one SAE together.

    If one rank ends (an error, Ctrl-C, being killed), all end; only the first prints why.

    Args: split is what ranks share out, the rows of a batch or the features; kind is that of their
    devices.
    """
    if kind == "cuda":
        try:
            torch.cuda.set_device(device(kind))
        except InputError:  # what all processes of this machine find, the first says
            if torchrun_rank().local == 0:
                raise
            raise SystemExit(2) from None
    if torchrun_rank().size == 1 or distributed.size() > 1:
        yield
        return
    notes = _join(kind)
    distributed.arrange(split)
    try:
        with progress.silent(distributed.rank() > 0):
            yield
            distributed.everyones(None)  # none goes while others may still need it
    except BaseException as error:
        _leave(notes, error)
        raise
    finally:
        distributed.arrange(None)
        dist.destroy_process_group()


def _join(kind: str) -> Store:
    """Start the process group; the store in which a rank says that it failed.

    Torch's module of differentiable collectives keeps, as the default of its arguments, the group
    that there is when it is first imported (by an optimiser, say). Kept so, a group's threads run
    on while the interpreter ends, and a process may abort: it is imported before there is one.
    """
    importlib.import_module("torch.distributed.nn")
    store, rank, size = next(rendezvous("env://", timeout=_TIMEOUT))
    store.set_timeout(_TIMEOUT)
    dist.init_process_group(
        "gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=_TIMEOUT,
    )
    return PrefixStore("saescope", store)


def _leave(notes: Store, error: BaseException) -> None:
    """Record that this rank failed; if another failed before, exit without printing anything."""
    own = str(distributed.rank())
    try:
        failed = notes.compare_set(_FAILED, "", own).decode()
    except Exception:  # the store went with the rank that held it
        failed = ""
    if failed != own:
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 1) from None
    if isinstance(error, RuntimeError) and _is_of_network(error):
        raise SaescopeError(
            "another process ended without a word (killed, or out of memory?); run the same "
            "command again to go on",
            where=f"rank {own}",
        ) from error


def _is_of_network(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "peer" in str(error)


def first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return distributed.rank() == 0


def refuse_several(what: str, *, where: str) -> None:
    """Raise InputError if there are several processes."""
    number = torchrun_rank().size
    if number > 1:
        raise InputError(
            f"{what} runs in one process", where=where, given=f"{number} processes", allowed="1"
        )


def refuse_together(what: str, *, where: str) -> None:
    """Raise InputError if several processes train one SAE, and not each its own."""
    if distributed.size() > 1:
        refuse_several(what, where=where)


def check_batch(size: int, accumulate: int) -> None:
    """Raise InputError if a batch, or its last micro-batch, has fewer rows than ranks."""
    each = -(-size // accumulate)
    if size - (size - 1) // each * each < ROWS.size:
        of_each = f" in each of {accumulate} micro-batches" if accumulate > 1 else ""
        raise InputError(
            "fewer rows than processes",
            where="trainer.batch_size",
            given=size,
            allowed=f"at least {ROWS.size}{of_each}",
        )


def check_alike(what: str, value: Any) -> None:
    """Raise SaescopeError on all ranks unless all have the same value."""
    found = distributed.everyones(value)
    if any(each != found[0] for each in found):
        raise SaescopeError(f"the processes differ in {what}; is the disk shared?", given=found)


def together(act: Callable[[], None]) -> None:
    """Call on every rank; a SaescopeError on one of them is raised on all."""
    error: SaescopeError | None = None
    try:
        act()
    except SaescopeError as found:
        error = found
    for each in distributed.everyones(None if error is None else str(error)):
        if each is not None:
            raise error or SaescopeError(each)
