"""Scores of removal and clamping as lines for people, and the file that they are written to.

NAME.FAMILY.json   means with intervals, and a row for each single result
"""

from collections.abc import Sequence

from sae.probing.kept_rows import Row
from sae.probing.text_features import METHODS
from saescope.artefact import read_json, write_report
from saescope.paths import AnyPath
from saescope.replacing import Kind
from saescope.seals import sealed


def removal_lines(label: str, value: str, scores: Sequence[Row]) -> list[str]:
    """The means over all texts, a method a line and a number of features a column."""
    means = [row for row in scores if row.get("pair", row.get("group")) is None]
    ns = sorted({row["n"] for row in means})
    found = [f"  {label:<12}" + "".join(f"{f'n={n}':>9}" for n in ns)]
    for method in METHODS:
        values = {row["n"]: row[value] for row in means if row["method"] == method}
        cells = (f"{'-':>9}" if values[n] is None else f"{values[n]:>+9.3f}" for n in ns)
        found.append(f"  {method:<12}" + "".join(cells))
    return found


def removal_path(evaluation: AnyPath, family: str) -> AnyPath:
    """The file of a family beside an evaluation's.

    >>> from pathlib import Path
    >>> removal_path(Path("runs/x/evaluation.json"), "scr").name
    'evaluation.scr.json'
    """
    return evaluation.with_name(f"{evaluation.name.removesuffix('.json')}.{family}.json")


def _is_results(path: AnyPath) -> bool:
    found = read_json(path)
    return isinstance(found, dict) and "protocol_hash" in found and "results" in found


RESULTS = Kind("a table of results", _is_results)


def write_removal(
    evaluation: AnyPath,
    family: str,
    scores: Sequence[Row],
    rows: Sequence[Row],
    protocol_hash: str,
) -> None:
    """Write a family's file beside an evaluation's, in the place of an earlier one.

    Raises InputError if something else is there, ArtefactError if it cannot be written.
    """
    content = {
        "schema": 1,
        "protocol_hash": protocol_hash,
        "methods": dict(METHODS),
        "scores": list(scores),
        "results": list(rows),
    }
    write_report(removal_path(evaluation, family), sealed(content), RESULTS, replace=True)
