"""Checks of a store's file before it is read, since a stranger may have made it.

A DuckDB file can hold more than tables: views and macros run SQL when they are read, generated
columns and defaults are expressions. A store has plain tables of the columns in schema.sql, plain
columns of measurements at the end of the feature table, and nothing else.
"""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb

from saescope.artefact import check_schema
from saescope.errors import ArtefactError
from saescope.metrics import metric_table
from saescope.replacing import Kind
from store.database import ADDED, COUNTS, KIND, OLDEST, SCHEMA, Database
from store.parquet.database import ParquetDatabase

_PLAIN_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_PLAIN_TYPES = re.compile(r"BOOLEAN|U?(TINY|SMALL|BIG)INT|U?INTEGER|FLOAT|DOUBLE|VARCHAR")
_MOST_VALUES, _LONGEST_VALUE = 1000, 1 << 24
_LARGEST = 2**31 - 1
_FOREIGN = """
SELECT 'schema', schema_name FROM duckdb_schemas() WHERE database_name = 'db' AND NOT internal
UNION ALL SELECT 'view', view_name FROM duckdb_views() WHERE database_name = 'db' AND NOT internal
UNION ALL SELECT 'type', type_name FROM duckdb_types() WHERE database_name = 'db' AND NOT internal
UNION ALL SELECT 'macro', function_name FROM duckdb_functions() WHERE database_name = 'db'
UNION ALL SELECT 'sequence', sequence_name FROM duckdb_sequences() WHERE database_name = 'db'
UNION ALL SELECT 'index', index_name FROM duckdb_indexes() WHERE database_name = 'db'
UNION ALL SELECT 'trigger', trigger_name FROM duckdb_triggers() WHERE database_name = 'db'
UNION ALL SELECT 'constraint', constraint_text FROM duckdb_constraints()
    WHERE database_name = 'db' AND constraint_type <> 'NOT NULL'
UNION ALL SELECT 'expression', table_name || '.' || column_name FROM duckdb_columns()
    WHERE database_name = 'db' AND (is_generated OR column_default IS NOT NULL)
LIMIT 1
"""
_COLUMNS = """
SELECT table_name, column_name, data_type, is_nullable FROM duckdb_columns()
WHERE database_name = '{}' AND schema_name = 'main' ORDER BY table_name, column_index
"""


def plain_column(name: str, kind: str) -> bool:
    """Whether a store's feature table may have such a column besides its own.

    >>> plain_column("decoder_norm", "FLOAT"), plain_column('a"; DROP', "FLOAT")
    (True, False)
    """
    return (
        bool(_PLAIN_NAME.fullmatch(name)) and name != "rowid" and bool(_PLAIN_TYPES.fullmatch(kind))
    )


@functools.cache
def _own_tables() -> dict[str, dict[str, tuple[str, bool]]]:
    """The tables of schema.sql: each column's type, and whether it may be null."""
    schema = (Path(__file__).parent / "schema.sql").read_text(encoding="utf-8")
    with duckdb.connect(":memory:") as con:
        con.execute(schema)
        return _by_table(con.execute(_COLUMNS.format("memory")).fetchall())


def _by_table(rows: list[tuple[Any, ...]]) -> dict[str, dict[str, tuple[str, bool]]]:
    tables: dict[str, dict[str, tuple[str, bool]]] = {}
    for table, column, kind, nullable in rows:
        tables.setdefault(table, {})[column] = (kind, nullable)
    return tables


def check_store(db: Database) -> dict[str, Any]:
    """Check a store's tables and its table of facts; returns the facts.

    Raises ArtefactError if it is no feature store, has another version, or contains anything that
    a feature store does not.
    """
    where = str(db.file)
    in_parquet = isinstance(db, ParquetDatabase)
    foreign = [] if in_parquet else db.rows(_FOREIGN)  # its views are made here
    found = _by_table(db.rows(_COLUMNS.format("db")))
    if in_parquet:
        for table, columns in found.items():
            nullable = db.nullable(table)
            found[table] = {n: (kind, nullable[n]) for n, (kind, _) in columns.items()}
    if "meta" not in found and not any(kind == "view" and name == "meta" for kind, name in foreign):
        raise ArtefactError("is a DuckDB file but not a feature store", where=where)
    if foreign:
        kind, name = foreign[0]
        raise ArtefactError(
            f"has a {kind} in it, which a feature store has not", where=where, given=name[:80]
        )
    own = dict(_own_tables())
    if found.get("meta") != own["meta"]:
        raise ArtefactError("is a DuckDB file but not a feature store", where=where)
    meta = _read_meta(db)
    _check_version(meta, where)
    for name, since in ADDED.items():
        if meta["schema"] < since:
            del own[name]
    _check_tables(found, own, where)
    _check_meta(meta, where)
    _check_features(db, meta)
    return meta


def _check_version(meta: Mapping[str, Any], where: str) -> None:
    if meta.get("kind") != KIND:
        raise ArtefactError("wrong kind of file", where=where, given=meta.get("kind"), allowed=KIND)
    check_schema(meta.get("schema"), supported=SCHEMA, where=where)
    if meta["schema"] < OLDEST:
        raise ArtefactError(
            f"was built by an older saescope (schema {meta['schema']}, this one reads {OLDEST} to "
            f"{SCHEMA}); "
            "`saescope index RUN --out FOLDER --replace` builds it anew, and labels stay",
            where=where,
        )


def _read_meta(db: Database) -> dict[str, Any]:
    where = str(db.file)
    count, longest = db.rows("SELECT count(*), max(strlen(value) + strlen(key)) FROM db.meta")[0]
    if count > _MOST_VALUES or (longest or 0) > _LONGEST_VALUE:
        raise ArtefactError("its table of facts is too large", where=where)
    try:
        rows = db.rows("SELECT key, value FROM db.meta")
        return {key: json.loads(value, parse_int=_integer) for key, value in rows}
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"cannot be read as a feature store: {error}", where=where) from error


def _integer(digits: str) -> int:
    number = int(digits[:30])
    if abs(number) >= 2**63:
        raise ValueError(f"a number is too large: {digits[:30]}")
    return number


def _check_tables(
    found: Mapping[str, Mapping[str, tuple[str, bool]]],
    own: Mapping[str, Mapping[str, tuple[str, bool]]],
    where: str,
) -> None:
    if found.keys() != own.keys():
        differing = min(found.keys() ^ own.keys())
        what = "is missing" if differing in own else "is none of a feature store's"
        raise ArtefactError(f"a table {what}", where=where, given=differing[:80])
    for table, columns in own.items():
        there = found[table]
        for name, kind in columns.items():
            if there.get(name) != kind:
                raise ArtefactError(
                    "a column is missing or of another type", where=where, given=f"{table}.{name}"
                )
        for name in there.keys() - columns.keys():
            if table != "feature" or not plain_column(name, there[name][0]):
                raise ArtefactError(
                    "a column is none of a feature store's",
                    where=where,
                    given=f"{table}.{name}"[:80],
                )


def _check_meta(meta: Mapping[str, Any], where: str) -> None:
    for key in ("d_sae", "context", *COUNTS):
        low, value = int(key in ("d_sae", "context")), meta.get(key)
        high = _LARGEST if low else 2**62
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ArtefactError(
                "damaged: not a number that can be right",
                where=f"{where}: meta.{key}",
                given=value if isinstance(value, int | float | None) else type(value).__name__,
            )
    if not isinstance(meta.get("metrics") or {}, dict):
        raise ArtefactError("damaged: not a table of metrics", where=f"{where}: meta.metrics")
    metric_table(meta.get("metric_rows"), where=f"{where}: meta.metric_rows")


def _check_features(db: Database, meta: Mapping[str, Any]) -> None:
    """Check that the feature table has each feature once, with possible values."""
    d_sae = meta["d_sae"]
    count, distinct, low, high, wrong = db.rows(
        "SELECT count(*), count(DISTINCT feature), min(feature), max(feature), count(*) FILTER ("
        "n_active < 0 OR first_row < 0 OR first_row::HUGEINT + n_active > ? OR n_documents < 0"
        " OR NOT (density BETWEEN 0 AND 1) OR NOT (isfinite(mean) AND isfinite(std))"
        " OR NOT (isfinite(max) AND max >= 0)) FROM db.feature",
        [db.rows("SELECT count(*) FROM db.activation_by_feature")[0][0]],
    )[0]
    if (count, distinct, low, high, wrong) != (d_sae, d_sae, 0, d_sae - 1, 0):
        raise ArtefactError(
            "damaged: its table of features is not one of that many features",
            where=str(db.file),
            given=count,
            allowed=str(d_sae),
        )


def _is_store(file: Path) -> bool:
    db = Database(file, threads=1, memory_limit="256MB", seconds=60)
    try:
        check_store(db)
    finally:
        db.close()
    return True


STORE = Kind("a feature store", _is_store)
