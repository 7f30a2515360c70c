"""Effects that were measured after a store was built: adding them to it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from saescope.artefact import atomic_path
from saescope.errors import ArtefactError
from store.checking import STORE
from store.database import SCHEMA, clear_errors, connect, identifier, odd_path, quoted

EFFECTS = "effects"
"""the fact that says how effects were measured, and what random directions do"""
MEASURED_COLUMNS = ("output_score", "confidence_change", "measured_kl", "measured_positions")
"""columns of the feature table that come with them; NULL where nothing was measured"""
_TYPES = {"measured_positions": "INTEGER"}
_OLDEST = 4
"""the oldest schema that differs from today's only by what is added here"""


def add_measured(
    path: Path, columns: Mapping[str, Any], rows: pa.Table, facts: Mapping[str, Any]
) -> None:
    """Put a new version of a store in its place that has these effects, and no older ones.

    Args: columns are those of MEASURED_COLUMNS, [d_sae] each; rows are of `measured_logit`.

    Raises ArtefactError if the store is too old to take them, or the disk is full; the store is
    then as it was.
    """
    with clear_errors(path), atomic_path(path, STORE, replace=True) as temporary:
        if odd_path(temporary):
            raise ArtefactError(
                "DuckDB cannot write below a folder with ? or \\ in its name", where=str(path)
            )
        shutil.copyfile(path, temporary)
        con = connect(threads=1, memory_limit="1GB")
        try:
            con.execute(f"ATTACH {quoted(temporary)} AS db; USE db")
            _check_schema(con, path)
            _write(con, columns, rows, facts)
            con.execute("CHECKPOINT db; USE memory; DETACH db")
        finally:
            con.close()


def _check_schema(con: Any, path: Path) -> None:
    [(value,)] = con.execute("SELECT value FROM meta WHERE key = 'schema'").fetchall()
    if int(value) < _OLDEST:
        raise ArtefactError(
            f"was built by an older saescope (schema {value}), to which effects cannot be added; "
            "`saescope index RUN --out FOLDER --replace` builds it anew, and labels stay",
            where=str(path),
        )


def _write(con: Any, columns: Mapping[str, Any], rows: pa.Table, facts: Mapping[str, Any]) -> None:
    schema = (Path(__file__).parent / "schema.sql").read_text(encoding="utf-8")
    begin = schema.index("CREATE TABLE measured_logit")
    con.execute("DROP TABLE IF EXISTS measured_logit")
    con.execute(schema[begin : schema.index(";", begin)])
    con.register("incoming", rows)
    names = ", ".join(map(identifier, rows.column_names))
    con.execute(
        f"INSERT INTO measured_logit ({names}) SELECT {names} FROM incoming"
        " ORDER BY feature, sign DESC, rank"
    )
    con.unregister("incoming")
    table = pa.table(
        {"feature": np.arange(len(columns[MEASURED_COLUMNS[0]])), **_nullable(columns)}
    )
    con.register("incoming", table)
    for name in MEASURED_COLUMNS:
        con.execute(f"ALTER TABLE feature DROP COLUMN IF EXISTS {name}")
        con.execute(f"ALTER TABLE feature ADD COLUMN {name} {_TYPES.get(name, 'FLOAT')}")
    setting = ", ".join(f"{name} = incoming.{name}" for name in MEASURED_COLUMNS)
    con.execute(
        f"UPDATE feature SET {setting} FROM incoming WHERE incoming.feature = feature.feature"
    )
    con.unregister("incoming")
    con.execute("DELETE FROM meta WHERE key = ?", [EFFECTS])
    con.execute("INSERT INTO meta VALUES (?, ?)", [EFFECTS, json.dumps(facts, allow_nan=False)])
    con.execute("UPDATE meta SET value = ? WHERE key = 'schema'", [json.dumps(SCHEMA)])


def _nullable(columns: Mapping[str, Any]) -> dict[str, pa.Array]:
    """Columns with NULL for what is not a number."""
    return {
        name: pa.array(columns[name], from_pandas=True, mask=~np.isfinite(columns[name]))
        for name in MEASURED_COLUMNS
    }
