"""Pareto fronts of error against L0, what stands on which side of one, and where to look next."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log

REACH = 1.1
"""how far below its smallest L0 a front is continued, as a factor"""
NEAR = 1.1
"""an L0 this near to a target, as a factor, has reached it"""
_STEP = 8.0


@dataclass(frozen=True)
class Point:
    """An SAE: mean features a row, and its error (FVU or delta CE; smaller is better)."""

    l0: float
    error: float


def front(points: Iterable[Point]) -> list[Point]:
    """Those that no other beats in both L0 and error, by L0."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.l0, p.error)):
        if not kept or point.error < kept[-1].error:
            kept.append(point)
    return kept


def hull(points: Iterable[Point]) -> list[Point]:
    """The front less what lies above a straight line (in log L0) between two others of it.

    Stricter on who is compared with it: a poor SAE with no other near it adds no dent.
    """
    kept: list[Point] = []
    for point in front(points):
        while len(kept) > 1 and _slope(kept[-2], point) <= _slope(kept[-2], kept[-1]):
            kept.pop()
        kept.append(point)
    return kept


def _slope(left: Point, right: Point) -> float:
    return (right.error - left.error) / log(right.l0 / left.l0)


def error_at(points: Sequence[Point], l0: float) -> float | None:
    """The error of a front at an L0, straight lines in log L0; None where it does not reach.

    Beyond its largest L0 it is that one's (fewer features, and no worse). Up to `REACH` below its
    smallest the first line is continued; further below nothing is known.
    """
    if not points or l0 * REACH < points[0].l0 or (l0 < points[0].l0 and len(points) == 1):
        return None
    if l0 >= points[-1].l0:
        return points[-1].error
    # the first line also serves what is below it
    left, right = next(pair for pair in pairwise(points) if l0 < pair[1].l0)
    return left.error + _slope(left, right) * log(l0 / left.l0)


def side(ours: float | None, best: float, interval: float) -> str:
    """Where ours stands by the best peer's front; an interval's half width makes it "on"."""
    if ours is None:
        return "not reached"
    if ours <= best:
        return "inside"
    return "on" if ours <= best + interval else "outside"


def next_coefficient(
    tried: Mapping[float, float], targets: Iterable[float], *, start: float, most: int
) -> float | None:
    """The coefficient to train with next so that an L0 is near each target; None if enough is done.

    Args:
        tried: L0 of each coefficient trained with; L0 falls with the coefficient.
        targets: the L0s wanted.
        start: the first coefficient.
        most: trainings in all.

    Straight lines in the logarithms, through the two tried that enclose a target or, if none do,
    through the two nearest; not further than a factor 8 from what was tried.
    """
    if not tried:
        return start
    if len(tried) >= most:
        return None
    known = [(log(max(l0, 1e-3)), log(value)) for value, l0 in tried.items()]
    known.sort(key=lambda pair: (pair[0], -pair[1]))
    for target in targets:
        wanted = log(target)
        if min(abs(at - wanted) for at, _ in known) <= log(NEAR):
            continue
        guess = float(f"{exp(_towards(known, wanted)):.3g}")
        if guess not in tried:
            return guess
    return None


def _towards(known: Sequence[tuple[float, float]], wanted: float) -> float:
    """Log coefficient for a log L0, from (log L0, log coefficient) in order of L0."""
    above = next((n for n, (at, _) in enumerate(known) if at > wanted), len(known))
    nearest = known[0] if above == 0 else known[-1]
    if 0 < above < len(known):
        nearest = min(known[above - 1], known[above], key=lambda pair: abs(pair[0] - wanted))
    slope = -1.0
    if len(known) > 1:
        (x0, y0), (x1, y1) = known[max(0, min(above - 1, len(known) - 2)) :][:2]
        if x1 > x0 and y1 < y0:  # else chance moved L0 the other way
            slope = (y1 - y0) / (x1 - x0)
    step = slope * (wanted - nearest[0])
    return nearest[1] + min(max(step, -log(_STEP)), log(_STEP))
