"""Metrics of several SAEs beside those of a first one: better, worse, or nobody can tell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sae.evaluation.comparison import Comparison, check_one_protocol, compared
from sae.evaluation.floors_file import read_reliability, reliability_beside, smallest_differences
from sae.evaluation.written import measured_values, rows_of
from sae.formats.hub import SCHEME, evaluation_of
from saescope.errors import InputError
from saescope.metrics import Metric
from saescope.paths import as_path

_WITHOUT = (
    "by the intervals of both figures, as there is no floor: seeds alone may differ by as much "
    "(`saescope eval RUN... --reliability` measures that)"
)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What decides whether a difference is told."""

    told: Mapping[str, float] | None
    """the smallest difference told of each metric; None: the intervals decide"""
    words: str
    """the same for people"""

    @classmethod
    def of(
        cls, evaluations: Mapping[str, Mapping[str, Any]], reliability: str | None = None
    ) -> "Scale":
        """That of a file, or of a reliability.json beside one of the runs, or none.

        Raises InputError for a file of another protocol, ArtefactError if one cannot be read.
        """
        first = next(iter(evaluations.values()))
        if reliability is not None:
            path = as_path(reliability)
            found = read_reliability(path)
        else:
            beside = [as_path(name).parent for name in evaluations if not name.startswith(SCHEME)]
            there = reliability_beside(beside)
            fitting = [
                each for each in there.items() if each[1]["protocol_hash"] == first["protocol_hash"]
            ]
            if not fitting:
                others = "".join(f"; {path} is of another protocol" for path in there)
                return cls(told=None, words=_WITHOUT + others)
            path, found = fitting[0]
        return cls(
            told=smallest_differences(found, first, where=str(path)),
            words=f"by what {len(found['runs'])} seeds of one recipe differ in ({path})",
        )

    def compare(
        self, row: Metric, first: Mapping[str, Any], other: Mapping[str, Any]
    ) -> Comparison:
        """Compare a metric among the values of two evaluations."""
        if self.told is None:
            return compared(row, first, other)
        if row.name not in self.told:  # it is not known how seeds differ in it
            return Comparison(verdict="cannot tell", difference=None, told=None)
        return compared(row, first, other, self.told[row.name])


def evaluations_of(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The evaluations of SAEs by name, without those of which there is none.

    Raises InputError if two SAEs have one name, ArtefactError if one cannot be read.
    """
    if len(set(names)) < len(names):
        raise InputError("the same SAE twice", where="compare", given=list(names))
    found = {name: evaluation_of(name) for name in names}
    return {name: each for name, each in found.items() if each is not None}


def metric_lines(evaluations: Mapping[str, Mapping[str, Any]], scale: Scale) -> list[str]:
    """Each SAE but the first, metric by metric, beside the first; lines for people.

    Raises InputError for evaluations of two protocols.
    """
    check_one_protocol(evaluations)
    (first, one), *others = evaluations.items()
    lines = [f"metrics are compared {scale.words}"]
    for name, other in others:
        values = [measured_values(each) for each in (one, other)]
        table = [["metric", "first", "this", "difference", "told from", "this is"]]
        for row in _shown(values, rows_of(one) | rows_of(other)):
            found = scale.compare(row, values[0], values[1])
            figures = [_shown_value(row, each.get(row.name)) for each in values]
            by = "-" if found.difference is None else f"{found.difference:+.2g}"
            told = "not known" if found.told is None else f"{found.told:.2g}"
            table.append([row.label, *figures, by, told, found.verdict])
        lines += [f"{name} (this) beside {first} (first):", *_aligned(table)]
    return lines


def summary_lines(evaluations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Of each SAE but the first a line: in which metrics it is better, worse, or nobody can tell.

    By a reliability.json beside the SAEs, or by intervals; one of another protocol is only named.
    No lines for fewer than two.
    """
    if len(evaluations) < 2:
        return []
    (first, one), *others = evaluations.items()
    scale = Scale.of(evaluations)
    lines = [f"beside {first}, {scale.words}:"]
    for name, other in others:
        if other["protocol_hash"] != one["protocol_hash"]:
            lines.append(f"  {name}: not compared, as it was measured under another protocol")
            continue
        values = [measured_values(each) for each in (one, other)]
        verdicts: dict[str, list[str]] = {}
        for row in _shown(values, rows_of(one) | rows_of(other)):
            verdict = scale.compare(row, values[0], values[1]).verdict
            verdicts.setdefault(verdict, []).append(row.label)
        said = [
            f"{verdict} in {', '.join(verdicts[verdict])}"
            for verdict in ("better", "worse")
            if verdict in verdicts
        ]
        if "differs" in verdicts:
            said.append(f"another {', '.join(verdicts['differs'])}")
        lines.append(f"  {name}: {'; '.join(said) or 'no difference is told'}")
    return lines


def _shown(values: Sequence[Mapping[str, Any]], rows: Mapping[str, Metric]) -> list[Metric]:
    return [
        row
        for name, row in rows.items()
        if not row.minor and any(each.get(name) is not None for each in values)
    ]


def _shown_value(row: Metric, value: float | None) -> str:
    return "-" if value is None else row.shown(value)


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            [
                f"  {line[0]:<{widths[0]}}",
                *map(str.rjust, line[1:-1], widths[1:-1]),
                line[-1],
            ]
        )
        for line in table
    ]
