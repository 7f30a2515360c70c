"""Results of probing as tables: means with intervals, and the files they are written to.

    NAME.probing.parquet   a row for each set, setting, method, k and seed
    NAME.probing.json      the same as means over seeds, and these as means over sets

Both carry the hash of the evaluation's protocol.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from sae.probing.family_file import FamilyFile, beside
from sae.probing.representations import METHODS
from sae.probing.scores import mean_and_interval
from sae.probing.suite import Row
from saescope.artefact import atomic_path
from saescope.paths import AnyPath, put, read_bytes
from saescope.replacing import Kind, check_replaceable
from saescope.system import system_errors

SCHEMA = pa.schema(
    [
        ("set", pa.string()),
        ("setting", pa.string()),
        ("method", pa.string()),
        ("k", pa.int64()),
        ("seed", pa.int64()),
        ("auc", pa.float64()),
        ("accuracy", pa.float64()),
        ("majority", pa.float64()),
        ("train", pa.int64()),
        ("test", pa.int64()),
        ("strength", pa.float64()),
        ("features", pa.list_(pa.int64())),
    ]
)
_HASH = b"protocol_hash"


def by_set(rows: Sequence[Row]) -> list[Row]:
    """Means over seeds, one row for each set, setting, method and k, in the rows' order.

    The intervals are of Student's t over seeds. Seeds divide the same texts, so they tell how much
    the division matters, not how much other texts would.
    """
    found = []
    for (name, setting, method, k), each in _grouped(rows, ("set", "setting", "method", "k")):
        row = {"set": name, "setting": setting, "method": method, "k": k, "seeds": len(each)}
        for value in ("auc", "accuracy"):
            row[value], row[f"{value}_interval"] = mean_and_interval([one[value] for one in each])
        more = {value: sum(one[value] for one in each) / len(each) for value in _AVERAGED}
        found.append({**row, **more})
    return found


_AVERAGED = ("majority", "train", "test")


def over_sets(sets: Sequence[Row]) -> list[Row]:
    """Means over sets of what `by_set` gives, for each setting, method and k.

    The intervals are of Student's t with sets as the unit. `above_untrained` is the mean, set by
    set, of the AUC less that of the untrained SAE with as many features.
    """
    control = {
        (row["set"], row["setting"], row["k"]): row["auc"]
        for row in sets
        if row["method"] == "untrained"
    }
    found = []
    for (setting, method, k), each in _grouped(sets, ("setting", "method", "k")):
        row = {"setting": setting, "method": method, "k": k, "sets": len(each)}
        for value in ("auc", "accuracy"):
            row[value], row[f"{value}_interval"] = mean_and_interval([one[value] for one in each])
        row["majority"] = sum(one["majority"] for one in each) / len(each)
        above = [
            one["auc"] - control[one["set"], setting, k]
            for one in each
            if method != "untrained" and (one["set"], setting, k) in control
        ]
        if above:
            row["above_untrained"], row["above_untrained_interval"] = mean_and_interval(above)
        found.append(row)
    return found


def lines(rows: Sequence[Row]) -> list[str]:
    """The mean AUC of the normal setting as lines for people, a method a line and a k a column."""
    table = [row for row in over_sets(by_set(rows)) if row["setting"] == "normal"]
    ks = sorted({row["k"] for row in table if row["method"] != "raw"})
    found = [f"  {'AUC':<12}" + "".join(f"{f'k={k}':>9}" for k in ks) + f"{'all':>9}"]
    for method in METHODS:
        auc = {row["k"]: row["auc"] for row in table if row["method"] == method}
        cells = [*auc.values()] if method == "raw" else []
        columns = [f"{auc[k]:9.4f}" if k in auc and not cells else f"{'':9}" for k in ks]
        found.append(f"  {method:<12}" + "".join([*columns, *(f"{each:9.4f}" for each in cells)]))
    return [line.rstrip() for line in found]


def _grouped(rows: Sequence[Row], by: Sequence[str]) -> list[tuple[tuple[Any, ...], list[Row]]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    return list(groups.items())


FILE = FamilyFile("probing", "a table of probing results", "over_sets")


def table_paths(evaluation: AnyPath) -> tuple[AnyPath, AnyPath]:
    """The table files beside an evaluation's: Parquet and JSON.

    >>> [path.name for path in table_paths(Path("runs/x/evaluation.json"))]
    ['evaluation.probing.parquet', 'evaluation.probing.json']
    """
    return beside(evaluation, "probing.parquet"), FILE.path(evaluation)


def _is_parquet(path: AnyPath) -> bool:
    try:
        schema = parquet.read_schema(pa.BufferReader(read_bytes(path)))
    except pa.ArrowException:  # no Parquet at all
        return False
    return _HASH in (schema.metadata or {})


PARQUET = Kind("a table of probing results", _is_parquet)


def write_tables(evaluation: AnyPath, rows: Sequence[Row], protocol_hash: str) -> None:
    """Write both files beside an evaluation's, in the place of earlier ones.

    Raises InputError if something else is there, ArtefactError if they cannot be written.
    """
    parquet_path, _ = table_paths(evaluation)
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA)
    table = table.replace_schema_metadata({_HASH: protocol_hash.encode()})
    stream = io.BytesIO()
    parquet.write_table(table, stream, compression="zstd")
    if isinstance(parquet_path, Path):
        with (
            system_errors(str(parquet_path)),
            atomic_path(parquet_path, PARQUET, replace=True) as temporary,
        ):
            temporary.write_bytes(stream.getvalue())
    else:
        check_replaceable(parquet_path, PARQUET, replace=True)
        put(parquet_path, stream.getvalue())
    sets = by_set(rows)
    content = {"methods": dict(METHODS), "over_sets": over_sets(sets), "by_set": sets}
    FILE.write(evaluation, protocol_hash, content)
