"""Finding damage in a store's files, by reading every block, which ordinary queries do not."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

from saescope.errors import ArtefactError
from store.annotation_file import is_sealed
from store.annotations import Annotations, annotations_file
from store.database import Database, store_file
from store.feature_store import FeatureStore

_SECONDS = 24 * 3600.0
_TWICE = ("activation_by_feature", "activation_by_position")
"""the tables that have every activation, in two orders"""


def examine_store(path: Path) -> Iterator[str]:
    """What is wrong with a feature store's file, a line each.

    Reads every block, since DuckDB verifies a block's checksum when it reads the block.
    """
    file = store_file(path)
    try:
        FeatureStore.open(file).close()  # its tables, and what they say of one another
    except ArtefactError as error:
        yield _what(error, file)
        return
    db = Database(file, threads=1, memory_limit="1GB", seconds=_SECONDS)
    try:
        yield from _read_all(db, file)
    finally:
        db.close()


def _read_all(db: Database, file: Path) -> Iterator[str]:
    tables = [row[0] for row in db.rows("SELECT table_name FROM duckdb_tables() ORDER BY 1")]
    whole = set()
    for table in tables:
        try:
            db.rows(f"SELECT count(*), bit_xor(hash(t)) FROM db.{table} t")
            whole.add(table)
        except ArtefactError as error:
            yield f"table {table}: {_what(error, file)}"
    if whole.issuperset(_TWICE):
        sums = [
            db.rows(f"SELECT count(*), sum(hash(feature, position, activation)) FROM db.{table}")
            for table in _TWICE
        ]
        if sums[0] != sums[1]:
            yield f"{' and '.join(_TWICE)} do not hold the same activations"


def examine_annotations(path: Path) -> Iterator[str]:
    """What is wrong with the annotations beside a store, a line each; nothing if there are none."""
    file = annotations_file(path)
    if not file.exists():
        return
    try:
        Annotations.open(path).close()
        with sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True) as con:
            yield from _of_annotations(con)
        con.close()
    except ArtefactError as error:
        yield _what(error, file)
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        yield f"cannot be read as annotations: {error}"


def _of_annotations(con: sqlite3.Connection) -> Iterator[str]:
    for (said,) in con.execute("PRAGMA integrity_check"):
        if said != "ok":
            yield str(said)
    if not is_sealed(con, machines=True):
        yield "not what saescope last saved there: damaged, or changed by another program"
    # the index of words is checked by a statement that may write: on a copy
    with sqlite3.connect(":memory:") as copy:
        con.backup(copy)
        try:
            copy.execute(
                "INSERT INTO annotation_text(annotation_text, rank) VALUES ('integrity-check', 1)"
            )
        except sqlite3.DatabaseError:
            yield "the index of words does not fit the labels and notes"
    copy.close()


def _what(error: ArtefactError, file: Path) -> str:
    return str(error).removeprefix(f"{file}: ").removeprefix(f"{file}")
