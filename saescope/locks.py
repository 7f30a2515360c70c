"""Locks: one process at a time writes an artefact.

On a file system the operating system keeps them, and a process cannot outlive its own. An object
store cannot lock anything itself: while somebody writes, an object `.NAME.lock` lies beside the
artefact and names them. It is made only where there is none, in one step if the store can do that.
It would outlive a process that is killed; so the same process also holds a local lock, which it
cannot outlive: whoever gets that one knows of an object made on this machine that its maker is
gone. Of one made on another machine nothing is known, and people are told how to decide.
"""

import fcntl
import hashlib
import json
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saescope.artefact import write_bytes
from saescope.cache import cache_dir
from saescope.errors import ArtefactError, InputError
from saescope.paths import AnyPath, as_path, exists, put, read_bytes, remove
from saescope.system import system_errors

if TYPE_CHECKING:
    from upath import UPath


@contextmanager
def locked(path: str | AnyPath, work: str) -> Iterator[None]:
    """Keep other processes from writing this artefact within the block.

    The lock is on `.NAME.lock` beside the artefact, and ends with the process that holds it however
    that ends. `work` says what is being done, for the message that others get.
    Raises ArtefactError at once if another process, or other code in this one, is writing there.
    """
    artefact = as_path(path)
    if isinstance(artefact, Path):
        artefact = Path(os.path.realpath(artefact))
        file, beyond = artefact.parent / f".{artefact.name}.lock", nullcontext()
    else:
        file, beyond = lock_file(artefact), lock_object(artefact, work)
    with _locked_file(file, work, where=str(path)), beyond:
        yield


def _holder(work: str) -> str:
    """Text in a lock about the process that holds it."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return f"{work}, process {os.getpid()} on {socket.gethostname()}, since {now}"


@contextmanager
def _locked_file(file: Path, work: str, *, where: str) -> Iterator[None]:
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with system_errors(where):
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise ArtefactError(
                f"in use by {holder}; wait until it has ended, or choose another folder",
                where=where,
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise ArtefactError(
                f"this file system cannot lock files ({error}), so that two processes could write "
                "here at once; choose another folder",
                where=where,
            ) from error
        if _is_file(descriptor, file):
            break
        os.close(descriptor)  # who held it has just ended, and has removed it
    try:
        os.ftruncate(descriptor, 0)
        with suppress(OSError):  # a full disk: the lock holds without its holder's name
            os.write(descriptor, _holder(work).encode())
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


# ---- in an object store --------------------------------------------------------------------------


def lock_file(artefact: "UPath") -> Path:
    """The local file that a process of this machine locks to write an artefact of an object store.

    Raises InputError for a whole bucket, beside which nothing can lie.
    """
    if not artefact.name:
        raise InputError(
            "is all of a bucket; give a folder in it",
            where=str(artefact),
            allowed=f"{artefact}name",
        )
    named = f"{type(artefact.fs).__name__}:{artefact.path}"
    return _folder() / f"{hashlib.sha256(named.encode()).hexdigest()[:32]}.lock"


@contextmanager
def lock_object(artefact: "UPath", work: str) -> Iterator[None]:
    """Keep other machines from writing an artefact; the caller holds its `lock_file`.

    Raises ArtefactError if a process on another machine is at work there, or may be.
    """
    path = artefact.with_name(f".{artefact.name}.lock")
    mine = json.dumps({"holder": _holder(work), "locks": _lock_folder_id()}).encode()
    while not _created(path, mine):
        with suppress(FileNotFoundError):  # who held it has just ended
            there = _read(path)
            if there.get("locks") != _lock_folder_id():
                raise ArtefactError(
                    f"in use by {there.get('holder', 'another process')}; wait until it has ended, "
                    f"or choose another folder. If it is certain that it has: remove {path}",
                    where=str(artefact),
                )
            put(path, mine)  # its maker had the local lock, which is now ours
            break
    try:
        yield
    finally:
        # one that cannot be removed now is this machine's, and is taken over the next time
        with suppress(ArtefactError, FileNotFoundError):
            if read_bytes(path) == mine:
                remove(path)


def _created(path: "UPath", content: bytes) -> bool:
    """Write an object unless one is there; returns whether it was written."""
    if exists(path):
        return False
    try:
        put(path, content, new=True)
    except FileExistsError:
        return False
    except ArtefactError:
        put(path, content)  # a store that cannot do this in one step, or none that can be written
    return True


def _read(path: "UPath") -> dict[str, Any]:
    try:
        found = json.loads(read_bytes(path))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _folder() -> Path:
    return cache_dir() / "locks"


def _lock_folder_id() -> str:
    """Identity of this machine's folder of locks: no other machine and no copy has it."""
    path = _folder() / "name"
    if not path.exists():
        write_bytes(path, uuid.uuid4().hex.encode())
    return f"{path.read_text()} on {socket.gethostname()}"
