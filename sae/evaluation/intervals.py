"""95% intervals of ratios whose rows depend on each other within documents.

FVU, CE and KL are ratios of sums over rows, R = sum A / sum B. Rows of one document are alike, so
the unit is the document: with A_g, B_g its sums and u_g = A_g - R B_g,

    var R = G / (G - 1) * sum_g u_g^2 / (sum B)^2,   half width = t_{0.975, G-1} sqrt(var R)

the linearised variance of a ratio under clustered sampling with Student's t for G documents
(Cochran 1977, "Sampling Techniques", sections 6.3 and 9A.2; Cameron and Miller 2015, section VI).
That FVU's mean is of the same rows changes nothing to first order, as the sum of squares is least
there. Of one document nothing can be said.
"""

import math

import torch
from torch import Tensor

PROTOCOL = "95%, documents as the unit, linearised ratio, Student's t"
"""how protocols name these intervals"""


def by_cluster(values: Tensor, cluster: Tensor) -> Tensor:
    """Sums of values [n] over each cluster that there is, by its number int64 [n]: [clusters].

    >>> import torch
    >>> by_cluster(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([7, 3, 7])).tolist()
    [2.0, 5.0]
    """
    found, place = cluster.unique(return_inverse=True)
    return values.new_zeros(len(found)).index_add(0, place, values)


def half_width(numerator: Tensor, denominator: Tensor) -> float | None:
    """Half of the 95% interval of sum(numerator) / sum(denominator), from clusters' sums [G].

    None of fewer than 2 clusters: too few.
    """
    count = len(numerator)
    if count < 2:
        return None
    numerator, denominator = numerator.double(), denominator.double()
    total = denominator.sum()
    beyond = numerator - numerator.sum() / total * denominator
    spread = math.sqrt(count / (count - 1) * float(beyond.square().sum()))
    return t_quantile(count - 1) * spread / float(total.abs())


def ratio(
    numerator: Tensor, denominator: Tensor, cluster: Tensor | None
) -> tuple[float | None, float | None]:
    """sum(numerator) / sum(denominator) of rows [n], and half of its 95% interval.

    The unit is the cluster int64 [n] that rows are of, or the row where that is None. Both are None
    unless the denominator's sum is above 0.

    >>> import torch
    >>> ratio(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]), None)[0]
    2.0
    """
    total = float(denominator.sum(dtype=torch.float64))
    if not total > 0:
        return None, None
    value = float(numerator.sum(dtype=torch.float64)) / total
    if cluster is not None:
        numerator, denominator = (by_cluster(x, cluster) for x in (numerator, denominator))
    return value, half_width(numerator, denominator)


def t_quantile(degrees: int, level: float = 0.95) -> float:
    """The t that |T| is below with probability `level`, T of Student's law.

    >>> round(t_quantile(1), 3), round(t_quantile(49), 3)
    (12.706, 2.01)
    """
    low, high = 0.0, 1.0
    while _within(high, degrees) < level:
        high *= 2
    while low < (middle := (low + high) / 2) < high:
        if _within(middle, degrees) < level:
            low = middle
        else:
            high = middle
    return high


def _within(t: float, degrees: int) -> float:
    """P(|T| < t): a finite series (Abramowitz and Stegun 26.7.3 and 4)."""
    if degrees > _MANY:  # two terms of its expansion about the normal law (26.7.8)
        z = t * (1 - 1 / (4 * degrees)) / math.sqrt(1 + t * t / (2 * degrees))
        return math.erf(z / math.sqrt(2))
    angle = math.atan(t / math.sqrt(degrees))
    cosine, sine = math.cos(angle) ** 2, math.sin(angle)
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * cosine
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


_MANY = 1000
"""degrees of freedom from which the expansion is exact to 8 digits"""
