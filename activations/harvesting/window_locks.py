"""Locks by which several processes that harvest one store agree on who computes which window.

    torchrun --nproc-per-node 4 -m saescope harvest CONFIG.toml

They share nothing but the file system. Each reads the whole text, takes the next window that nobody
has, computes it and leaves it in the store (`activations.harvesting.staging`); rank 0, which holds
the store's lock, does the same, and commits what is there in the order of one process. To have a
window, or to be a rank, is to hold a lock on a byte of `.NAME.ranks` beside the store, which the
operating system takes back from a process that dies: then another one has the window.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from activations.storage.layout import PENDING
from saescope.errors import ArtefactError
from saescope.locks import locked
from saescope.paths import AnyPath, local
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
        """Have a window, unless another rank has it."""
        return self._lock(_WINDOWS + window)

    def release(self, window: int) -> None:
        """Let go of a window."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, _WINDOWS + window)

    def check(self) -> None:
        """Raise ArtefactError if rank 0 has not been there for some time."""
        if self.number == 0:
            return
        if not self._lock(0, shared=True):
            self._rank_0_was_here = time.monotonic()
            return
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, 0)
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


def ranks_file(out: Path) -> Path:
    """The file whose bytes the ranks of a harvest lock."""
    artefact = out.absolute()
    return artefact.parent / f".{artefact.name}.ranks"


@contextmanager
def member(out: Path, work: str = "a harvest") -> Iterator[Team]:
    """This process as a rank of the work there. Raises ArtefactError as `Team` does."""
    team = Team(out, this_rank().number, work)
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
        out = shared_folder(out)
    with locked(out, "harvest"):
        if isinstance(out, Path) and (
            several or (out / PENDING).exists() or ranks_file(out).exists()
        ):
            with member(out) as team:
                yield team
        else:
            yield None


def shared_folder(out: str | AnyPath) -> Path:
    """The folder that several ranks harvest to. Raises InputError for an object store."""
    return local(out, "several processes harvest one store only in a folder that they share")


def pauses() -> Iterator[None]:
    """Without end, at first without a pause."""
    seconds, longest = _POLL
    while True:
        yield
        time.sleep(seconds)
        seconds = min(1.5 * seconds, longest)
