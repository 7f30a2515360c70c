"""What may be replaced: only an artefact of ours of the same kind, and only if that is asked for.

Anything else at a path is never replaced or removed, even if it came there meanwhile.
"""

import filecmp
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from saescope.errors import InputError, SaescopeError
from saescope.exchange import exchange, rename_new
from saescope.leftovers import REPLACED
from saescope.paths import AnyPath, occupied

_NOBODYS = {".DS_Store", "Thumbs.db", "desktop.ini"}
"""what file managers put into folders"""


@dataclass(frozen=True)
class Kind:
    """A kind of artefacts, and how one is recognised."""

    name: str
    """as in "holds something else than NAME": "an SAE", "a feature store" """
    test: Callable[[Any], bool]
    """whether a path, which is there and is no symbolic link, is one; it may raise errors of ours
    or the system's for what is none"""

    def holds(self, path: AnyPath) -> bool:
        """Whether an artefact of this kind is at a path; of files also in an object store."""
        try:
            return not _is_link(path) and self.test(path)
        except (SaescopeError, OSError):
            return False


PLAIN_FILE = Kind("a file", Path.is_file)


def only_files(folder: Path, names: Collection[str], others: Collection[str] = ()) -> bool:
    """Whether a folder has these plain files, maybe some of `others`, and nothing else.

    A name may be a pattern (`W_enc_*.safetensors`), of which there is at least one file.
    """
    if not folder.is_dir():
        return False
    found = {path.name for path in folder.iterdir() if path.name not in _NOBODYS}
    plain = all((folder / n).is_file() and not (folder / n).is_symlink() for n in found)
    known = all(any(fnmatchcase(n, each) for each in (*names, *others)) for n in found)
    return plain and known and all(any(fnmatchcase(n, each) for n in found) for each in names)


def check_replaceable(path: AnyPath, kind: Kind | None, *, replace: bool) -> None:
    """Raise InputError unless nothing is there, an empty folder, or what may be replaced."""
    if _is_free(path) if isinstance(path, Path) else not occupied(path):
        return
    where = str(path)
    if _is_link(path):
        raise InputError(
            "is a symbolic link, which is not replaced; give what it leads to, or another name",
            where=where,
        )
    if kind is None or not kind.holds(path):
        what = f"something else than {kind.name} of ours" if kind else "something"
        raise InputError(f"holds {what}, which is never replaced; choose another name", where=where)
    if not replace:
        raise InputError(
            f"holds {kind.name} already; --replace puts the new one in its place", where=where
        )


def check_apart(target: Path, *sources: Path | None) -> None:
    """Raise InputError if the target would be inside of a source, or a source inside of it.

    A source that is not on this machine is given as None.
    """
    for source in filter(None, sources):
        chains = [[_identity(p) for p in (each, *each.parents)] for each in _real(target, source)]
        for one, other in (chains, chains[::-1]):
            if one[0] in other:
                raise InputError(
                    "what is written may not lie in what is read, nor the reverse; choose another "
                    "name",
                    where=str(target),
                    given=str(source),
                )


def put_in_place(temporary: Path, target: Path, kind: Kind | None, *, replace: bool) -> None:
    """Move `temporary` to `target`; what was there is then in the folder of `temporary`.

    If it has the same bytes, it is left as it is. At every instant the old or the new artefact is
    there, whole; where the file system cannot exchange paths, `saescope.leftovers.settle` puts the
    old one back after a kill. Raises InputError, and changes nothing, if what is at `target` may
    not be replaced.
    """
    check_replaceable(target, kind, replace=True)
    if not _is_free(target) and same_content(temporary, target):
        return
    check_replaceable(target, kind, replace=replace)
    if kind is None or _is_free(target):
        try:
            rename_new(temporary, target)
        except OSError:
            check_replaceable(target, kind, replace=False)  # something came meanwhile
            raise
    elif exchange(temporary, target):
        if not kind.holds(temporary):
            exchange(temporary, target)
            check_replaceable(target, kind, replace=False)
    elif target.is_dir():
        _replace_in_two_steps(temporary, target)
    else:
        temporary.replace(target)


def _replace_in_two_steps(temporary: Path, target: Path) -> None:
    aside = temporary.with_name(REPLACED)
    try:
        target.rename(aside)
        temporary.rename(target)
    except BaseException:
        if aside.exists() and not os.path.lexists(target):
            aside.rename(target)
        raise
    aside.rename(temporary)  # from now on it need not be put back


def same_content(one: Path, other: Path) -> bool:
    """Whether two files, or folders, hold the same bytes under the same names."""
    if one.is_dir() and other.is_dir():
        names = sorted(path.name for path in one.iterdir())
        if names != sorted(path.name for path in other.iterdir()):
            return False
        return all(same_content(one / name, other / name) for name in names)
    return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)


def _is_link(path: AnyPath) -> bool:
    return isinstance(path, Path) and path.is_symlink()


def _is_free(path: Path) -> bool:
    """Whether nothing is at a path, or an empty folder."""
    if not os.path.lexists(path):
        return True
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _real(*paths: Path) -> list[Path]:
    return [Path(os.path.realpath(path)) for path in paths]


def _identity(path: Path) -> object:
    """The same for all paths of one file or folder; the path itself if nothing is there."""
    try:
        found = path.stat()
    except OSError:
        return path
    return found.st_dev, found.st_ino
