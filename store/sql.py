"""A reader's own SQL on a store: one statement that reads, and nothing else of the machine."""

import pyarrow as pa

from saescope.errors import InputError, check_range
from saescope.integers import as_index
from store.results import ColumnHelp, TableHelp
from store.schema_help import ADDED, COLUMNS, TABLES
from store.store_base import StoreBase

SECONDS, MOST_ROWS, MOST_BYTES = 10.0, 100_000, 64 * 2**20
_LONGEST = 100_000


class SqlQueries(StoreBase):
    """Queries in SQL."""

    def sql(self, query: str, *, seconds: float = SECONDS, most_rows: int = MOST_ROWS) -> pa.Table:
        """The result of one SELECT, in DuckDB's SQL, on the store's tables.

        The store is read only; no file, network or setting can be reached. Raises InputError, which
        names the limit, for a result that takes longer than `seconds`, has more than `most_rows`
        rows or more than 64 MiB; and for a statement that is wrong, or is not one SELECT.
        Cost: that of the statement; activation_by_feature is in the order of features, and
        activation_by_position in that of positions, so bounds of those are quick. Other conditions
        read the whole table: about 1 s for 10^8 rows.

        >>> with FeatureStore.open("stores/demo") as features:  # doctest: +SKIP
        ...     features.sql("SELECT feature, max FROM feature ORDER BY max DESC LIMIT 3")
        """
        if not isinstance(query, str):
            raise InputError("is no text", where="query", given=query)
        if len(query) > _LONGEST:
            given, allowed = f"{len(query)} characters", f"at most {_LONGEST}"
            raise InputError("is too long", where="query", given=given, allowed=allowed)
        check_range("seconds", seconds, above=0)
        most_rows = as_index(most_rows, where="most_rows", low=1)
        return self._db.read(query, seconds=seconds, most_rows=most_rows, most_bytes=MOST_BYTES)

    def tables(self) -> list[TableHelp]:
        """The store's tables for `sql`, with what they and their columns mean."""
        found: dict[str, list[ColumnHelp]] = {table: [] for table in TABLES}
        for table, column, kind in self._rows(
            "SELECT table_name, column_name, data_type FROM duckdb_columns()"
            " WHERE database_name = 'db' AND schema_name = 'main' ORDER BY table_name, column_index"
        ):
            about = COLUMNS.get(f"{table}.{column}", ADDED if table == "feature" else "")
            found.setdefault(table, []).append(ColumnHelp(column, kind, about))
        return [
            TableHelp(table, TABLES.get(table, ""), tuple(columns))
            for table, columns in found.items()
            if columns
        ]
