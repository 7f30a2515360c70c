"""How well scores tell a label, and how sure that is."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from sae.probing.logistic import Labels, Matrix
from saescope.errors import InputError


def auc(scores: Matrix, y: Labels) -> float:
    """Area under the ROC curve: how often a positive row scores above a negative, ties a half.

    Raises InputError if all labels are equal.

    >>> import numpy as np
    >>> auc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, True, False, True]))
    0.875
    """
    positive, negative = int(y.sum()), int((~y).sum())
    if not positive or not negative:
        raise InputError("all labels are equal", where="auc", given=f"{len(y)} labels")
    above = stats.rankdata(scores)[y].sum() - positive * (positive + 1) / 2
    return float(above / (positive * negative))


def accuracy(scores: Matrix, y: Labels) -> float:
    """Share of rows whose score is above 0 just if they have the label."""
    return float(((scores > 0) == y).mean())


def f1(scores: Matrix, y: Labels) -> float:
    """Harmonic mean of precision and recall of scores above 0; 0 if none is above 0 and right.

    >>> f1(np.array([1.0, 2.0, -1.0, -1.0]), np.array([True, False, True, False]))
    0.5
    """
    called = scores > 0
    both = int((called & y).sum())
    return 2 * both / (int(called.sum()) + int(y.sum())) if both else 0.0


def best_cut(scores: Matrix, y: Labels) -> float:
    """The threshold of largest F1, half way to the next lower score; of equal ones the highest.

    >>> import numpy as np
    >>> best_cut(np.array([3.0, 2.0, 1.0, 0.0]), np.array([True, True, False, False]))
    1.5
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    found = 2 * np.cumsum(y[order]) / (np.arange(1, len(y) + 1) + y.sum())
    best = int(found.argmax())
    return float(ranked[best] + ranked[min(best + 1, len(y) - 1)]) / 2


def majority(y: Labels) -> float:
    """The accuracy of always saying the commoner label."""
    share = float(y.mean())
    return max(share, 1 - share)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half of its 95% interval by Student's t; None of fewer than two values.

    >>> mean_and_interval([1.0, 3.0])[0], mean_and_interval([0.5])
    (2.0, (0.5, None))
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, None
    variance = math.fsum((each - mean) ** 2 for each in values) / (count - 1)
    return mean, float(stats.t.ppf(0.975, count - 1)) * math.sqrt(variance / count)
