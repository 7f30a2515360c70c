"""Temporary folders in which artefacts are written, and those that killed processes left behind.

An artefact NAME is written in a folder `.NAME.xxxxxxxx.partial` beside it. The process that writes
holds a lock on that folder, which ends with the process; a folder without a lock is a leftover.
"""

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from saescope.exchange import rename_new
from saescope.paths import AnyPath, remove

REPLACED = "replaced"
"""in it, what was at NAME before, where the file system cannot exchange two paths in one step"""
SCRATCH = "scratch"
"""in it, working files that are no part of the artefact"""
_HOLDER = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}(?:\.partial)?")
_BUILDING = re.compile(r"\.building-[a-z0-9_]{8}")
_BUILT_IN = {"staging", "staging.wal", "spill"}
"""of older versions' stores"""


@contextmanager
def preparing(target: Path) -> Iterator[Path]:
    """Yield a new locked folder beside a path, to write an artefact in; removed at the end."""
    made, descriptor = _made(target)
    while descriptor is None:  # somebody took it for a leftover just now
        made, descriptor = _made(target)
    try:
        yield made
    finally:
        try:
            with suppress(OSError):  # then it is a leftover
                try:
                    remove(made)
                except KeyboardInterrupt:  # what is half removed goes before the process does
                    remove(made)
                    raise
        finally:
            os.close(descriptor)


def _made(target: Path) -> tuple[Path, int | None]:
    folder = tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    return Path(folder), _locked(Path(folder), surely=False)


def is_leftover(path: AnyPath) -> bool:
    """Whether this is such a folder whose process was killed.

    False if a process holds a lock on it, if anything unknown is in it, or if it has the only copy
    of what was to be replaced (see `settle`).
    """
    return isinstance(path, Path) and _is_ours(path) and not _in_use(path)


def leftovers(folder: Path) -> Iterator[Path]:
    """All leftovers for a folder: those beside it, and those in it, however deep."""
    if folder.parent.is_dir():
        yield from (found for found in _holders(folder) if is_leftover(found))
    for above, names, _ in os.walk(folder):
        for name in sorted(names):
            if name.startswith(".") and is_leftover(found := Path(above, name)):
                yield found
                names.remove(name)


def remove_leftovers(path: AnyPath) -> None:
    """Remove the leftovers of a path."""
    if not isinstance(path, Path) or not path.parent.is_dir():
        return
    settle(path)
    for found in _holders(path):
        remove_leftover(found)


def remove_leftover(path: Path) -> bool:
    """Remove a leftover; returns False, and removes nothing, if it is none (any more)."""
    if not _is_ours(path) or (descriptor := _locked(path, surely=True)) is None:
        return False
    try:
        remove(path)
    finally:
        os.close(descriptor)
    return True


def settle(path: Path) -> None:
    """Put back what a killed process had moved aside to replace it.

    Only needed where the file system cannot exchange two paths in one step.
    """
    if os.path.lexists(path) or not path.parent.is_dir():
        return
    for holder in _holders(path):
        aside = holder / REPLACED
        if _is_folder(aside) and not _in_use(holder):
            with suppress(FileExistsError, FileNotFoundError):  # another process was faster
                rename_new(aside, path)
            return


def _holders(path: Path) -> list[Path]:
    """The temporary folders of a path."""
    beginning = f".{path.name}."
    found = (p for p in path.parent.iterdir() if p.name.startswith(beginning))
    return sorted(p for p in found if _prepared(p.name) == path.name and _is_folder(p))


def _prepared(name: str) -> str | None:
    """The artefact's name, from the name of a temporary folder; None for any other name."""
    found = _HOLDER.fullmatch(name)
    return found["name"] if found else None


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_ours(path: Path) -> bool:
    """Whether a folder has the name and the contents of a temporary folder."""
    target, building = _prepared(path.name), _BUILDING.fullmatch(path.name)
    if not (target or building) or not _is_folder(path):
        return False
    try:
        inside = {member.name for member in path.iterdir()}
    except FileNotFoundError:
        return True  # its process has just ended its work
    except PermissionError:
        return False
    if building or target is None:
        return inside <= _BUILT_IN
    if REPLACED in inside and not os.path.lexists(path.with_name(target)):
        return False
    known = {target, f"{target}.wal", REPLACED, SCRATCH}  # .wal: a database's
    return all(name in known or _prepared(name) == target for name in inside)


def _in_use(folder: Path) -> bool:
    descriptor = _locked(folder, surely=True)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None


def _locked(folder: Path, *, surely: bool) -> int | None:
    """Descriptor of a folder, locked; None if another process has the lock, or it is gone.

    Where a file system has no locks, the folder is opened without one, but with `surely` the
    answer is None: so nothing there is ever taken for a leftover.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except (FileNotFoundError, PermissionError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = os.path.samestat(os.fstat(descriptor), folder.stat())
    except (BlockingIOError, FileNotFoundError):
        ours = False
    except OSError:
        ours = not surely
    if ours:
        return descriptor
    os.close(descriptor)
    return None
