"""Paths of files and folders, on this machine or in an object store.

A local path is a `pathlib.Path`; a URL (s3://bucket/name, gs://..., memory://...) is a `UPath`,
which has the same methods for joining and splitting. What is in an object store is read and
written by the functions here alone, because an object store differs from a file system: it has no
folders, only objects whose names share a prefix; it writes an object whole or not at all; nothing
can be flushed, appended to, or renamed. Listings are never cached, since other processes write
there too.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from saescope.errors import ArtefactError, InputError

if TYPE_CHECKING:
    from upath import UPath

    AnyPath: TypeAlias = Path | UPath
else:
    AnyPath = Path  # UPath is imported where it is needed: it takes its time
Listing = Callable[[tuple[str, ...]], list[tuple[str, bool]]]
"""Lists a subfolder, given by the parts of its path: each entry's name, and if it is a folder."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]+)://")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_LOCAL = ("file", "local")
_GIVEN = "a folder, or a URL such as s3://bucket/name, gs://bucket/name"


def is_remote(path: "str | AnyPath") -> bool:
    """Whether this is in an object store, not in a file system of this machine.

    >>> is_remote("s3://bucket/name"), is_remote("data/name")
    (True, False)
    """
    if isinstance(path, str):
        scheme = _URL.match(path)
        return scheme is not None and scheme[1].lower() not in _LOCAL
    return not isinstance(path, Path)


def as_path(path: "str | AnyPath") -> AnyPath:
    """The path that a user gives as text: local, where ~ is the user's home, or a URL.

    Raises InputError for a URL of an unknown kind, or of one whose package is not installed.

    >>> as_path("data/name").name, as_path("memory://some/name").name
    ('name', 'name')
    """
    if not isinstance(path, str):
        return _at_home(path) if isinstance(path, Path) else path
    if not is_remote(path):
        scheme = _URL.match(path)
        return _at_home(Path(path[scheme.end() :] if scheme else path))
    from upath import UPath

    scheme = path.partition("://")[0].lower()
    try:
        if "::" in scheme:
            raise ValueError("one store in another")
        found = UPath(path.rstrip("/"), use_listings_cache=False)
        _ = found.fs  # imports what this kind of store needs
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        how = f'pip install "saescope[{extra}]"' if extra else str(error)
        raise InputError(f"needs a package that is not installed: {how}", where=path) from error
    except ValueError as error:
        raise InputError(
            "no such kind of storage", where=path, given=scheme, allowed=_GIVEN
        ) from error
    except Exception as error:
        raise _unreachable(path, error) from error
    return found


def _at_home(path: Path) -> Path:
    """The path with a leading ~ or ~user expanded; unchanged if there is no such user."""
    if not path.parts or not path.parts[0].startswith("~"):
        return path
    try:
        return path.expanduser()
    except RuntimeError:
        return path


@contextmanager
def _reaching(path: AnyPath) -> Iterator[None]:
    """Turn any failure to reach an object store into one ArtefactError.

    FileExistsError and FileNotFoundError are answers of the store, and stay.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError, MemoryError):
        raise
    except Exception as error:  # each kind of store has its own
        raise _unreachable(path, error) from error


def _unreachable(path: "str | AnyPath", error: Exception) -> ArtefactError:
    reason = str(error) or type(error).__name__
    return ArtefactError(f"cannot be reached: {reason}", where=str(path))


def below(path: AnyPath, folder: AnyPath) -> tuple[str, ...]:
    """The parts of a path relative to a folder it is in."""
    return tuple(path.parts[len(folder.parts) :])


def local(path: "str | AnyPath", why: str = "must be on this machine") -> Path:
    """A path that must be on this machine; `why` is what the error says otherwise.

    Raises InputError if it is in an object store.
    """
    found = as_path(path)
    if not isinstance(found, Path):
        raise InputError(why, where=str(found), given="an object store", allowed="a local folder")
    return found


def if_local(path: "str | AnyPath") -> Path | None:
    """The path on this machine; None for a URL."""
    if isinstance(path, str) and path.startswith("hf://"):
        return None
    found = as_path(path)
    return found if isinstance(found, Path) else None


def exists(path: AnyPath) -> bool:
    """Whether a file or an object is there, or a local folder."""
    if isinstance(path, Path):
        return path.exists()
    try:
        with _reaching(path):
            return path.fs.info(path.path)["type"] == "file"
    except FileNotFoundError:
        return False


def read_bytes(path: AnyPath, start: int | None = None, end: int | None = None) -> bytes:
    """Content of a file or an object, or its bytes from `start` to `end`.

    Raises OSError for a file, FileNotFoundError or ArtefactError for an object.
    """
    if isinstance(path, Path):
        return path.read_bytes()[start:end]
    with _reaching(path):
        return cast(bytes, path.fs.cat_file(path.path, start=start, end=end))


def put(path: "UPath", data: bytes, *, new: bool = False) -> None:
    """Write an object, whole or not at all.

    Raises FileExistsError if it is to be a new one and one is there; ArtefactError if the store
    does not take it.
    """
    try:
        with _reaching(path):
            path.fs.pipe_file(path.path, data, mode="create" if new else "overwrite")
    except FileNotFoundError as error:
        raise ArtefactError(f"cannot be written: {error}", where=str(path)) from error


def upload(file: Path, path: "UPath") -> None:
    """Write a file of this machine as an object, whole or not at all, and piece by piece.

    Raises ArtefactError if the store does not take it.
    """
    try:
        with _reaching(path):
            path.fs.put_file(str(file), path.path)
    except FileNotFoundError as error:
        raise ArtefactError(f"cannot be written: {error}", where=str(path)) from error


def download(path: "UPath", file: Path) -> None:
    """Write an object as a file of this machine, whose folder is made if it is not there.

    Raises FileNotFoundError if there is no such object, ArtefactError if it cannot be read.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with _reaching(path):
        path.fs.get_file(path.path, str(file))


def copy(path: "UPath", to: "UPath") -> None:
    """Write an object under another name in the same store, over one that is there."""
    with _reaching(path):
        path.fs.cp_file(path.path, to.path)


def objects(folder: "UPath") -> "list[UPath]":
    """All objects whose names begin with that of a folder; none where there is no such folder."""
    try:
        with _reaching(folder):
            found = folder.fs.find(folder.path)
    except FileNotFoundError:
        return []
    first = len(folder.path.rstrip("/")) + 1
    names = [name[first:] for name in sorted(found)]
    return [folder.joinpath(*name.split("/")) for name in names if name]


def file_sizes(folder: AnyPath) -> dict[str, int]:
    """The size of each file in a folder, at any depth, by its path there with `/`; one listing.

    Raises OSError for a folder of this machine, ArtefactError for an object store.
    """
    if isinstance(folder, Path):
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {"/".join(below(path, folder)): path.stat().st_size for path in files}
    try:
        with _reaching(folder):
            found: Any = folder.fs.find(folder.path, detail=True)
    except FileNotFoundError:
        return {}
    first = len(folder.path.rstrip("/")) + 1
    return {name[first:]: int(facts["size"]) for name, facts in found.items() if name[first:]}


def subfolders(folder: "UPath") -> "list[UPath]":
    """The folders right in a folder of an object store, sorted; none where there is no such."""
    try:
        with _reaching(folder):
            found: Any = folder.fs.ls(folder.path, detail=True)
    except FileNotFoundError:
        return []
    names = [str(each["name"]).rstrip("/") for each in found if each["type"] == "directory"]
    return [folder / name.rpartition("/")[2] for name in sorted(names)]


def object_version(path: "UPath") -> tuple[str, int]:
    """What changes when an object is written anew, as its store says, and its size.

    Raises FileNotFoundError if there is none, ArtefactError if the store cannot be reached.
    """
    with _reaching(path):
        facts: Any = path.fs.info(path.path)
    said = [str(facts.get(key)) for key in ("ETag", "etag", "LastModified", "mtime", "created")]
    return " ".join(said), int(facts["size"])


def occupied(folder: AnyPath) -> bool:
    """Whether anything is there: a file, a folder (even an empty one), or objects."""
    return exists(folder) or (not isinstance(folder, Path) and bool(objects(folder)))


def remove(path: AnyPath) -> None:
    """Remove a file, an object or a folder if it is there."""
    if not isinstance(path, Path):
        for each in [path] if exists(path) else objects(path):
            with _reaching(each):
                each.fs.rm_file(each.path)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def move(path: AnyPath, to: AnyPath) -> None:
    """Give a file, an object or a folder another path in the same file system or store."""
    if isinstance(path, Path) or isinstance(to, Path):
        to.parent.mkdir(parents=True, exist_ok=True)
        local(path).rename(local(to))
        return
    for each in [path] if exists(path) else objects(path):
        target = to.joinpath(*below(each, path))
        with _reaching(each):
            each.fs.cp_file(each.path, target.path)
            each.fs.rm_file(each.path)


def cut(path: AnyPath, size: int, more: bytes = b"") -> None:
    """Truncate a file or an object to `size` bytes and append `more`.

    A file is flushed to the disk, and made if it is not there; an object is written anew.
    """
    if not isinstance(path, Path):
        put(path, (read_bytes(path, 0, size) if size else b"") + more)
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with os.fdopen(descriptor, "r+b") as stream:
        stream.truncate(size)
        stream.seek(size)
        stream.write(more)
        stream.flush()
        os.fsync(stream.fileno())


def listing(folder: AnyPath) -> Listing:
    """A function that lists a folder and those in it; of an object store, as it is now."""
    if isinstance(folder, Path):

        def of_folder(parts: tuple[str, ...]) -> list[tuple[str, bool]]:
            found = folder.joinpath(*parts).iterdir()
            return sorted((p.name, p.is_dir() and not p.is_symlink()) for p in found)

        return of_folder
    tree: dict[tuple[str, bool], Any] = {}
    for path in objects(folder):
        *above, name = below(path, folder)
        inside = tree
        for part in above:
            inside = inside.setdefault((part, True), {})
        inside[name, False] = {}

    def of_objects(parts: tuple[str, ...]) -> list[tuple[str, bool]]:
        inside = tree
        for part in parts:
            inside = inside[part, True]
        return sorted(inside)

    return of_objects
