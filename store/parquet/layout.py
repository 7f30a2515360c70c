"""Which files a feature store in Parquet has, and what its manifest says of them.

A folder, or a prefix of an object store, holds `manifest.json` and, for each table of schema.sql, a
folder of Parquet files: TABLE/NNNNNN-TOKEN.parquet. The token is of one writing, so that a store
that is written again never changes a file that somebody reads. The manifest is written last: a
store without one is not there.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saescope.artefact import MANIFEST, DamagedError, read_json, read_manifest
from saescope.errors import ArtefactError
from saescope.paths import AnyPath
from saescope.seals import FileSeal

KIND = "feature store in Parquet"
SCHEMA = 1
_FILE = re.compile(r"([a-z_]{1,63})/[0-9]{6}-[0-9a-f]{8}\.parquet")
_MOST = 2**62


@dataclass(frozen=True)
class TableFile:
    """A file of a table: `name` below the store's folder, its rows, and its seal."""

    name: str
    rows: int
    seal: FileSeal

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return int(self.seal["bytes"])


def file_name(table: str, number: int, token: str) -> str:
    """Name of a table's file below the store's folder.

    >>> file_name("feature", 3, "0123abcd")
    'feature/000003-0123abcd.parquet'
    """
    return f"{table}/{number:06d}-{token}.parquet"


def is_table_file(name: str) -> bool:
    """Whether a file of a store in Parquet may have this name, below the store's folder."""
    return bool(_FILE.fullmatch(name))


def is_parquet_store(folder: AnyPath) -> bool:
    """Whether the manifest in a folder says that it is a store in Parquet; no more is read."""
    try:
        found = read_json(folder / MANIFEST)
    except ArtefactError:
        return False
    return isinstance(found, dict) and found.get("kind") == KIND


def read_layout(folder: AnyPath) -> dict[str, tuple[TableFile, ...]]:
    """The files of each table, in the order of their rows.

    Raises ArtefactError if there is no such store, DamagedError if its manifest is damaged.
    """
    manifest = read_manifest(folder, kind=KIND, schema=SCHEMA, sealed_since=1)
    tables, where = manifest.get("tables"), str(folder / MANIFEST)
    if not isinstance(tables, dict) or not tables:
        raise DamagedError("it lists no tables", where=where)
    return {table: _files(table, described, where) for table, described in tables.items()}


def _files(table: str, described: Any, where: str) -> tuple[TableFile, ...]:
    listed = described.get("files") if isinstance(described, dict) else None
    files = listed if isinstance(listed, list) else []
    found = [_file(table, each) for each in files if isinstance(each, dict)]
    whole = tuple(each for each in found if each is not None)
    if not files or len(whole) != len(files):
        raise DamagedError("it does not list a table's files", where=where)
    return whole


def _file(table: str, described: Mapping[str, Any]) -> TableFile | None:
    name, rows = described.get("name"), described.get("rows")
    size, crc = described.get("bytes"), described.get("crc32c")
    match = _FILE.fullmatch(name) if isinstance(name, str) else None
    numbers = all(type(each) is int and 0 <= each < _MOST for each in (rows, size))
    if match is None or match[1] != table or not numbers or not isinstance(crc, str):
        return None
    assert isinstance(name, str)
    assert isinstance(rows, int)
    return TableFile(name, rows, {"bytes": size, "crc32c": crc})
