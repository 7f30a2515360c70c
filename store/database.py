"""Opening store files with DuckDB and querying them; DuckDB's errors become one clear line.

A store is attached under the name `db` to an in-memory DuckDB, never opened as the main database:
otherwise a reader of a replaced file would hide the new file from other readers in the same
process, and all readers would have to use the same settings.

A store file may come from a stranger: `store.checking` refuses unsafe files before they are read.
"""

import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from saescope.artefact import MANIFEST
from saescope.errors import ArtefactError, InputError
from saescope.paths import AnyPath, as_path, exists, local
from store.time_limit import time_limit

KIND = "feature store"
SCHEMA, OLDEST = 5, 2
"""which is written, and the oldest that is read"""
ADDED = {
    **dict.fromkeys(("token_profile", "position_bin", "position_profile", "picture"), 3),
    **dict.fromkeys(("logit_histogram", "document_group", "enrichment"), 4),
    **dict.fromkeys(("layer", "layer_profile", "head_norm"), 4),
    "map_point": 4,
    "measured_logit": 5,
}
"""tables that older stores do not have, by the schema that brought them"""
STORE_FILE = "features.duckdb"
NO_FILES = "reads the store only: no other files, no network"
COUNTS = ("n_kept", "n_live", "n_activations", "n_sequences", "n_tokens", "n_documents")
"""whole numbers that a store's table of facts has"""
COUNTED = frozenset({*COUNTS, "split_kept"})
"""facts that are counted when a store is built, and that nobody may give"""
FEATURE_COLUMNS = frozenset(
    {"feature", "first_row", "n_active", "density", "mean", "std", "max", "n_documents"}
)
"""columns of the feature table that every store has"""
_ODD = "?\\"
_BATCH = 8192
_KIND_OF_ERROR = re.compile(r"^(\w+ ){1,3}Error: ")


def quoted(text: str | Path) -> str:
    """Text as a SQL literal.

    >>> quoted("it's")
    "'it''s'"
    """
    return "'" + str(text).replace("'", "''") + "'"


def identifier(name: str) -> str:
    """A name of a table or column as SQL.

    >>> identifier('a"b')
    '"a""b"'
    """
    return '"' + name.replace('"', '""') + '"'


def connect(
    *, threads: int, memory_limit: str, spill: Path | None = None, async_threads: int | None = None
) -> Any:
    """An in-memory DuckDB that fetches no extensions and opens no files of its own accord."""
    settings: dict[str, Any] = {
        "threads": threads,
        "memory_limit": memory_limit,
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "preserve_insertion_order": True,
        "temp_directory": str(spill) if spill else "",
    }
    if async_threads is not None:
        settings["async_threads"] = async_threads
    return duckdb.connect(":memory:", config=settings)


@contextmanager
def clear_errors(where: str | Path) -> Iterator[None]:
    """Turn DuckDB's errors about a full disk or too little memory into one clear error."""
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise ArtefactError(
            f"building needs more memory or temporary disk space: {error}", where=str(where)
        ) from error
    except duckdb.Error as error:
        text = str(error)
        if "No space left" in text or "quota exceeded" in text:
            raise ArtefactError(
                "the disk is full; free some space and run the same command again",
                where=str(where),
            ) from error
        raise


def odd_path(path: Path) -> bool:
    """Whether DuckDB would read another path than this one: it takes `?` for the beginning of
    options and `\\` for `/`, and knows only UTF-8."""
    text = str(path.resolve())
    return any(sign in text for sign in _ODD) or (not text.isascii() and not _is_utf8(text))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def store_file(path: str | AnyPath) -> AnyPath:
    """The store's file for a path of it or of its folder: that of DuckDB, or Parquet's manifest.

    Raises ArtefactError if there is none.
    """
    file = as_path(path)
    if not isinstance(file, Path):
        file = file if file.name == MANIFEST else file / MANIFEST
        if exists(file):
            return file
        what = "no feature store here; `saescope export STORE --format parquet-store` makes one"
    else:
        names = (STORE_FILE, MANIFEST) if file.is_dir() else ()
        file = next((file / name for name in names if (file / name).is_file()), file)
        if file.is_file():
            return file
        what = "no feature store here; `saescope index RUN` makes one"
    raise ArtefactError(what, where=str(path))


class Database:
    """A file attached read-only as `db`; no query can reach any other file.

    Queries may come from any thread. Each ends within `seconds`, and an error of DuckDB about a
    damaged file becomes one ArtefactError.
    """

    def __init__(self, file: AnyPath, *, threads: int, memory_limit: str, seconds: float) -> None:
        self.file = file
        self._seconds = seconds
        self._lock = threading.Lock()
        # no threads for reading ahead: many stores are open at once, and their queries are short
        self._con = connect(threads=threads, memory_limit=memory_limit, async_threads=0)
        try:
            self._attach()
        except BaseException:
            self._con.close()
            raise

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return local(self.file).stat().st_size

    def _attach(self) -> None:
        file = local(self.file)
        log = file.with_name(f"{file.name}.wal")
        if os.path.lexists(log):
            raise ArtefactError(
                "somebody has changed this store, which is never changed once it is built: "
                f"{log.name} lies beside it; take it away to read the store as it was",
                where=str(self.file),
            )
        with self._clear(self._con), _path_for_duckdb(file) as path:
            self._con.execute(f"ATTACH {quoted(path)} AS db (READ_ONLY)")
            self._lock_configuration()

    def _lock_configuration(self) -> None:
        """From here on it reads no other file, runs no program and cannot be told otherwise."""
        self._con.execute("SET enable_external_access = false")
        self._con.execute("SET lock_configuration = true")

    def close(self) -> None:
        """Close the file; queries then raise ArtefactError."""
        self._con.close()

    def check_fits(self, holds: bool, table: str) -> None:
        """Raise ArtefactError, which names the table, unless `holds`: its rows fit other tables."""
        if not holds:
            raise ArtefactError(
                "damaged: it does not fit the other tables", where=f"{self.file}: {table}"
            )

    @contextmanager
    def _clear(self, cursor: Any) -> Iterator[None]:
        """Turn DuckDB's errors into one clear error; interrupt a cursor that takes too long."""
        try:
            if cursor is None:
                yield
            else:
                with time_limit(self._seconds, partial(_interrupt, cursor)):
                    yield
        except duckdb.InterruptException as error:
            raise ArtefactError(
                f"a query took more than {self._seconds:g} s and was ended", where=str(self.file)
            ) from error
        except duckdb.OutOfMemoryException as error:
            raise ArtefactError("a query needs too much memory", where=str(self.file)) from error
        except (duckdb.Error, UnicodeError) as error:
            reason = str(error).split("\n", 1)[0]
            if "read-only mode" in reason:
                raise  # a statement that changes something is a mistake of ours
            raise ArtefactError(
                f"cannot be read as a feature store: {reason}", where=str(self.file)
            ) from error

    @contextmanager
    def _answer(self, sql: str, values: Sequence[Any]) -> Iterator[Any]:
        # one cursor a query: a connection shared by threads gives errors or wrong rows
        with self._clear(None), self._lock:
            cursor = self._con.cursor()
        with cursor, self._clear(cursor):
            yield cursor.execute(sql, list(values))

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """A query's rows."""
        with self._answer(sql, values) as answer:
            return answer.fetchall()

    def read(self, sql: str, *, seconds: float, most_rows: int, most_bytes: int) -> pa.Table:
        """The result of a stranger's statement, which names tables without `db.`.

        Raises InputError for anything but one SELECT, for a wrong one, and for a result beyond
        these limits.
        """
        with self._clear(None), self._lock:
            cursor = self._con.cursor()
        with cursor:
            with self._clear(None):
                cursor.execute("USE db")
            with _clear_for_reader(cursor, seconds):
                statement = _only_select(cursor, sql)
                self._check_statement(cursor, sql)
                reader = cursor.sql(statement).to_arrow_reader(_BATCH)
                batches, rows, size = [], 0, 0
                for batch in reader:
                    batches.append(batch)
                    rows, size = rows + batch.num_rows, size + batch.nbytes
                    if rows > most_rows:
                        limit = f"at most {most_rows:,} rows; add LIMIT {most_rows}"
                        raise InputError("the result is too long", where="query", allowed=limit)
                    if size > most_bytes:
                        limit = f"at most {most_bytes >> 20} MiB"
                        raise InputError("the result is too large", where="query", allowed=limit)
                return pa.Table.from_batches(batches, reader.schema)

    def _check_statement(self, cursor: Any, sql: str) -> None:
        """Raise InputError for a stranger's SELECT that DuckDB itself would not refuse."""

    @contextmanager
    def reader(self, sql: str, rows: int) -> Iterator[pa.RecordBatchReader]:
        """A query's rows, in pieces of at most so many."""
        with self._clear(None), self._lock:
            cursor = self._con.cursor()
        with cursor, self._clear(cursor):
            yield cursor.sql(sql).to_arrow_reader(rows)

    def nullable(self, table: str) -> dict[str, bool]:
        """Whether each column of a table may be null."""
        sql = (
            "SELECT column_name, is_nullable FROM duckdb_columns() WHERE database_name = 'db'"
            " AND schema_name = 'main' AND table_name = ?"
        )
        return dict(self.rows(sql, [table]))

    def activations_of(
        self, columns: str, features: tuple[int, int], rows: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        """Columns of activation_by_feature of some features, in the order of its rows.

        features: the first, and the one after the last. rows: the numbers of their first row in
        the table, and of the one after the last that is wanted.
        """
        return self.columns(
            f"SELECT {columns} FROM db.activation_by_feature"
            " WHERE rowid >= ? AND rowid < ? ORDER BY rowid",
            rows,
        )

    def columns(self, sql: str, values: Sequence[Any] = ()) -> dict[str, np.ndarray]:
        """A query's columns, by name."""
        with self._answer(sql, values) as answer:
            return answer.fetchnumpy()


def _only_select(cursor: Any, sql: str) -> Any:
    """The statement as DuckDB read it; InputError unless it is one SELECT without parameters."""
    statements = cursor.extract_statements(sql)
    if len(statements) != 1:
        raise InputError(
            "has to be one statement", where="query", given=f"{len(statements)} statements"
        )
    (statement,) = statements
    if statement.type != duckdb.StatementType.SELECT:
        raise InputError(
            "only reads", where="query", given=statement.type.name, allowed="SELECT statements"
        )
    if statement.named_parameters:
        raise InputError("has parameters (? or $name), which nobody gives a value", where="query")
    return statement


@contextmanager
def _clear_for_reader(cursor: Any, seconds: float) -> Iterator[None]:
    """Turn DuckDB's errors about a statement of a reader's into InputError; end it in time."""
    try:
        with time_limit(seconds, partial(_interrupt, cursor)):
            yield
    except duckdb.InterruptException as error:
        raise InputError(
            f"took more than {seconds:g} s and was ended", where="query", allowed=f"{seconds:g} s"
        ) from error
    except duckdb.OutOfMemoryException as error:
        raise InputError("needs too much memory", where="query") from error
    except duckdb.PermissionException as error:
        raise InputError(NO_FILES, where="query") from error
    except (duckdb.Error, UnicodeError, pa.ArrowException) as error:
        raise InputError(_reason(error), where="query") from error


def _reason(error: Exception) -> str:
    """What DuckDB says of a statement, without the kind of error and its sketch of the line."""
    text = " ".join(str(error).split("\n\nLINE ", 1)[0].split())
    return _KIND_OF_ERROR.sub("", text)


def _interrupt(cursor: Any) -> None:
    with suppress(duckdb.Error, AttributeError):  # it has just ended
        cursor.interrupt()


@contextmanager
def _path_for_duckdb(file: Path) -> Iterator[str]:
    """A path under which DuckDB opens this file, even if it would misread the file's own path."""
    if not odd_path(file):
        yield str(file)
        return
    if sys.platform != "linux":
        raise ArtefactError(
            "DuckDB cannot open a path with ? or \\ in it; move the store", where=str(file)
        )
    # only names the file: closing such a descriptor leaves DuckDB's lock on the file as it is
    descriptor = os.open(file, os.O_PATH)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
