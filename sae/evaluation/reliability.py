"""The smallest difference that a metric can tell, from runs that differ in nothing but their seed.

R runs of one recipe are measured under one protocol, each on all held-out documents and on each of
G groups of them. Let y_r be a metric of run r on all documents and y_rg on group g. With

    s^2 = sum over r of (y_r - mean y)^2 / (R - 1)

two further runs A and B of this recipe, measured under this protocol, differ by y_A - y_B, which is
normal with mean 0 and variance 2 sigma^2 (y_A and y_B are independent draws of a law of variance
sigma^2). (R - 1) s^2 / sigma^2 is chi-squared with R - 1 degrees of freedom and independent of
them, so that (y_A - y_B) / (sqrt(2) s) has Student's law, and

    smallest difference = t_{0.975, R-1} sqrt(2) s

is passed by |y_A - y_B| in 5% of cases where the recipes are the same. s holds all in which two
runs differ on the same documents: their seeds, and that one seed does better on some documents than
another. What the documents do to both alike cancels, as both are measured on them.

What is left to the sample is told apart from that, by random groups (Wolter 2007, "Introduction to
Variance Estimation", chapter 2; the two-way table without repetition of Scheffe 1959, chapter 4):

    measurement sd = sqrt(mean over r of (variance over g of y_rg) / G)
    paired sd      = sqrt(sum over r and g of (y_rg - y_r. - y_.g + y_..)^2 / ((R-1)(G-1)) / G)

The first is by how much a figure alone would move with other documents; the second is the part of
it that does not cancel between two runs. Where it is near s, more held-out tokens tell smaller
differences; where it is far below, only more seeds do. Where a metric has a seed of its own instead
of documents, g are seeds, of which a figure has one, and nothing is divided by G.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from sae.evaluation.comparison import ROUNDING
from sae.evaluation.intervals import t_quantile

FEWEST = 3
"""runs from which a spread is told; five are advised"""


@dataclass(frozen=True, kw_only=True)
class Floor:
    """How far a metric can be trusted, in the metric's own unit."""

    mean: float
    """over the runs"""
    seed_sd: float
    """standard deviation of a run's figure over seeds, on the same documents"""
    measurement_sd: float | None
    """standard deviation of a figure over documents (or seeds of the metric) drawn anew; None:
    too few documents, or nothing that could be drawn anew"""
    paired_sd: float | None
    """the part of it that does not cancel between two runs on the same documents"""
    smallest_difference: float
    """of one run from one other, told with 95% confidence"""
    values: tuple[float, ...]
    """the runs' figures"""


def smallest_difference(values: Sequence[float]) -> float:
    """What two runs must differ by for the difference to be told, from figures of equal runs.

    Raises ValueError for fewer than 2.

    >>> round(smallest_difference([1.0, 2.0, 3.0]), 4)  # s = 1, t of 2 degrees 4.3027
    6.0849
    """
    if len(values) < 2:
        raise ValueError("a spread needs two figures or more")
    told = t_quantile(len(values) - 1) * math.sqrt(2) * stdev(values)
    return max(told, ROUNDING * abs(fmean(values)))


def floor(
    values: Sequence[float],
    groups: Sequence[Sequence[float]] = (),
    *,
    shares: bool = True,
) -> Floor:
    """The floor of a metric, from its figure of each run, two or more.

    Args:
        groups: of each run, its figures on groups of documents, or with further seeds of the
            metric; as many of each run, two or more, or none at all.
        shares: whether these are groups that a figure is measured on together, or seeds, of which
            it has one.
    """
    measurement = paired = None
    if groups:
        count = len(groups[0])
        divisor = count if shares else 1
        measurement = math.sqrt(fmean(stdev(each) ** 2 for each in groups) / divisor)
        of_run = [fmean(each) for each in groups]
        of_group = [fmean(each) for each in zip(*groups, strict=True)]
        middle = fmean(of_run)
        left = sum(
            (value - of_run[r] - of_group[g] + middle) ** 2
            for r, each in enumerate(groups)
            for g, value in enumerate(each)
        )
        paired = math.sqrt(left / ((len(groups) - 1) * (count - 1)) / divisor)
    return Floor(
        mean=fmean(values),
        seed_sd=stdev(values),
        measurement_sd=measurement,
        paired_sd=paired,
        smallest_difference=smallest_difference(values),
        values=tuple(values),
    )
