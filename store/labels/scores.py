"""How well a label tells the windows in which its feature fires from those in which it is silent.

This is detection scoring (Paulo et al. 2024, "Automatically Interpreting Millions of Features in
Large Language Models", arXiv:2410.13928, section 3, "detection"): the judge sees whole windows with
nothing marked in them, and says for each whether the feature fires there. Their judge is a language
model; ours can also be a rule, such as "the window has this token".
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEAST = 5
"""windows of either kind that a score needs"""


@dataclass(frozen=True)
class Detection:
    """Balanced accuracy and AUC of one label on some windows; 0.5 is chance in both."""

    balanced_accuracy: float
    auc: float


def detection(active: NDArray[np.bool_], strength: ArrayLike) -> Detection | None:
    """Score predictions: strength [n] is how sure the judge is, above 0 for "fires".

    None if there are fewer than LEAST windows of either kind.
    """
    strengths = np.asarray(strength, dtype=np.float64)
    if min(int(active.sum()), int((~active).sum())) < LEAST:
        return None
    return Detection(balanced_accuracy(active, strengths > 0), auc(active, strengths))


def balanced_accuracy(active: NDArray[np.bool_], predicted: NDArray[np.bool_]) -> float:
    """The mean of the share of active windows found and of the share of silent ones left alone.

    >>> active = np.array([True, True, False, False])
    >>> balanced_accuracy(active, np.array([True, False, False, False]))
    0.75
    """
    return float((predicted[active].mean() + (~predicted[~active]).mean()) / 2)


def auc(active: NDArray[np.bool_], strength: NDArray[np.float64]) -> float:
    """The chance that an active window has the higher strength of two; a tie counts one half.

    It is the area under the ROC curve (Mann and Whitney's U, divided by the number of pairs).

    >>> auc(np.array([True, True, False]), np.array([1.0, 0.0, 0.0]))
    0.75
    """
    ordered = np.sort(strength[~active])
    below = np.searchsorted(ordered, strength[active], side="left")
    up_to = np.searchsorted(ordered, strength[active], side="right")
    return float((below + up_to).mean() / 2 / len(ordered))
