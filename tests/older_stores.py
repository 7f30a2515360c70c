"""Feature stores as older versions wrote them."""

from pathlib import Path

import duckdb

from store.database import ADDED


def as_store_schema(path: Path, schema: int) -> None:
    """Make a store what this older schema was: without the tables that came later."""
    with duckdb.connect(str(path)) as con:
        for name, since in ADDED.items():
            if since > schema:
                con.execute(f"DROP TABLE {name}")
        con.execute("UPDATE meta SET value = ? WHERE key = 'schema'", [str(schema)])
