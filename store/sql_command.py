"""`saescope sql`: one SELECT on a feature store, printed as a table or as CSV."""

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from saescope.config import Config
from saescope.errors import InputError, check_range
from saescope.terminal import harmless
from store.feature_store import FeatureStore
from store.sql import MOST_ROWS, SECONDS

_WIDEST = 60


@dataclass(frozen=True, kw_only=True)
class SqlConfig(Config):
    """Ask a feature store in SQL."""

    store: str = ""
    """A store's file or folder."""
    query: str = "SHOW TABLES"
    """One SELECT of DuckDB's SQL; it reads the store and nothing else."""
    csv: bool = False
    """Print CSV, with all values in full."""
    rows: int = MOST_ROWS
    """The most rows that the result may have."""
    seconds: float = SECONDS
    """The longest that it may take."""

    def __post_init__(self) -> None:
        check_range("rows", self.rows, low=1)
        check_range("seconds", self.seconds, above=0)


def print_result(config: SqlConfig) -> None:
    """Print the result of the query. Raises InputError as `FeatureStore.sql` does."""
    if not config.store:
        raise InputError("which store? give its file or folder", where="store")
    with FeatureStore.open(config.store) as features:
        table = features.sql(config.query, seconds=config.seconds, most_rows=config.rows)
    text = as_csv(table) if config.csv else as_text(table)
    sys.stdout.write(harmless(text, lines=True) if sys.stdout.isatty() else text)


def as_csv(table: pa.Table) -> str:
    """A table as CSV, a line for the names first."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(table.column_names)
    writer.writerows(_rows(table))
    return stream.getvalue()


def as_text(table: pa.Table) -> str:
    """A table in aligned columns; long texts are cut, and what steers a terminal is shown.

    >>> print(as_text(pa.table({"feature": [3, 14], "max": [0.5, 12.25]})), end="")
    feature    max
          3    0.5
         14  12.25
    2 rows
    """
    cells = [[harmless(name) for name in table.column_names]]
    cells += [[_cell(value) for value in row] for row in _rows(table)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
        for kind in table.schema.types
    ]
    lines = [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    ]
    count = f"{table.num_rows:,} row{'' if table.num_rows == 1 else 's'}"
    return "\n".join([*lines, count]) + "\n"


def _rows(table: pa.Table) -> list[Sequence[object]]:
    # by column, as two columns may have one name
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def _cell(value: object) -> str:
    text = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    text = harmless(text)
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"
