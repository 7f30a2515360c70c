"""Writing a whole store as a folder of Parquet files, here or in an object store."""

import dataclasses
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saescope.artefact import MANIFEST, atomic_path, read_manifest, write_manifest
from saescope.errors import InputError
from saescope.locks import locked
from saescope.paths import AnyPath, exists, file_sizes, remove, upload
from saescope.progress import Progress
from saescope.replacing import Kind
from saescope.seals import seal_of
from store.feature_store import FeatureStore
from store.parquet.layout import KIND, SCHEMA, file_name, is_table_file


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a store's rows are dealt over files and row groups."""

    group_rows: int = 122_880
    """rows of a row group of the activations, the least that is read of them"""
    file_rows: int = 1 << 25
    """about how many of them are in a file: some 250 MB"""
    other_rows: int = 4096
    """rows of a row group of all other tables"""


_LAYOUT = Layout()
_KEYS = {"activation_by_feature": "feature", "activation_by_position": "position"}


def _is_parquet_store(folder: Path) -> bool:
    return bool(read_manifest(folder, kind=KIND, schema=SCHEMA, sealed_since=1))


PARQUET_STORE = Kind("a feature store in Parquet", _is_parquet_store)


def write_parquet_store(
    store: FeatureStore, out: AnyPath, *, replace: bool = False, layout: Layout = _LAYOUT
) -> None:
    """Write a store's tables as Parquet files, sorted as they are, and the manifest last.

    Activations by feature are cut into files between features, those by position between
    sequences; a row group's statistics say which are in it. Until the manifest is written there is
    no store at `out`; what is there before is replaced only with `replace`.
    Raises InputError if anything else is there; ArtefactError if it cannot be written.
    """
    with locked(out, "export"):
        if isinstance(out, Path):
            with atomic_path(out, PARQUET_STORE, replace=replace) as folder:
                folder.mkdir()
                _write(store, folder, layout)
            return
        before = _there(out, replace=replace)
        names = _write(store, out, layout)
        for name in before - {*names, MANIFEST}:
            remove(out.joinpath(*name.split("/")))


def _there(out: AnyPath, *, replace: bool) -> set[str]:
    """The names of the objects of a store, or of one half written, at `out`."""
    there = set(file_sizes(out))
    where = str(out)
    if exists(out) or not all(name == MANIFEST or is_table_file(name) for name in there):
        raise InputError("holds something else, which is never replaced", where=where)
    if MANIFEST in there:
        read_manifest(out, kind=KIND, schema=SCHEMA)
        if not replace:
            raise InputError(
                "holds a feature store already; --replace puts the new one in its place",
                where=where,
            )
    return there


def _write(store: FeatureStore, folder: AnyPath, layout: Layout) -> list[str]:
    """Write all files and the manifest; the files' names."""
    db, token = store.database, uuid.uuid4().hex[:8]
    found = db.rows(
        "SELECT DISTINCT table_name FROM duckdb_columns() WHERE database_name = 'db'"
        " AND schema_name = 'main' ORDER BY table_name"
    )
    counts = {name: db.rows(f"SELECT count(*) FROM db.{name}")[0][0] for (name,) in found}
    tables: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        Progress("writing Parquet", sum(counts.values()), "rows") as progress,
    ):
        for table, rows in counts.items():
            files = _Files(folder, table, token, Path(scratch))
            schema = _write_table(store, table, files, layout, progress)
            if sum(file["rows"] for file in files.written) != rows:
                raise RuntimeError(f"{table}: rows were lost")
            columns = {field.name: str(field.type) for field in schema}
            tables[table] = {"rows": rows, "columns": columns, "files": files.written}
    parent = str(store.meta.get("sae_hash") or "") or None
    config = dataclasses.asdict(layout)
    write_manifest(
        folder, kind=KIND, schema=SCHEMA, config=config, parent=parent, sealed=True, tables=tables
    )
    return [file["name"] for table in tables.values() for file in table["files"]]


def _write_table(
    store: FeatureStore, table: str, files: "_Files", layout: Layout, progress: Progress
) -> pa.Schema:
    db, key = store.database, _KEYS.get(table)
    group_rows = layout.other_rows if key is None else layout.group_rows
    nullable = db.nullable(table)
    with db.reader(f"SELECT * FROM db.{table}", group_rows) as rows:
        schema = pa.schema([f.with_nullable(nullable[f.name]) for f in rows.schema])
        files.begin(schema, group_rows)
        if key is None:
            cuts = ((batch, False) for batch in rows)
        else:
            unit = store.context if key == "position" else 1
            cuts = _cut(rows, key, unit, layout.file_rows)
        for batch, new_file in cuts:
            if new_file:
                files.end()
                files.begin(schema, group_rows)
            files.add(batch)
            progress.advance(batch.num_rows, table)
        files.end()
    return schema


def _cut(
    batches: Iterable[pa.RecordBatch], key: str, unit: int, file_rows: int
) -> Iterator[tuple[pa.RecordBatch, bool]]:
    """The rows in pieces, and whether each begins another file.

    One begins where a file has `file_rows` rows or more and the key // unit changes: a feature, or
    a sequence, is in one file.
    """
    in_file, last = 0, None
    for batch in batches:
        numbers = batch.column(key).to_numpy() // unit
        changes = np.flatnonzero(np.diff(numbers, prepend=numbers[0] if last is None else last))
        start, new_file = 0, False
        for change in changes.tolist():
            if in_file + change - start >= file_rows:
                if change > start:
                    yield batch.slice(start, change - start), new_file
                start, new_file, in_file = change, True, 0
        yield batch.slice(start), new_file
        in_file += batch.num_rows - start
        last = numbers[-1]


class _Files:
    """The files of a table, written one after another; `written` is what the manifest has."""

    def __init__(self, folder: AnyPath, table: str, token: str, scratch: Path) -> None:
        self.written: list[dict[str, Any]] = []
        self._folder, self._table, self._token, self._scratch = folder, table, token, scratch

    def begin(self, schema: pa.Schema, group_rows: int) -> None:
        """Begin a file whose row groups have `group_rows` rows."""
        self._name = file_name(self._table, len(self.written), self._token)
        self._target = self._folder.joinpath(*self._name.split("/"))
        self._file = self._target if isinstance(self._target, Path) else self._scratch / "file"
        self._file.parent.mkdir(exist_ok=True)
        self._schema, self._group_rows, self._rows = schema, group_rows, 0
        self._waiting = pa.Table.from_batches([], schema)
        self._writer = pq.ParquetWriter(self._file, schema, compression="zstd")

    def add(self, rows: pa.RecordBatch) -> None:
        """Write rows, once there is a row group of them."""
        more = pa.Table.from_batches([rows]).cast(self._schema)
        self._waiting = pa.concat_tables([self._waiting, more])
        self._rows += rows.num_rows
        whole = self._waiting.num_rows // self._group_rows * self._group_rows
        if whole:
            self._writer.write_table(self._waiting.slice(0, whole), self._group_rows)
            self._waiting = self._waiting.slice(whole)

    def end(self) -> None:
        """End the file, and bring it to where it belongs."""
        if self._waiting.num_rows or not self._rows:
            self._writer.write_table(self._waiting, self._group_rows)
        self._writer.close()
        self.written.append({"name": self._name, "rows": self._rows, **seal_of(self._file)})
        if not isinstance(self._target, Path):
            upload(self._file, self._target)
            self._file.unlink()
