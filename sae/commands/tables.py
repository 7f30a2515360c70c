"""Writing the tables of `saescope diff` and `saescope compare`."""

from pathlib import Path

import pyarrow as pa
from pyarrow import csv, parquet

from saescope.artefact import atomic_path
from saescope.system import system_errors

SUFFIXES = (".parquet", ".csv")


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table as Parquet or CSV, by the file's suffix.

    Raises InputError if something is there already, ArtefactError if the disk is full.
    """
    with system_errors(str(path)), atomic_path(path) as temporary:
        if path.suffix == ".parquet":
            parquet.write_table(table, temporary)
        else:
            csv.write_csv(table, temporary)
