"""reliability.json: what `saescope eval --reliability` measured, sealed by its own sha256.

It has the protocol with its hash, the runs with their seeds, their common settings, and of each
metric its floor (`sae.evaluation.reliability.Floor`).
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from sae.evaluation.comparison import differing, in_words
from sae.evaluation.written import is_of_kind, read_of_kind
from saescope.errors import InputError
from saescope.metrics import Metric
from saescope.paths import AnyPath, exists
from saescope.replacing import Kind

RELIABILITY_FILE = "reliability.json"
SCHEMA = 1
_NAME = "reliability"
RELIABILITY = Kind("what --reliability measured", partial(is_of_kind, kind=_NAME))


def read_reliability(path: AnyPath) -> dict[str, Any]:
    """What was measured; ArtefactError if the file is missing, damaged, newer or another one."""
    return read_of_kind(path, _NAME, schema=SCHEMA, wrong="is no reliability of metrics")


def smallest_differences(
    found: Mapping[str, Any], evaluation: Mapping[str, Any], *, where: str
) -> dict[str, float]:
    """The smallest difference told of each metric; InputError if it is of another protocol."""
    if found["protocol_hash"] != evaluation["protocol_hash"]:
        words = in_words(differing(evaluation["protocol"], found["protocol"]))
        raise InputError(
            f"was measured under another protocol than these runs; they differ in: {words}",
            where=where,
            given=found["protocol_hash"][:12],
            allowed=evaluation["protocol_hash"][:12],
        )
    return {name: each["smallest_difference"] for name, each in found["floors"].items()}


def reliability_beside(folders: Iterable[AnyPath]) -> dict[AnyPath, dict[str, Any]]:
    """What the reliability.json of each folder that has one says; ArtefactError if damaged."""
    paths = [folder / RELIABILITY_FILE for folder in dict.fromkeys(folders)]
    return {path: read_reliability(path) for path in paths if exists(path)}


def reliability_lines(found: Mapping[str, Any], rows: Mapping[str, Metric]) -> list[str]:
    """A table for people, with a metric a line."""
    table = [["metric", "mean", "seed sd", "sample sd", "paired sd", "told from"]]
    for name, each in found["floors"].items():
        row = rows[name]
        spreads = [
            each[key] for key in ("seed_sd", "measurement_sd", "paired_sd", "smallest_difference")
        ]
        table.append([row.label, row.shown(each["mean"]), *(_spread(row, it) for it in spreads)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in table
    ]


def _spread(row: Metric, value: float | None) -> str:
    """A spread with two figures, in the unit that the metric is written in."""
    if value is None:
        return "-"
    return f"{100 * value:.2g}%" if row.form.endswith("%") else f"{value:.2g}"
