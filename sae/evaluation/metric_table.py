"""evaluation.parquet: the metrics of an evaluation as rows, so that those of many runs make one.

    pandas.concat(map(pandas.read_parquet, Path("runs").rglob("evaluation.parquet")))

It says what evaluation.json says, beside which it is, and which SAE that is of.
"""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from sae.evaluation import families
from sae.evaluation.written import rows_of, sections
from sae.probing.family_file import beside
from saescope.artefact import SEAL, DamagedError, atomic_path, sha256_json
from saescope.metrics import measured_rows
from saescope.paths import AnyPath, exists, put, read_bytes
from saescope.replacing import Kind, check_replaceable
from saescope.system import system_errors

SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("sae_hash", pa.string()),
        ("architecture", pa.string()),
        ("d_in", pa.int64()),
        ("d_sae", pa.int64()),
        ("suite", pa.string()),
        ("family", pa.string()),
        ("section", pa.string()),
        ("name", pa.string()),
        ("label", pa.string()),
        ("unit", pa.string()),
        ("site", pa.string()),
        ("value", pa.float64()),
        ("interval", pa.float64()),
        ("better", pa.string()),
        ("protocol_hash", pa.string()),
    ]
)
_PROTOCOL, _EVALUATION, _ROWS = b"protocol_hash", b"evaluation_sha256", b"rows_sha256"


def metric_table_path(evaluation: AnyPath) -> AnyPath:
    """The table beside an evaluation's file.

    >>> metric_table_path(Path("runs/x/evaluation.json")).name
    'evaluation.parquet'
    """
    return beside(evaluation, "parquet")


def metric_rows(evaluation: Mapping[str, Any], about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each metric that was measured, and of one measured at several sites also for each.

    Args: about says of the SAE its run, sae_hash, architecture, d_in and d_sae.

    `value` is None where a metric is undefined, `interval` (half of the 95% interval) where it has
    none or too few documents were there; `site` is None but for the values of single sites.
    """
    own = {"protocol_hash": evaluation["protocol_hash"]}
    return [{**about, **row, **own} for row in _measured(evaluation)]


def _measured(evaluation: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    table, found = rows_of(evaluation), sections(evaluation)
    for family in families().values():
        values = found.get(family.section, {})
        own = {metric.name for metric in family.metrics}
        for row in measured_rows(values, table):
            if row.name not in own:
                continue
            about = {
                "suite": family.suite,
                "family": family.name,
                "section": family.section,
                "name": row.name,
                "label": row.label,
                "unit": row.unit,
                "better": row.better,
            }
            interval = values.get(f"{row.name}_interval")
            yield {**about, "site": None, "value": values[row.name], "interval": interval}
            for site, value in values.get(f"{row.name}_by_site", {}).items():
                yield {**about, "site": site, "value": value, "interval": None}


def _is_metric_table(path: AnyPath) -> bool:
    try:
        schema = parquet.read_schema(pa.BufferReader(read_bytes(path)))
    except pa.ArrowException:  # no Parquet at all
        return False
    return {_PROTOCOL, _EVALUATION} <= (schema.metadata or {}).keys()


METRIC_TABLE = Kind("a table of metrics", _is_metric_table)


def write_metric_table(
    evaluation: AnyPath, written: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """Write the table of what was written to an evaluation's file, in the place of an earlier one.

    Args: about is that of `metric_rows`.

    Raises InputError if something else is there, ArtefactError if it cannot be written.
    """
    path = metric_table_path(evaluation)
    table = pa.Table.from_pylist(metric_rows(written, about), schema=SCHEMA)
    seals = {
        _PROTOCOL: written["protocol_hash"],
        _EVALUATION: written.get(SEAL, ""),
        _ROWS: sha256_json(table.to_pylist()),
    }
    stream = io.BytesIO()
    parquet.write_table(
        table.replace_schema_metadata(seals), stream, compression="zstd", write_page_checksum=True
    )
    if isinstance(path, Path):
        with system_errors(str(path)), atomic_path(path, METRIC_TABLE, replace=True) as temporary:
            temporary.write_bytes(stream.getvalue())
    else:
        check_replaceable(path, METRIC_TABLE, replace=True)
        put(path, stream.getvalue())


def read_metric_table(evaluation: AnyPath, written: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table beside an evaluation that says `written`.

    No rows if there is no table. Raises DamagedError for one that is damaged, or that is of another
    evaluation.
    """
    path = metric_table_path(evaluation)
    if not exists(path):
        return []
    try:
        source = pa.BufferReader(read_bytes(path))
        table = parquet.read_table(source, page_checksum_verification=True)
        rows = table.to_pylist()
        seals = table.schema.metadata or {}
        whole = seals[_ROWS].decode() == sha256_json(rows)
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise DamagedError(f"damaged table: {error}", where=str(path)) from error
    if not whole:
        raise DamagedError("its content does not match its own sha256", where=str(path))
    if seals.get(_EVALUATION) != str(written.get(SEAL, "")).encode():
        raise DamagedError(f"is not of what {evaluation.name} says", where=str(path))
    return rows
