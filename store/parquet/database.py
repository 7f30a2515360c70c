"""A store in Parquet behind the same queries as one in a DuckDB file: each table is a view."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saescope.artefact import MANIFEST, DamagedError
from saescope.errors import ArtefactError, InputError
from saescope.paths import AnyPath, file_sizes
from store.database import NO_FILES, Database, identifier, quoted
from store.parquet.files import PROTOCOL, StoreFiles
from store.parquet.layout import read_layout

_READS = ("read_", "parquet_", "sniff_", "scan_", "glob", "query")
"""how the names of DuckDB's functions begin that read files, or run SQL that is given as text"""


class ParquetDatabase(Database):
    """The files that a manifest lists, as views of `db`; see `Database`.

    DuckDB reaches them through `StoreFiles` and reaches nothing else; a reader's own SQL names the
    views, and no file at all.
    """

    def __init__(self, file: AnyPath, *, threads: int, memory_limit: str, seconds: float) -> None:
        self._tables = read_layout(file.parent)
        self._files = {each.name: each for files in self._tables.values() for each in files}
        self._check_sizes(file.parent)
        self._system = StoreFiles(file.parent, self._files)
        super().__init__(file, threads=threads, memory_limit=memory_limit, seconds=seconds)

    def _check_sizes(self, folder: AnyPath) -> None:
        there = file_sizes(folder)
        for file in self._files.values():
            size, where = there.get(file.name), str(folder.joinpath(*file.name.split("/")))
            if size is None:
                raise DamagedError("the file is missing", where=where, kind="missing")
            if size != file.bytes:
                said = f"it has {size:,} bytes of {file.bytes:,}"
                raise DamagedError(said, where=where, kind="truncated")

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(file.bytes for file in self._files.values())

    def _attach(self) -> None:
        con = self._con
        con.register_filesystem(self._system)
        with self._clear(con):
            con.execute("SET parquet_metadata_cache = true")
            con.execute("ATTACH ':memory:' AS db")
            for table, files in self._tables.items():
                names = ", ".join(quoted(f"{PROTOCOL}://{file.name}") for file in files)
                con.execute(
                    f"CREATE VIEW db.{identifier(table)} AS SELECT * FROM read_parquet([{names}],"
                    " hive_partitioning = false)"
                )
            con.execute(f"SET allowed_directories = ['{PROTOCOL}://']")
            self._lock_configuration()

    def nullable(self, table: str) -> dict[str, bool]:
        """Whether each column of a table may be null, by what its first file says."""
        file = self._tables[table][0]
        try:
            with self._system.open(file.name) as stream:
                return {field.name: field.nullable for field in pq.read_schema(stream)}
        except (pa.ArrowException, OSError) as error:
            reason = str(error).split("\n", 1)[0]
            where = f"{self.file.parent}/{file.name}"
            raise ArtefactError(f"cannot be read as Parquet: {reason}", where=where) from error

    def activations_of(
        self, columns: str, features: tuple[int, int], rows: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        # Parquet has no row ids; statistics of row groups lead to the features' few
        return self.columns(
            f"SELECT {columns} FROM db.activation_by_feature WHERE feature >= ? AND feature < ?"
            " ORDER BY feature, activation DESC, position LIMIT ?",
            [*features, rows[1] - rows[0]],
        )

    def _check_statement(self, cursor: Any, sql: str) -> None:
        said = cursor.execute("SELECT json_serialize_sql(?)", [sql]).fetchall()[0][0]
        if any(map(_names_a_file, _nodes(json.loads(said)))):
            raise InputError(NO_FILES, where="query")


def open_database(file: AnyPath, *, threads: int, memory_limit: str, seconds: float) -> Database:
    """A store's file as `store_file` gives it, opened; its content is not checked."""
    kind = ParquetDatabase if file.name == MANIFEST else Database
    return kind(file, threads=threads, memory_limit=memory_limit, seconds=seconds)


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in JSON's value, at any depth."""
    todo = [value]
    while todo:
        each = todo.pop()
        if isinstance(each, dict):
            yield each
            todo += each.values()
        elif isinstance(each, list):
            todo += each


def _names_a_file(node: dict[str, Any]) -> bool:
    """Whether a node of a statement as DuckDB read it could lead to a file."""
    function, table = node.get("function_name"), node.get("table_name")
    return (isinstance(function, str) and function.lower().startswith(_READS)) or (
        isinstance(table, str) and "://" in table
    )
