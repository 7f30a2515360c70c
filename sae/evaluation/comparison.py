"""Whether a metric of one SAE is better than that of another, or nothing can be said.

The measure is the metric's floor (`sae.evaluation.reliability`). Without one it is the intervals of
the two figures: with half widths h and h' a difference is told if it is above sqrt(h^2 + h'^2),
that of independent figures. Both are of the same documents, so that the difference is more certain
than that; but an interval knows nothing of how runs differ by their seed, so that some differences
that are told so are those of seeds.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from saescope.errors import InputError
from saescope.metrics import Metric

ROUNDING = 1e-5
"""relative difference below which two figures are equal: what the size of batches may change"""
Verdict = Literal["better", "worse", "differs", "cannot tell"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A metric of one SAE beside that of a first one."""

    verdict: Verdict
    difference: float | None
    """this one's less the first one's; None where one of them has no figure"""
    told: float | None
    """the smallest difference that is told; None where that is not known"""


def compared(
    row: Metric, first: Mapping[str, Any], other: Mapping[str, Any], told: float | None = None
) -> Comparison:
    """Compare a metric among the values of two evaluations of one protocol.

    Args: told is the metric's floor; if it is None, the intervals decide.

    >>> from saescope.metrics import metric
    >>> compared(metric("fvu"), {"fvu": 0.2}, {"fvu": 0.1}, told=0.05).verdict
    'better'
    >>> compared(metric("l0"), {"l0": 32.0}, {"l0": 64.0}, told=1.0).verdict
    'differs'
    """
    a, b = first.get(row.name), other.get(row.name)
    if a is None or b is None:
        return Comparison(verdict="cannot tell", difference=None, told=told)
    if told is None:
        half, other_half = (each.get(f"{row.name}_interval") for each in (first, other))
        if row.interval and half is not None and other_half is not None:
            told = math.hypot(half, other_half)
    difference = b - a
    verdict: Verdict = "cannot tell"
    if told is not None and abs(difference) > told:
        if row.better == "neither":
            verdict = "differs"
        else:
            verdict = "better" if (difference < 0) == (row.better == "lower") else "worse"
    return Comparison(verdict=verdict, difference=difference, told=told)


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What two tables of settings differ in, by dotted name; None stands for what one has not.

    >>> differing({"rows": 9, "probing": {"ks": [1]}}, {"rows": 8, "probing": {"ks": [1]}})
    {'rows': (9, 8)}
    >>> differing({"probing": {"ks": [1]}}, {})
    {'probing.ks': ([1], None)}
    """
    return dict(_differing(one, other, ""))


def _differing(
    one: Mapping[str, Any], other: Mapping[str, Any], before: str
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name in dict.fromkeys((*one, *other)):
        a, b = one.get(name), other.get(name)
        tables = [each for each in (a, b) if isinstance(each, Mapping)]
        if tables and all(each is None or isinstance(each, Mapping) for each in (a, b)):
            yield from _differing(a or {}, b or {}, f"{before}{name}.")
        elif a != b:
            yield f"{before}{name}", (a, b)


def in_words(found: Mapping[str, tuple[Any, Any]]) -> str:
    """What `differing` found as text.

    >>> in_words({"rows": (9, 8), "dtype": (None, "bfloat16")})
    'rows (9 and 8), dtype (none and bfloat16)'
    """
    return ", ".join(f"{name} ({_short(a)} and {_short(b)})" for name, (a, b) in found.items())


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


_LONGEST = 24


def check_one_protocol(evaluations: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise InputError, which names what differs, unless these evaluations are of one protocol."""
    (first, one), *others = evaluations.items()
    for name, other in others:
        if one["protocol_hash"] != other["protocol_hash"]:
            found = differing(one["protocol"], other["protocol"])
            raise InputError(
                f"{first} and {name} were measured under two protocols, so that their metrics "
                f"cannot be compared; they differ in: {in_words(found)}",
                where="protocol",
                given=f"{one['protocol_hash'][:12]} and {other['protocol_hash'][:12]}",
            )
