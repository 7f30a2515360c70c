"""In which metrics SAEs are better or worse than a first one, as far as that can be told."""

from collections.abc import Mapping, Sequence

from dashboards.reports.measured import Evaluation
from sae.evaluation.comparison import compared
from sae.evaluation.floors_file import RELIABILITY_FILE, reliability_beside
from sae.evaluation.written import measured_values, sections
from saescope.errors import ArtefactError
from saescope.pieces import Section, Table

_AT_ONE_FVU = "description_length"
"""the section whose metrics are compared at equal distortion only"""
_BY_INTERVALS = (
    "By the intervals of both figures: SAEs that differ in their seed alone may differ by as much "
    "(`saescope eval RUN... --reliability` measures that)."
)


def beside_first(evaluations: Sequence[Evaluation]) -> Section | None:
    """Those measured as the first one was, beside it; None if there are none."""
    first = evaluations[0]
    others = [each for each in evaluations[1:] if each.protocol_hash == first.protocol_hash]
    if not others:
        return None
    told, words = _floors(evaluations)
    return Section(
        title=f"Beside {first.name}",
        words=(
            words,
            "Metrics that are in no column cannot be told apart. Description lengths are left out: "
            "they are compared at one FVU.",
        ),
        tables=(
            Table(
                columns=("SAE", "better in", "worse in", "differs in"),
                rows=tuple((each.name, *_verdicts(first, each, told)) for each in others),
            ),
        ),
    )


def _floors(evaluations: Sequence[Evaluation]) -> tuple[Mapping[str, float] | None, str]:
    """The smallest difference that each metric tells, and what that is from; None: intervals."""
    first = evaluations[0]
    folders = [each.path.parent.parent for each in evaluations if each.path is not None]
    try:
        there = reliability_beside(folders)
    except ArtefactError as error:
        return None, f"{_BY_INTERVALS} {error}."
    for found in there.values():
        if found["protocol_hash"] == first.protocol_hash:
            floors = {name: each["smallest_difference"] for name, each in found["floors"].items()}
            seeds = len(found["runs"])
            return floors, f"By what {seeds} seeds of one recipe differ in ({RELIABILITY_FILE})."
    return None, _BY_INTERVALS


def _verdicts(
    first: Evaluation, other: Evaluation, told: Mapping[str, float] | None
) -> tuple[str, str, str]:
    """Labels of the metrics that are better, worse, and another."""
    one, another = measured_values(first.found), measured_values(other.found)
    apart = set(sections(first.found).get(_AT_ONE_FVU, {}))
    found: dict[str, list[str]] = {}
    for name, row in first.table.items():
        if row.minor or name in apart or one.get(name) is None or another.get(name) is None:
            continue
        if told is not None and name not in told:  # it is not known how seeds differ in it
            continue
        verdict = compared(row, one, another, None if told is None else told[name]).verdict
        found.setdefault(verdict, []).append(row.label)
    better, worse, differs = (", ".join(found.get(v, ())) for v in ("better", "worse", "differs"))
    return better, worse, differs
