"""What is written to disk: atomic files and folders, hashes, manifests.

An artefact is either whole or absent: everything goes to a temporary name beside its place, is
flushed to the disk and renamed.
"""

import errno
import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from saescope.errors import ArtefactError

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


def fsync_path(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically, indented, keys in the order given."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Read JSON; ArtefactError if the file is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError("no such file", where=str(path)) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtefactError(f"not valid JSON: {error}", where=str(path)) from error


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
    folder: str | Path, *, kind: str, schema: int, config: dict, parent: str | None, **more: Any
) -> dict:
    """Write `manifest.json`: what made this artefact, from what, with which versions."""
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
    write_json(Path(folder) / MANIFEST, manifest)
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


def read_manifest(folder: str | Path, *, kind: str, schema: int) -> dict:
    """Read and check `manifest.json`.

    Raises ArtefactError if it is missing, damaged, of another kind, or of a newer schema.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        raise ArtefactError(f"no {kind} here ({MANIFEST} is missing)", where=str(folder))
    manifest = read_json(path)
    found = manifest.get("kind") if isinstance(manifest, dict) else None
    if found != kind:
        raise ArtefactError("wrong kind of artefact", where=str(path), given=found, allowed=kind)
    check_schema(manifest.get("schema"), supported=schema, where=str(path))
    return manifest


@contextmanager
def disk_full(where: str) -> Iterator[None]:
    """Turn "no space left" into one clear error; what was committed before stays valid."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ArtefactError(
                "the disk is full; free some space and run the same command again: it goes on "
                "from what was committed",
                where=where,
            ) from error
        raise
