"""How several processes that harvest one store agree on who computes which window.

    torchrun --nproc-per-node 4 -m saescope harvest CONFIG.toml

They share nothing but the file system. Each reads the whole text, takes the next window that nobody
has, computes it and leaves it in the store (`activations.harvesting.staging`); rank 0, which holds
the store's lock, does the same, and commits what is there in the order of one process. To have a
window, or to be a rank, is to hold a lock on a byte of `.NAME.ranks` beside the store, which the
operating system takes back from a process that dies: then another one has the window.

An object store locks nothing, and not every file system locks for several machines. There the
ranks ask the store of keys that torchrun itself keeps for them (its rendezvous): a window is had by
whoever sets its key first. If a rank dies torchrun ends all, and starts all anew with other keys.

Indexing and sweeps share pieces and runs in the same way.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from activations.storage.layout import PENDING
from saescope.errors import ArtefactError, InputError
from saescope.locks import locked
from saescope.paths import AnyPath, as_path, remove
from saescope.process_rank import this_rank
from saescope.system import system_errors

_WINDOWS = 1 << 32
"""the byte of the first window; those below are the ranks'"""
_POLL = (0.02, 1.0)
"""seconds between two looks, at first and at last"""
_LEAVING = 5.0
"""seconds that a process may take to leave when its harvest is complete"""
_PATIENCE = 120.0
"""seconds that the other ranks wait for a rank 0 that is not there"""

Found = TypeVar("Found")


class Team:
    """This process as one of the ranks of a harvest, or of other work that is shared like one.

    Args: work says what, for messages.

    Raises ArtefactError if another process has this rank there, or the file system has no locks.
    """

    def __init__(self, out: Path, number: int, work: str = "a harvest") -> None:
        self._out, self.number, self._work = out, number, work
        self._file = ranks_file(out)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._enter()
        self._rank_0_was_here = time.monotonic()

    def _enter(self) -> None:
        last_try = time.monotonic() + _LEAVING
        while True:
            with system_errors(str(self._out)):
                self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
            # rank 0 has the store's lock; others look for it by having its byte for an instant
            held = self._lock(self.number, wait=self.number == 0)
            with suppress(FileNotFoundError):
                if held and os.path.samestat(os.fstat(self._descriptor), self._file.stat()):
                    return
            os.close(self._descriptor)  # the last of those before has just removed it
            if not held and time.monotonic() > last_try:
                raise ArtefactError(
                    f"another process is rank {self.number} of {self._work} there; wait until it "
                    "has ended, or choose another folder",
                    where=str(self._out),
                )
            time.sleep(_POLL[0])

    def _lock(
        self, offset: int, *, wait: bool = False, length: int = 1, shared: bool = False
    ) -> bool:
        """Lock bytes of the file; whether no other process has them."""
        kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.lockf(self._descriptor, kind, length, offset)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            raise ArtefactError(
                f"this file system cannot lock files ({error}), which several processes need; "
                "choose another folder",
                where=str(self._out),
            ) from error
        return True

    def claim(self, window: int) -> bool:
        """Have a window (or what else has this number), unless another rank has it."""
        return self._lock(_WINDOWS + window)

    def release(self, window: int) -> None:
        """Let go of a window."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, _WINDOWS + window)

    def begin(self) -> None:
        """Let the other ranks begin, for rank 0 once `pending/` is there: what they wait for."""

    def begun(self) -> bool:
        """Whether rank 0 has let the others begin."""
        return (self._out / PENDING).exists()

    def led(self) -> bool:
        """Whether rank 0 is at work, for the others."""
        if not self._lock(0, shared=True):
            return True
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, 0)
        return False

    def check(self) -> None:
        """Raise ArtefactError if rank 0 has not been there for some time."""
        if self.number == 0:
            return
        if self.led():
            self._rank_0_was_here = time.monotonic()
            return
        if time.monotonic() - self._rank_0_was_here > _PATIENCE:
            raise ArtefactError(
                f"rank 0, which alone finishes {self._work}, has not been at work here for "
                f"{_PATIENCE:.0f} s; run the same command again: what was computed counts",
                where=f"{self._out}, rank {self.number}",
            )

    def wait_for(self, look: Callable[[], Found | None]) -> Found:
        """What rank 0 is to bring about, once it is there. Raises ArtefactError if it is gone."""
        waits = pauses()
        while (found := look()) is None:
            self.check()
            next(waits)
        return found

    def leave(self) -> None:
        """End this process's part; the last of all removes the file of locks."""
        if self._lock(0, length=0):
            self._file.unlink(missing_ok=True)
        os.close(self._descriptor)


class RendezvousTeam(Team):
    """This process as one of the ranks that torchrun has started, wherever their machines are.

    Raises ArtefactError if torchrun's store of keys cannot be reached.
    """

    def __init__(self, out: AnyPath, number: int) -> None:
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        self.number = number
        digest = hashlib.sha256(str(out).encode()).hexdigest()[:16]
        try:
            # its keys are of this attempt of torchrun's alone
            keys, _, _ = next(rendezvous("env://"))
            self._keys = PrefixStore(f"saescope {digest}", keys)
            self._keys.add("ranks", 1)
        except (RuntimeError, ValueError) as error:
            raise ArtefactError(
                f"torchrun's rendezvous cannot be reached: {error}", where=str(out)
            ) from error

    def claim(self, window: int) -> bool:
        """Have a window, unless another rank has it."""
        mine = str(self.number)
        return self._keys.compare_set(f"window {window}", "", mine) == mine.encode()

    def release(self, window: int) -> None:
        """Let go of a window."""
        self._keys.delete_key(f"window {window}")

    def begin(self) -> None:
        """Let the other ranks begin."""
        self._keys.set("begun", "1")

    def begun(self) -> bool:
        """Whether rank 0 has let the others begin."""
        return self._keys.check(["begun"])

    def led(self) -> bool:
        """Whether rank 0 has let the others begin: torchrun ends all if it is gone."""
        return self.begun()

    def check(self) -> None:
        """Nothing: torchrun ends all ranks if one has died."""

    def leave(self) -> None:
        """End this process's part."""


def ranks_file(out: Path) -> Path:
    """The file whose bytes the ranks of a harvest lock."""
    artefact = out.absolute()
    return artefact.parent / f".{artefact.name}.ranks"


@contextmanager
def member(out: AnyPath, work: str = "a harvest") -> Iterator[Team]:
    """This process as a rank of the work there. Raises ArtefactError as `Team` does.

    Ranks that torchrun started on several machines ask its store of keys about a folder too.
    """
    rank = this_rank()
    keys = _torchrun_has_keys() and rank.size > rank.local_size
    if isinstance(out, Path) and not keys:
        team = Team(out, rank.number, work)
    else:
        team = RendezvousTeam(out, rank.number)
    try:
        yield team
    finally:
        team.leave()


@contextmanager
def leading(out: AnyPath) -> Iterator[Team | None]:
    """Hold a store's lock, to harvest; with the other ranks if there are, or were, any.

    Raises InputError for several ranks and an object store; ArtefactError as `locked` and `Team`.
    """
    several = this_rank().size > 1
    if several:
        out = shared(out)
    with locked(out, "harvest"):
        if not several and not isinstance(out, Path):
            remove(out / PENDING)  # what several processes left there is computed anew
        if several or (
            isinstance(out, Path) and ((out / PENDING).exists() or ranks_file(out).exists())
        ):
            with member(out) as team:
                yield team
        else:
            yield None


def shared(out: str | AnyPath) -> AnyPath:
    """Where several ranks work. Raises InputError for an object store without torchrun."""
    found = as_path(out)
    if not isinstance(found, Path) and not _torchrun_has_keys():
        raise InputError(
            "several processes work in an object store only if torchrun starts them; others need a "
            "folder that they share",
            where=str(found),
        )
    return found


def _torchrun_has_keys() -> bool:
    """Whether torchrun keeps a store of keys for the processes that it started."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def pauses() -> Iterator[None]:
    """Without end, at first without a pause."""
    seconds, longest = _POLL
    while True:
        yield
        time.sleep(seconds)
        seconds = min(1.5 * seconds, longest)
