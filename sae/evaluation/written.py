"""evaluation.json: what `saescope eval` measured, sealed by its own sha256.

It has a protocol with its hash, and a section for each kind of measurement: a table of numbers by
the names of the metrics (`saescope.metrics`), or null for what was not measured.
"""

from collections.abc import Mapping
from typing import Any

from sae.evaluation import OwnTexts, families
from saescope.artefact import DamagedError, check_schema, check_seal, read_json
from saescope.metrics import Metric, measured_rows, metric_table, shown_with_interval
from saescope.paths import AnyPath

EVALUATION_FILE = "evaluation.json"
SCHEMA = 2
"""the first was not written into the file, and had no sha256"""
ROWS = "metrics"
"""key of the rows that the table of metrics of this package lacks"""
_COUNTED = {"rows": "held-out activations", "tokens": "held-out tokens"}
"""values that say how much was measured; families with texts of their own have others"""


def read_evaluation(path: AnyPath) -> dict[str, Any]:
    """What was measured; ArtefactError if the file is missing, damaged or newer."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise DamagedError("is no evaluation", where=str(path))
    check_schema(found.get("schema", 1), supported=SCHEMA, where=str(path))
    check_seal(found, must="schema" in found, where=str(path))
    return found


def is_of_kind(path: AnyPath, kind: str) -> bool:
    """Whether a file is JSON that says it is of this kind."""
    found = read_json(path)
    return isinstance(found, dict) and found.get("kind") == kind


def read_of_kind(path: AnyPath, kind: str, *, schema: int, wrong: str) -> dict[str, Any]:
    """A sealed file of this kind; ArtefactError if it is missing, damaged, newer or another one.

    Args: wrong is what is said of another one.
    """
    found = read_json(path)
    if not isinstance(found, dict) or found.get("kind") != kind:
        raise DamagedError(wrong, where=str(path))
    check_schema(found.get("schema"), supported=schema, where=str(path))
    check_seal(found, must=True, where=str(path))
    return found


def sections(evaluation: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What was measured, by section.

    >>> sections({"protocol": {"rows": 9}, "reconstruction": {"l0": 3.0}, "downstream": None})
    {'reconstruction': {'l0': 3.0}}
    """
    return {
        name: found
        for name, found in evaluation.items()
        if isinstance(found, dict) and name != "protocol"
    }


def measured_values(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was measured, of all sections, by name."""
    return {name: value for found in sections(evaluation).values() for name, value in found.items()}


def rows_of(evaluation: Mapping[str, Any]) -> dict[str, Metric]:
    """The table of metrics, with the rows that this evaluation carries."""
    return metric_table(evaluation.get(ROWS), where=EVALUATION_FILE)


def report(evaluation: Mapping[str, Any]) -> list[str]:
    """The metrics as lines for people: of each section what it was measured on, then its metrics.

    Where a metric was measured at several sites, `name`_by_site has each site's.
    """
    rows, found = rows_of(evaluation), sections(evaluation)
    width = max(
        (len(row.label) for each in found.values() for row in measured_rows(each, rows)), default=0
    )
    lines: list[str] = []
    seen: set[str] = set()
    for name, values in found.items():
        about = measured_on(name, values)
        if about in seen:
            about = f"{name.replace('_', ' ')}, on the same"
        seen.add(about)
        if not lines:
            unit = next(
                (each.unit for each in _own_texts() if each.counted[0] in values), "documents"
            )
            about += (
                f" (protocol {evaluation['protocol_hash'][:12]}; ± is half of a 95% interval, "
                f"{unit} as the unit)"
            )
        lines.append(f"{about}:")
        for row in measured_rows(values, rows):
            text = shown_with_interval(row, values, unit=True)
            lines.append(f"  {row.label:<{width}}  {text}")
            for site, value in values.get(f"{row.name}_by_site", {}).items():
                lines.append(f"  {'':<{width}}  {row.shown(value)} at {site}")
    return lines


def measured_on(section: str, values: Mapping[str, Any]) -> str:
    """What a section's metrics were measured on; its name where it does not say.

    >>> measured_on("reconstruction", {"rows": 7426, "documents": 68})
    'on 7,426 held-out activations of 68 documents'
    """
    words = _COUNTED
    if not values.keys() & words:  # the other families are imported, and torch with them
        words = dict(each.counted for each in _own_texts())
    counted = next((key for key in words if key in values), None)
    if counted is None:
        return section
    documents = values.get("documents")
    of = "" if documents is None else f" of {documents:,} documents"
    return f"on {values[counted]:,} {words[counted]}{of}"


def _own_texts() -> list[OwnTexts]:
    return [family.texts for family in families().values() if family.texts is not None]
