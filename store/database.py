"""Opening store files with DuckDB, and turning its errors into ours.

A store is attached under the name `db` to an in-memory DuckDB, never opened as the main database:
so a reader that still holds a replaced file does not hide the new one from other readers in the
same process, and no two readers have to agree on settings.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb

from saescope.artefact import check_schema
from saescope.errors import ArtefactError

KIND = "feature store"
SCHEMA = 1
FILE_NAME = "features.duckdb"


def quoted(text: str | Path) -> str:
    """Text as a SQL literal.

    >>> quoted("it's")
    "'it''s'"
    """
    return "'" + str(text).replace("'", "''") + "'"


def connect(*, threads: int, memory_limit: str, spill: Path | None = None) -> Any:
    """An in-memory DuckDB that fetches no extensions and reads nothing by itself."""
    settings: dict[str, Any] = {
        "threads": threads,
        "memory_limit": memory_limit,
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "preserve_insertion_order": True,
        "temp_directory": str(spill) if spill else "",
    }
    return duckdb.connect(":memory:", config=settings)


@contextmanager
def clear_errors(where: str | Path) -> Iterator[None]:
    """Turn what DuckDB says about a full disk or too little memory into one clear error."""
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


def store_file(path: str | Path) -> Path:
    """The store's file for a path of it or of its folder; ArtefactError if there is none."""
    given = Path(path)
    file = given / FILE_NAME if given.is_dir() else given
    if not file.is_file():
        raise ArtefactError(
            "no feature store here; `saescope index RUN` makes one", where=str(path)
        )
    return file


def open_read_only(file: Path, *, threads: int, memory_limit: str) -> tuple[Any, dict[str, Any]]:
    """Attach a store read-only as `db`; the connection and its meta values.

    Raises ArtefactError if the file is no DuckDB file, no feature store, damaged or of a newer
    version.
    """
    con = connect(threads=threads, memory_limit=memory_limit)
    try:
        con.execute(f"ATTACH {quoted(file)} AS db (READ_ONLY)")
        rows = con.execute("SELECT key, value FROM db.meta").fetchall()
        meta = {key: json.loads(value) for key, value in rows}
    except duckdb.CatalogException:
        con.close()
        raise ArtefactError("is a DuckDB file but not a feature store", where=str(file)) from None
    except (duckdb.Error, ValueError) as error:
        con.close()
        reason = str(error).splitlines()[0]
        raise ArtefactError(f"cannot be read as a feature store: {reason}", where=str(file)) from (
            error
        )
    try:
        if meta.get("kind") != KIND:
            raise ArtefactError(
                "wrong kind of file", where=str(file), given=meta.get("kind"), allowed=KIND
            )
        check_schema(meta.get("schema"), supported=SCHEMA, where=str(file))
    except ArtefactError:
        con.close()
        raise
    return con, meta
