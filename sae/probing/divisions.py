"""Which texts a probe is trained on and which it is tested on, in each setting."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sae.probing.logistic import Labels

TEST_SHARE = 0.3
"""of a set's texts, stratified by label"""
_FEWEST = 2
"""texts of each label that a training part needs, and a test part"""

Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Division:
    """Training texts, and the tests that a probe trained on them takes."""

    train: Indices
    tests: dict[str, Indices]
    """setting to test texts: those of the distribution, and those from elsewhere"""


def divisions(
    y: Labels, elsewhere: Labels, *, seed: int, scarce: Sequence[int], imbalance: float
) -> Iterator[Division]:
    """The settings that a set has texts enough for.

    Args: y [texts] are the labels of the set's texts, elsewhere [others] of texts from another
    distribution, whose indices follow.

    normal: 30% of the texts are for the test, as many of each label as that is of it.
    ood: the normal setting's probe, on the texts from elsewhere.
    scarce-N: N of the normal setting's training texts, the same test.
    imbalanced: texts with the label are left out, in training and test, until they are so few.
    """
    draw = np.random.default_rng(seed)
    train, test = _divided(y, draw)
    if not (_enough(y[train]) and _enough(y[test])):
        return
    tests = {"normal": test}
    if _enough(elsewhere):
        tests["ood"] = len(y) + np.arange(len(elsewhere))
    yield Division(train=train, tests=tests)
    for count in scarce:
        few = _few(y, train, count, draw)
        if count < len(train) and _enough(y[few]):
            yield Division(train=few, tests={f"scarce-{count}": test})
    if y.mean() > imbalance:
        thin = [_thinned(y, part, imbalance, draw) for part in (train, test)]
        if all(_enough(y[part]) for part in thin):
            yield Division(train=thin[0], tests={"imbalanced": thin[1]})


def _enough(y: Labels) -> bool:
    return min(int(y.sum()), int((~y).sum())) >= _FEWEST


def _divided(y: Labels, draw: np.random.Generator) -> tuple[Indices, Indices]:
    train, test = [], []
    for label in (True, False):
        order = draw.permutation(np.flatnonzero(y == label))
        count = round(TEST_SHARE * len(order))
        test.append(order[:count])
        train.append(order[count:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def _few(y: Labels, train: Indices, count: int, draw: np.random.Generator) -> Indices:
    """So many of the training texts, of each label as many as it has of all, but two at least."""
    labelled, others = (draw.permutation(train[y[train] == label]) for label in (True, False))
    wanted = round(count * len(labelled) / len(train))
    wanted = min(max(wanted, _FEWEST), count - _FEWEST)
    return np.sort(np.concatenate([labelled[:wanted], others[: count - wanted]]))


def _thinned(y: Labels, part: Indices, share: float, draw: np.random.Generator) -> Indices:
    labelled, others = part[y[part]], part[~y[part]]
    count = round(share * len(others) / (1 - share))
    return np.sort(np.concatenate([draw.permutation(labelled)[:count], others]))
