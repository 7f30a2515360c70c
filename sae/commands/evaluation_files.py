"""The files of an evaluation in a run's folder, and whether each is what was written.

    evaluation.json          what was measured
    evaluation.parquet       its metrics as rows (`sae.evaluation.metric_table`)
    evaluation.FAMILY.json   a table of a family, as evaluation.probing.json
    evaluation.FAMILY.parquet
    controls.json            the same of controls (`sae.evaluation.controls_file`)
    evaluation.unfinished    what is measured of one that was interrupted

All but the last two carry the hash of one protocol.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from sae.core.base import SparseAutoencoder, kind_of
from sae.data.provenance import weights_hash
from sae.evaluation.controls_file import CONTROLS_FILE, read_controls
from sae.evaluation.metric_table import (
    METRIC_TABLE,
    metric_table_path,
    read_metric_table,
    write_metric_table,
)
from sae.evaluation.unfinished_file import read_unfinished, unfinished_file
from sae.evaluation.written import EVALUATION_FILE, read_evaluation
from saescope.artefact import DamagedError, check_seal, read_json
from saescope.paths import AnyPath
from saescope.replacing import check_replaceable

UNFINISHED_FILE = unfinished_file(Path(EVALUATION_FILE)).name
_READERS = {
    EVALUATION_FILE: read_evaluation,
    CONTROLS_FILE: read_controls,
    UNFINISHED_FILE: read_unfinished,
}
_TABLE = re.compile(r"evaluation\.[a-z][a-z0-9_]*\.(json|parquet)")


def evaluation_files(folder: Path) -> list[str]:
    """The names of those that are in a folder, the evaluation itself first."""
    table = metric_table_path(folder / EVALUATION_FILE).name
    own = (EVALUATION_FILE, table, CONTROLS_FILE, UNFINISHED_FILE)
    tables = sorted(path.name for path in folder.iterdir() if _TABLE.fullmatch(path.name))
    return [*(name for name in own if (folder / name).exists()), *tables]


def check_evaluation_file(path: Path) -> None:
    """Raise ArtefactError for one that is damaged, or is of another evaluation than its own."""
    if path.name in _READERS:
        _READERS[path.name](path)
        return
    evaluation = path.with_name(EVALUATION_FILE)
    if not evaluation.exists():
        what = f"the evaluation that it is a table of ({EVALUATION_FILE}) is missing"
        raise DamagedError(what, where=str(path), kind="missing")
    written = read_evaluation(evaluation)
    if path == metric_table_path(evaluation):
        read_metric_table(evaluation, written)
    elif _protocol_of(path) != written.get("protocol_hash"):
        raise DamagedError(
            f"is of another evaluation than {EVALUATION_FILE}; saescope eval --replace measures it "
            "again",
            where=str(path),
        )


def _protocol_of(path: Path) -> Any:
    if path.suffix == ".json":
        return _json(path).get("protocol_hash")
    try:
        table = parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(f"damaged table: {error}", where=str(path)) from error
    return (table.schema.metadata or {}).get(b"protocol_hash", b"").decode("utf-8", "replace")


def _json(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict):
        raise DamagedError("is no table of an evaluation", where=str(path))
    check_seal(found, must=True, where=str(path))
    return found


def check_metric_table(evaluation: AnyPath) -> None:
    """Raise InputError if something else is where the table of an evaluation is to be."""
    check_replaceable(metric_table_path(evaluation), METRIC_TABLE, replace=True)


def write_metrics(
    evaluation: AnyPath, written: Mapping[str, Any], run: str, sae: SparseAutoencoder
) -> None:
    """Write the table of what was written to an evaluation's file, in the place of an earlier one.

    Raises InputError if something else is there, ArtefactError if it cannot be written.
    """
    about = {
        "run": run,
        "sae_hash": weights_hash(sae),
        "architecture": kind_of(sae.config),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
    }
    write_metric_table(evaluation, written, about)
