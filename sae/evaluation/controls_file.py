"""controls.json: an SAE beside what every metric has to rank below it, sealed by its own sha256.

It has the evaluation's protocol and how the controls were made, with its hash, the metrics of the
trained SAE and of each control, and how each metric ranks each of them (`sae.evaluation.controls`).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from sae.evaluation.ranks import ranking_in_words
from sae.evaluation.written import EVALUATION_FILE, is_of_kind, read_of_kind, rows_of
from sae.probing.family_file import beside
from saescope.paths import AnyPath
from saescope.replacing import Kind

CONTROLS_FILE = "controls.json"
SCHEMA = 1
KIND = "controls"
CONTROLS_KIND = Kind("what --controls measured", partial(is_of_kind, kind=KIND))


def controls_file(evaluation: AnyPath) -> AnyPath:
    """Where it is written, beside an evaluation's file.

    >>> from pathlib import Path
    >>> controls_file(Path("runs/x/evaluation.json")).name, controls_file(Path("mine.json")).name
    ('controls.json', 'mine.controls.json')
    """
    if evaluation.name == EVALUATION_FILE:
        return evaluation.with_name(CONTROLS_FILE)
    return beside(evaluation, CONTROLS_FILE)


def read_controls(path: AnyPath) -> dict[str, Any]:
    """What was measured; ArtefactError if the file is missing, damaged, newer or another one."""
    return read_of_kind(path, KIND, schema=SCHEMA, wrong="are no controls of an evaluation")


def controls_lines(found: Mapping[str, Any]) -> list[str]:
    """A table for people, with a metric a line."""
    values, rows = found["values"], rows_of(found)
    table = [["metric", *values, "the metric"]]
    for name, ranks in found["ranks"].items():
        row = rows[name]
        figures = [each.get(name) for each in values.values()]
        shown = ["-" if value is None else row.shown(value) for value in figures]
        table.append([row.label, *shown, ranking_in_words(row, ranks)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            [line[0].ljust(widths[0]), *map(str.rjust, line[1:-1], widths[1:-1]), line[-1]]
        ).rstrip()
        for line in table
    ]
