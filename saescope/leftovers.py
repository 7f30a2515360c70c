"""The folders in which artefacts are prepared, and what is left of them when a process is killed.

What is to be at NAME is prepared in `.NAME.xxxxxxxx.partial` beside it, on which its process has a
lock that ends with it. One that nobody has a lock on is a leftover.
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
"""what was at NAME, moved aside where two names cannot be exchanged in one step"""
SCRATCH = "scratch"
"""where whoever prepares an artefact may put what is not of it"""
_HOLDER = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}(?:\.partial)?")
_BUILDING = re.compile(r"\.building-[a-z0-9_]{8}")
_BUILT_IN = {"staging", "staging.wal", "spill"}
"""of older versions' stores"""


@contextmanager
def preparing(target: Path) -> Iterator[Path]:
    """A new folder beside a path, to prepare in it what is to be there; it goes at the end."""
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
    """Whether this is a folder that a process was preparing something in when it was killed.

    Not one that another process has a lock on, one with anything unknown in it, or with the only
    copy of what was to be replaced (see `settle`).
    """
    return isinstance(path, Path) and _is_ours(path) and not _in_use(path)


def leftovers(folder: Path) -> Iterator[Path]:
    """All leftovers beside a folder, made for it, and in it, however deep."""
    if folder.parent.is_dir():
        yield from (found for found in _holders(folder) if is_leftover(found))
    for above, names, _ in os.walk(folder):
        for name in sorted(names):
            if name.startswith(".") and is_leftover(found := Path(above, name)):
                yield found
                names.remove(name)


def remove_leftovers(path: AnyPath) -> None:
    """Remove what was left beside a path when processes that wrote it were killed."""
    if not isinstance(path, Path) or not path.parent.is_dir():
        return
    settle(path)
    for found in _holders(path):
        remove_leftover(found)


def remove_leftover(path: Path) -> bool:
    """Remove a leftover; False, and nothing is removed, if it is none, or none any more."""
    if not _is_ours(path) or (descriptor := _locked(path, surely=True)) is None:
        return False
    try:
        remove(path)
    finally:
        os.close(descriptor)
    return True


def settle(path: Path) -> None:
    """Put back what was at a path when its process was killed between moving it aside and ending.

    That can be only where the file system cannot exchange two names.
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
    """Folders beside a path that were made to prepare it in."""
    beginning = f".{path.name}."
    found = (p for p in path.parent.iterdir() if p.name.startswith(beginning))
    return sorted(p for p in found if _prepared(p.name) == path.name and _is_folder(p))


def _prepared(name: str) -> str | None:
    """The name of what is prepared in a folder of this name."""
    found = _HOLDER.fullmatch(name)
    return found["name"] if found else None


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_ours(path: Path) -> bool:
    """Whether a folder has the name, and the content, of one that something is prepared in."""
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
    """A folder, opened and locked; None if another process has it, or if it is no longer there.

    Where a file system has no locks, it is given without one unless it must be `surely` locked: so
    nothing there is ever taken for a leftover.
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
