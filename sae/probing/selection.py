"""Which features tell a label: the standardised mean difference, on training rows alone.

    SMD = (m1 - m0) / sqrt((v1 + v0) / 2)

with m and v the mean and sample variance of a feature over the rows with the label and without it
(Cohen's d with both variances weighing the same). A feature that differs and varies in neither
class has an SMD of plus or minus infinity.
"""

from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from sae.probing.logistic import Labels, Matrix
from saescope.errors import InputError

Features = Matrix | sparse.csr_array
"""values [rows, features], dense or sparse"""


def standardised_mean_difference(features: Features, y: Labels) -> Matrix:
    """The SMD of each feature [features] over rows with labels y [rows].

    Raises InputError if all labels are equal.

    >>> standardised_mean_difference(np.array([[0.0], [2.0], [4.0], [6.0]]), np.arange(4) > 1)
    array([2.82842712])
    """
    if y.all() or not y.any():
        raise InputError("all labels are equal", where="selection", given=f"{len(y)} labels")
    (mean1, variance1), (mean0, variance0) = (_moments(features[each]) for each in (y, ~y))
    difference = mean1 - mean0
    # equal values added up in another order differ in their last bits, which is no difference
    rounding = 1e-12 * np.maximum(np.abs(mean1), np.abs(mean0))
    difference = np.where(np.abs(difference) <= rounding, 0.0, difference)
    spread = np.sqrt((variance1 + variance0) / 2)
    spread = np.where(spread <= rounding, 0.0, spread)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = difference / spread
    return np.where(difference == 0, 0.0, found)


def _moments(features: Features) -> tuple[Matrix, Matrix]:
    """Mean and sample variance of each column; the variance of a single row is 0."""
    if isinstance(features, np.ndarray):
        count = len(features)
        mean = features.mean(0)
        squares = ((features - mean) ** 2).sum(0)
    else:
        count, width = cast("tuple[int, int]", features.shape)
        column, value = features.indices, features.data
        mean = np.bincount(column, value, width) / count
        squares = np.bincount(column, (value - mean[column]) ** 2, width).astype(np.float64)
        squares += (count - np.bincount(column, minlength=width)) * mean**2
    return mean, squares / max(1, count - 1)


def strongest(difference: Matrix, k: int) -> NDArray[np.int64]:
    """The k features of largest |SMD|, the largest first; of equal ones the first.

    >>> strongest(np.array([0.5, -2.0, 0.5, np.inf]), 3)
    array([3, 1, 0])
    """
    return np.argsort(-np.abs(difference), kind="stable")[:k]


def columns(features: Features, chosen: NDArray[np.int64]) -> Matrix:
    """Dense values [rows, chosen] of some features."""
    found = features[:, chosen]
    return found if isinstance(found, np.ndarray) else found.toarray()
