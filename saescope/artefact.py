"""Writing files and folders atomically; hashes; manifests.

An artefact is either whole or absent: it is written under a temporary name beside its path, flushed
to the disk, and then renamed to its path, or exchanged with what was there. An object store writes
an object whole by itself.
"""

import hashlib
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from saescope.errors import ArtefactError
from saescope.leftovers import preparing, remove_leftovers, settle
from saescope.paths import AnyPath, as_path, exists, put, read_bytes
from saescope.replacing import Kind, check_replaceable, put_in_place
from saescope.system import read_whole, system_errors

MANIFEST = "manifest.json"
SEAL = "sha256"
"""what a JSON object calls the sha256 of all else that it says"""
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
_LARGEST_JSON = 256 << 20


class DamagedError(ArtefactError):
    """A file is missing or is not what was written; `kind` is missing, truncated or damaged."""

    def __init__(self, what: str, *, where: str, kind: str = "damaged") -> None:
        super().__init__(what, where=where)
        self.what, self.where, self.kind = what, where, kind


def fsync_path(path: AnyPath) -> None:
    """Flush a file, or a folder's entries, to the disk; an object is stored once it is written."""
    if not isinstance(path, Path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(
    path: str | Path, kind: Kind | None = None, *, replace: bool = False
) -> Iterator[Path]:
    """Yield a temporary path; it is moved to `path` on success, and removed on failure.

    Works for files and for folders; the contents are flushed to the disk before the move. What is
    at `path` already is replaced, in one step, only with `replace` and if it is of this kind; if it
    has the same bytes, it is left as it is. Temporary folders that killed processes left beside
    `path` are removed.

    Raises InputError if anything else is at `path`, even if it came there meanwhile.
    """
    target = Path(path)
    remove_leftovers(target)
    check_replaceable(target, kind, replace=True)
    with parents_of(target), preparing(target) as holder:
        temporary = holder / target.name
        yield temporary
        members = [p for p in temporary.rglob("*") if p.is_file()] if temporary.is_dir() else []
        for member in [*members, temporary]:
            fsync_path(member)
        put_in_place(temporary, target, kind, replace=replace)
        fsync_path(target.parent)


@contextmanager
def parents_of(path: Path) -> Iterator[None]:
    """Make the parent folders of a path; those that were made are removed if the block fails."""
    made = [each for each in path.parents if not each.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # something else is in it now
            for each in made:
                each.rmdir()
        raise


@contextmanager
def new_folder(path: AnyPath, last: str) -> Iterator[Path]:
    """Yield an empty local folder; it is moved to `path` on success, and removed on failure.

    To an object store its files are copied one after another, the file named `last` at the end: an
    artefact is there only once that file is.
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


def write_bytes(path: str | AnyPath, data: bytes) -> None:
    """Write a whole file atomically, over one that is there.

    For files inside an artefact of ours; use `atomic_path` for a file that a user names.
    """
    target = as_path(path)
    if not isinstance(target, Path):
        put(target, data)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with preparing(target) as holder:
        temporary = holder / target.name
        temporary.write_bytes(data)
        fsync_path(temporary)
        temporary.replace(target)
        fsync_path(target.parent)


def write_json(path: str | AnyPath, value: Any) -> None:
    """Write JSON atomically, indented, keys in the order given."""
    write_bytes(path, _as_json(value))


def _as_json(value: Any) -> bytes:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def write_report(path: str | AnyPath, value: Any, kind: Kind, *, replace: bool = False) -> None:
    """Write JSON to a file or object that a user names.

    `kind` and `replace` are those of `atomic_path`. Raises InputError for anything else that is
    there, ArtefactError if it cannot be written.
    """
    target, data = as_path(path), _as_json(value)
    if isinstance(target, Path):
        with system_errors(path), atomic_path(target, kind, replace=replace) as temporary:
            temporary.write_bytes(data)
    elif not (exists(target) and read_bytes(target) == data):
        check_replaceable(target, kind, replace=replace)
        put(target, data)


def append_bytes(path: Path, data: bytes) -> None:
    """Append all of `data` to a file, or nothing; the file is created if it is not there.

    Raises OSError, the file being as it was before.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        try:
            left = memoryview(data)
            while left:  # a write may be cut short, by a full disk for one
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def read_json(path: str | AnyPath, *, largest: int = _LARGEST_JSON) -> Any:
    """Read JSON; ArtefactError if the file is missing, cannot be read, or is not JSON.

    NaN, Infinity, more than `largest` bytes, deep nesting and huge integers are errors too.
    """
    where = str(path)
    at = as_path(path)
    if isinstance(at, Path):
        settle(at.parent)
    try:
        text = read_whole(at, largest=largest)
    except FileNotFoundError:
        raise ArtefactError("no such file", where=where) from None
    return parse_json(text, where=where)


def parse_json(text: bytes | str, *, where: str) -> Any:
    """JSON's value; DamagedError if it is not JSON, or more than Python can take."""
    try:
        decoded = text.decode() if isinstance(text, bytes) else text
        return json.loads(decoded, parse_constant=_refuse)
    except RecursionError:
        raise DamagedError("not valid JSON: nested too deeply", where=where) from None
    except ValueError as error:  # of JSON, UTF-8, or an integer of thousands of digits
        raise DamagedError(f"not valid JSON: {error}", where=where) from error


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


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
    folder: str | AnyPath,
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
        manifest[SEAL] = sha256_json(manifest)
    write_json(as_path(folder) / MANIFEST, manifest)
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
    folder: str | AnyPath, *, kind: str, schema: int, sealed_since: int | None = None
) -> dict:
    """Read and check `manifest.json`, which is sealed from schema `sealed_since` on.

    Raises ArtefactError if it is missing, damaged, of another kind, or of a newer schema.
    """
    path = as_path(folder) / MANIFEST
    if not exists(path):
        raise ArtefactError(f"no {kind} here ({MANIFEST} is missing)", where=str(folder))
    manifest = read_json(path)
    found = manifest.get("kind") if isinstance(manifest, dict) else None
    if found != kind:
        raise ArtefactError("wrong kind of artefact", where=str(path), given=found, allowed=kind)
    check_schema(manifest.get("schema"), supported=schema, where=str(path))
    must_be_sealed = sealed_since is not None and manifest["schema"] >= sealed_since
    check_seal(manifest, must=must_be_sealed, where=str(path))
    return manifest


def check_seal(found: Mapping[str, Any], *, must: bool, where: str) -> None:
    """Raise DamagedError unless a JSON object matches the sha256 that it carries.

    Args: must says that it has to carry one; older artefacts have none.
    """
    if not must and SEAL not in found:
        return
    try:
        own = sha256_json({name: value for name, value in found.items() if name != SEAL})
    except (ValueError, RecursionError):  # it holds a NaN, or is nested without end
        own = None
    if own is None or found.get(SEAL) != own:
        raise DamagedError("its content does not match its own sha256", where=where)
