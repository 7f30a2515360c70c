"""What is written to disk: atomic files and folders, hashes, manifests.

An artefact is either whole or absent: everything goes to a temporary name beside its place, is
flushed to the disk and renamed; an object of an object store is put there at once.
"""

import errno
import hashlib
import json
import os
import platform
import re
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from saescope.errors import ArtefactError
from saescope.places import Place, exists, place, put, read_bytes, remove

MANIFEST = "manifest.json"
_RECORDED_LIBRARIES = (
    "saescope",
    "torch",
    "transformers",
    "transformer-lens",
    "zarr",
    "duckdb",
    "numpy",
    "safetensors",
)
_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}")
"""Names of the folders in which `atomic_path` prepares what it writes."""
_FULL = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "a file may not grow further (see ulimit -f); raise the limit",
}


class DamagedError(ArtefactError):
    """A file is missing, or is not what was written; `kind` says in a word in which way."""

    def __init__(self, what: str, *, where: str, kind: str = "damaged") -> None:
        super().__init__(what, where=where)
        self.what, self.where, self.kind = what, where, kind


def fsync_path(path: Place) -> None:
    """Flush a file, or a folder's entries, to the disk; an object is stored once it is written."""
    if not isinstance(path, Path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure it goes.

    Works for files and for folders; the contents are flushed to the disk before the rename.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    temporary = holder / target.name
    try:
        yield temporary
        members = [p for p in temporary.rglob("*") if p.is_file()] if temporary.is_dir() else []
        for member in [*members, temporary]:
            fsync_path(member)
        if temporary.is_dir() and target.exists():
            # rename(2) cannot replace a folder that has entries: move the old one aside first
            os.replace(target, holder / "replaced")
        os.replace(temporary, target)
        fsync_path(target.parent)
    finally:
        remove(holder)


@contextmanager
def new_folder(path: Place, last: str) -> Iterator[Path]:
    """Yield an empty local folder to fill; on success it appears at `path`, on failure it goes.

    In an object store its files appear one after another, the one with the name `last` behind all
    others: without that one there is nothing yet.
    """
    if isinstance(path, Path):
        with atomic_path(path) as temporary:
            temporary.mkdir()
            yield temporary
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        files = [file for file in sorted(Path(folder).rglob("*")) if file.is_file()]
        for file in sorted(files, key=lambda file: file == Path(folder, last)):
            put(path.joinpath(*file.relative_to(folder).parts), file.read_bytes())


def is_leftover(path: Place) -> bool:
    """Whether this is a folder that `atomic_path` left behind when its process was killed."""
    if (
        not isinstance(path, Path)
        or not _TEMPORARY.fullmatch(path.name)
        or path.is_symlink()
        or not path.is_dir()
    ):
        return False
    target = path.name[1:-9]
    try:
        # one with "replaced" in it may hold the only copy of what was to be replaced
        return all(member.name == target for member in path.iterdir())
    except FileNotFoundError:
        return True  # its process has just ended its work


def remove_leftovers(path: Place) -> None:
    """Remove what `atomic_path` left beside a path when its process was killed."""
    for found in path.parent.iterdir() if isinstance(path, Path) else ():
        if found.name.startswith(f".{path.name}.") and is_leftover(found):
            remove(found)


def write_bytes(path: str | Place, data: bytes) -> None:
    """Write a whole file atomically."""
    target = place(path)
    if not isinstance(target, Path):
        put(target, data)
        return
    with atomic_path(target) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | Place, value: Any) -> None:
    """Write JSON atomically, indented, keys in the order given."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def read_json(path: str | Place) -> Any:
    """Read JSON; ArtefactError if the file is missing or not JSON."""
    try:
        return json.loads(read_bytes(place(path)).decode())
    except FileNotFoundError:
        raise ArtefactError("no such file", where=str(path)) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedError(f"not valid JSON: {error}", where=str(path)) from error


def sha256_file(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex digest of a JSON-able value, independent of the order of keys.

    >>> sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide results, where installed."""
    found = {"python": platform.python_version()}
    for name in _RECORDED_LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the source tree saescope runs from, "+changes" if edited; None outside git."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+changes"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def write_manifest(
    folder: str | Place,
    *,
    kind: str,
    schema: int,
    config: dict,
    parent: str | None,
    sealed: bool = False,
    **more: Any,
) -> dict:
    """Write `manifest.json`: what made this artefact, from what, with which versions.

    A sealed one carries its own sha256, so that damage to it is noticed.
    """
    manifest = {
        "kind": kind,
        "schema": schema,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config,
        "parent": parent,
        "versions": library_versions(),
        "commit": git_commit(),
        **more,
    }
    if sealed:
        manifest["sha256"] = sha256_json(manifest)
    write_json(place(folder) / MANIFEST, manifest)
    return manifest


def check_schema(found: object, *, supported: int, where: str) -> None:
    """Raise ArtefactError if an artefact's schema version is not one this saescope reads."""
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ArtefactError("has no valid schema version", where=where, given=found)
    if found > supported:
        raise ArtefactError(
            f"was written by a newer saescope (schema {found}, this one reads up to {supported}); "
            "update saescope",
            where=where,
        )


def read_manifest(
    folder: str | Place, *, kind: str, schema: int, sealed_since: int | None = None
) -> dict:
    """Read and check `manifest.json`, which is sealed from schema `sealed_since` on.

    Raises ArtefactError if it is missing, damaged, of another kind, or of a newer schema.
    """
    path = place(folder) / MANIFEST
    if not exists(path):
        raise ArtefactError(f"no {kind} here ({MANIFEST} is missing)", where=str(folder))
    manifest = read_json(path)
    found = manifest.get("kind") if isinstance(manifest, dict) else None
    if found != kind:
        raise ArtefactError("wrong kind of artefact", where=str(path), given=found, allowed=kind)
    check_schema(manifest.get("schema"), supported=schema, where=str(path))
    unsealed = {name: value for name, value in manifest.items() if name != "sha256"}
    must_be_sealed = sealed_since is not None and manifest["schema"] >= sealed_since
    if (must_be_sealed or "sha256" in manifest) and manifest.get("sha256") != sha256_json(unsealed):
        raise DamagedError("its content does not match its own sha256", where=str(path))
    return manifest


@contextmanager
def disk_full(where: str) -> Iterator[None]:
    """Turn "no space left" into one clear error; what was committed before stays valid."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ArtefactError(
                f"{_FULL[error.errno]} and run the same command again: it goes on from what was "
                "committed",
                where=where,
            ) from error
        raise


@contextmanager
def locked(path: str | Place, work: str) -> Iterator[None]:
    """Keep other processes from writing this artefact; the operating system lets go of the lock.

    The lock is on `.NAME.lock` beside the artefact, and ends with the process that holds it however
    that ends. `work` says what is being done, for the message that others get. For an artefact in
    an object store see `saescope.remote_lock`.

    Raises ArtefactError at once if another process, or another part of this one, is at work there.
    """
    artefact = place(path)
    if isinstance(artefact, Path):
        artefact = artefact.absolute()
        file, beyond = artefact.parent / f".{artefact.name}.lock", nullcontext()
    else:
        from saescope.remote_lock import lock_file, lock_object

        file, beyond = lock_file(artefact), lock_object(artefact, work)
    with _locked_file(file, work, where=str(path)), beyond:
        yield


def holder_of_lock(work: str) -> str:
    """What a lock says of the process that holds it."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return f"{work}, process {os.getpid()} on {socket.gethostname()}, since {now}"


@contextmanager
def _locked_file(file: Path, work: str, *, where: str) -> Iterator[None]:
    import fcntl

    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with disk_full(where):
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
            os.write(descriptor, holder_of_lock(work).encode())
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
