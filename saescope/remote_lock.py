"""Locks of artefacts in an object store, which cannot lock anything itself.

While somebody writes, an object `.NAME.lock` lies beside the artefact and names them. It is made
only where there is none, in one step if the store can do that. It would outlive a process that is
killed; so the same process also holds a local lock, which it cannot outlive: whoever gets that one
knows of an object made on this machine that its maker is gone. Of one made on another machine
nothing is known, and people are told how to decide.
"""

import hashlib
import json
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saescope.artefact import holder_of_lock, write_bytes
from saescope.assets import cache_dir
from saescope.errors import ArtefactError, InputError
from saescope.places import exists, put, read_bytes, remove

if TYPE_CHECKING:
    from upath import UPath


def lock_file(artefact: "UPath") -> Path:
    """The file of this machine on which whoever writes an artefact has a lock.

    Raises InputError for a whole bucket, beside which nothing can lie.
    """
    if not artefact.name:
        raise InputError(
            "is all of a bucket; give a folder in it", where=str(artefact),
            allowed=f"{artefact}name",
        )  # fmt: skip
    named = f"{type(artefact.fs).__name__}:{artefact.path}"
    return _folder() / f"{hashlib.sha256(named.encode()).hexdigest()[:32]}.lock"


@contextmanager
def lock_object(artefact: "UPath", work: str) -> Iterator[None]:
    """Keep others from writing an artefact, for one who holds its `lock_file`.

    Raises ArtefactError if a process on another machine is at work there, or may be.
    """
    path = artefact.with_name(f".{artefact.name}.lock")
    mine = json.dumps({"holder": holder_of_lock(work), "locks": _locks()}).encode()
    while not _created(path, mine):
        with suppress(FileNotFoundError):  # who held it has just ended
            there = _read(path)
            if there.get("locks") != _locks():
                raise ArtefactError(
                    f"in use by {there.get('holder', 'another process')}; wait until it has ended, "
                    f"or choose another place. If it is certain that it has: remove {path}",
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
    """Write an object unless one is there; whether it was written."""
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


def _locks() -> str:
    """What tells the folder of this machine's locks from those of others, and copies of it."""
    path = _folder() / "name"
    if not path.exists():
        write_bytes(path, uuid.uuid4().hex.encode())
    return f"{path.read_text()} on {socket.gethostname()}"
