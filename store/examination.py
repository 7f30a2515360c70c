"""Finding damage in a store's files, by reading every block, which ordinary queries do not."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

from saescope.artefact import MANIFEST
from saescope.errors import ArtefactError
from saescope.paths import AnyPath, file_sizes, read_bytes
from saescope.seals import crc32c_text, seal_of
from store.annotation_file import is_sealed
from store.annotations import Annotations, annotations_file
from store.database import Database, store_file
from store.feature_store import FeatureStore
from store.parquet.database import open_database
from store.parquet.layout import read_layout

_TABLES = "SELECT DISTINCT table_name FROM duckdb_columns() WHERE database_name = 'db' ORDER BY 1"
_PIECE = 8 << 20
_SECONDS = 24 * 3600.0
_TWICE = ("activation_by_feature", "activation_by_position")
"""the tables that have every activation, in two orders"""


def examine_store(path: AnyPath) -> Iterator[str]:
    """What is wrong with a feature store's file, or with those of one in Parquet, a line each.

    Reads every block, since DuckDB verifies a block's checksum when it reads the block; Parquet
    files are compared with the checksums in their manifest.
    """
    file = store_file(path)
    if file.name == MANIFEST:
        damaged = list(_damaged_files(file.parent))
        yield from damaged
        if damaged:
            return
    try:
        FeatureStore.open(file).close()  # its tables, and what they say of one another
    except ArtefactError as error:
        yield _what(error, file)
        return
    db = open_database(file, threads=1, memory_limit="1GB", seconds=_SECONDS)
    try:
        yield from _read_all(db, file)
    finally:
        db.close()


def _damaged_files(folder: AnyPath) -> Iterator[str]:
    try:
        layout = read_layout(folder)
    except ArtefactError as error:
        yield _what(error, folder / MANIFEST)
        return
    there = file_sizes(folder)
    for file in (each for files in layout.values() for each in files):
        path = folder.joinpath(*file.name.split("/"))
        if file.name not in there:
            yield f"{file.name}: the file is missing"
        elif there[file.name] != file.bytes:
            yield f"{file.name}: it has {there[file.name]:,} bytes of {file.bytes:,}"
        elif _crc32c(path, file.bytes) != file.seal["crc32c"]:
            yield f"{file.name}: its content does not match its checksum"
    known = {MANIFEST, *(each.name for files in layout.values() for each in files)}
    for name in sorted(there.keys() - known):
        yield f"{name}: does not belong here"


def _crc32c(path: AnyPath, size: int) -> str:
    if isinstance(path, Path):
        return str(seal_of(path)["crc32c"])
    found = "00000000"
    for start in range(0, size, _PIECE):
        found = crc32c_text(read_bytes(path, start, min(start + _PIECE, size)), found)
    return found


def _read_all(db: Database, file: AnyPath) -> Iterator[str]:
    tables = [row[0] for row in db.rows(_TABLES)]
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


def examine_annotations(path: AnyPath) -> Iterator[str]:
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


def _what(error: ArtefactError, file: AnyPath) -> str:
    return str(error).removeprefix(f"{file}: ").removeprefix(f"{file}")
