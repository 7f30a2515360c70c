"""Scores of removal and clamping as lines for people, and the file that they are written to.

NAME.FAMILY.json   means with intervals, and a row for each single result
"""

from collections.abc import Sequence

from sae.probing.family_file import FamilyFile
from sae.probing.kept_rows import Row
from sae.probing.text_features import METHODS
from saescope.paths import AnyPath


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


def write_removal(
    evaluation: AnyPath,
    family: str,
    scores: Sequence[Row],
    rows: Sequence[Row],
    protocol_hash: str,
) -> None:
    """Write a family's file beside an evaluation's; see `FamilyFile.write`."""
    content = {"methods": dict(METHODS), "scores": list(scores), "results": list(rows)}
    FamilyFile(family, "a table of results", "results").write(evaluation, protocol_hash, content)
