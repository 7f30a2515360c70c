"""Spurious correlation removal (SCR): which features carry what a biased probe should not use.

Texts have two attributes, A and B, and are balanced over their four combinations. A biased probe is
trained on texts that have both or neither, so it cannot tell A from B; clean probes of A and of B
are trained on all four. To make it a probe of A, the features of largest effect on B's clean probe
are ablated, and the other way round:

    SCR = (accuracy_ablated - accuracy_biased) / (accuracy_clean - accuracy_biased)

with accuracies of the biased probe, and of A's clean probe, in telling A of test texts. Of the two
directions the one is scored whose concept the biased probe tells worse (Karvonen et al. 2024, arXiv
2411.18895; SAEBench). What differs from there: the direction is chosen on training texts, those
that the biased probe was not trained on; probes are fitted to their minimum; and a pair's score is
the ratio of sums over divisions, not a mean of ratios.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sae.probing.divisions import TEST_SHARE, Indices
from sae.probing.kept_rows import Row
from sae.probing.labelled_sets import LabelledSet
from sae.probing.logistic import Matrix, fit
from sae.probing.removal import effects, largest, without
from sae.probing.scores import accuracy
from sae.probing.text_features import Subject, TextFeatures
from saescope.errors import InputError

VERSION = 1
LEAST_GAP = 0.001
"""of clean and biased accuracy, for a score to be defined (SAEBench)"""
FEWEST = 10
"""texts of each combination that a pair needs"""
COMBINATIONS = ((False, False), (False, True), (True, False), (True, True))


class Pair(NamedTuple):
    """Texts with two attributes, as many of each combination."""

    name: str
    attributes: tuple[str, str]
    texts: tuple[str, ...]
    labels: NDArray[np.bool_]
    """[texts, 2]"""


def paired(first: LabelledSet, second: LabelledSet, most: int) -> Pair:
    """The texts that two sets have in common, at most so many of each combination of labels.

    Raises InputError if a combination has fewer than ten.
    """
    other = dict(zip(second.texts, second.labels.tolist(), strict=True))
    both = {
        text: (label, other[text])
        for text, label in zip(first.texts, first.labels.tolist(), strict=True)
        if text in other
    }
    texts, labels = tuple(both), np.array(list(both.values()), np.bool_).reshape(-1, 2)
    name = f"{first.name}::{second.name}"
    kept = balanced(labels, most, name)
    return Pair(
        name=name,
        attributes=(first.name, second.name),
        texts=tuple(texts[each] for each in kept),
        labels=labels[kept],
    )


def balanced(labels: NDArray[np.bool_], most: int, name: str) -> Indices:
    """Indices of as many texts of each combination, `most` or as many as the rarest has, drawn.

    Raises InputError if a combination has fewer than ten.
    """
    cells = _cells(labels)
    count = min(most, *map(len, cells))
    if count < FEWEST:
        counts = (
            f"{len(cell)} with labels {int(a)} and {int(b)}"
            for cell, (a, b) in zip(cells, COMBINATIONS, strict=True)
        )
        raise InputError(
            f"the two sets need {FEWEST} texts in common of each combination of labels",
            where=name,
            given=", ".join(counts),
        )
    draw = np.random.default_rng(0)
    return np.sort(np.concatenate([draw.permutation(cell)[:count] for cell in cells]))


def _cells(labels: NDArray[np.bool_]) -> list[Indices]:
    return [np.flatnonzero((labels == each).all(1)) for each in COMBINATIONS]


def scr_rows(pair: Pair, subject: Subject, ns: Sequence[int], seeds: int) -> Iterator[Row]:
    """Rows of results of a pair: for each division, direction, method and number of features."""
    features, known = subject.features(pair.name, pair.texts)
    labels = pair.labels[known]
    kept = balanced(labels, len(labels), pair.name)
    features, labels = features.known(kept), labels[kept]
    for seed in range(seeds):
        for row in division_rows(features, labels, subject, ns, seed):
            concept = pair.attributes[row.pop("concept")]
            yield {"pair": pair.name, "concept": concept, **row}


def division_rows(
    features: TextFeatures,
    labels: NDArray[np.bool_],
    subject: Subject,
    ns: Sequence[int],
    seed: int,
) -> Iterator[Row]:
    """Rows of results of one division of texts with labels [texts, 2], drawn by `seed`.

    Only training texts are looked at before a test text is scored.
    """
    train, test = _divided(labels, seed)
    agree = labels[:, 0] == labels[:, 1]
    x = features.x
    matching, rest = train[agree[train]], train[~agree[train]]
    biased = fit(x[matching], labels[matching, 0], seed=seed)
    clean = [fit(x[train], labels[train, each], seed=seed) for each in (0, 1)]
    unseen = [accuracy(biased.score(x[rest]), labels[rest, each]) for each in (0, 1)]
    for concept in (0, 1):
        y = labels[test, concept]
        told = {
            "seed": seed,
            "concept": concept,
            "scored": concept == int(unseen[1] < unseen[0]),
            "train": len(train),
            "test": len(test),
            "accuracy_clean": accuracy(clean[concept].score(x[test]), y),
            "accuracy_biased": accuracy(biased.score(x[test]), y),
        }
        spurious = 1 - concept
        for method, codes, decoder, order in subject.by_method(features, train, (seed, concept)):
            if order is None:
                effect = effects(
                    codes[train], labels[train, spurious], decoder, clean[spurious], signed=False
                )
                order = largest(effect, max(ns))
            for n in sorted(ns):
                ablated = without(x[test], codes[test], decoder, order[:n])
                reached = accuracy(biased.score(ablated), y)
                yield {
                    **told,
                    "method": method,
                    "n": n,
                    "features": order[:n].tolist(),
                    "accuracy_ablated": reached,
                }


def _divided(labels: NDArray[np.bool_], seed: int) -> tuple[Indices, Indices]:
    """Training and test texts, of each combination as many."""
    draw = np.random.default_rng(seed)
    cells = [draw.permutation(cell) for cell in _cells(labels)]
    count = max(2, round(TEST_SHARE * len(cells[0])))
    test, train = ([cell[part] for cell in cells] for part in (slice(count), slice(count, None)))
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


class _Ratio(NamedTuple):
    """A ratio of sums over divisions, and by how much each division is beyond it."""

    score: float
    beyond: Matrix
    """[divisions]"""


def scr_scores(rows: Sequence[Row]) -> list[Row]:
    """SCR of each pair, method and number of features, and the mean over pairs (pair None).

    A pair's score is the ratio of sums over divisions; it is None where the clean probe is less
    than 0.001 better than the biased one, and such a pair is in no mean. Intervals are of the
    linearised ratio, with divisions as the unit.
    """
    scored = [row for row in rows if row["scored"]]
    found, means = [], []
    for method, n in dict.fromkeys((row["method"], row["n"]) for row in scored):
        of_pairs = []
        for name in _pairs(scored):
            gap, gain = _gap_and_gain(scored, name, method, n)
            ratio = _ratio(gain, gap)
            if ratio is not None:
                of_pairs.append(ratio)
            about = {"pair": name, "method": method, "n": n, "gap": float(gap.mean())}
            score, half = _mean_of([ratio] if ratio is not None else [])
            found.append({**about, "scr": score, "scr_interval": half})
        score, half = _mean_of(of_pairs)
        about = {"pair": None, "method": method, "n": n, "pairs": len(of_pairs)}
        means.append({**about, "scr": score, "scr_interval": half})
    return [*means, *found]


def scr_difference(
    rows: Sequence[Row], method: str, other: str, n: int
) -> tuple[float | None, float | None]:
    """SCR of a method less that of another, mean over pairs, and half of its 95% interval.

    Both are of the same divisions and divide by the same gap, so that the difference is the ratio
    of what one method regains beyond the other, with divisions as the unit. None without a pair
    that has a score; no interval of one division.
    """
    scored = [row for row in rows if row["scored"]]
    of_pairs = []
    for name in _pairs(scored):
        gap, gain = _gap_and_gain(scored, name, method, n)
        ratio = _ratio(gain - _gap_and_gain(scored, name, other, n)[1], gap)
        if ratio is not None:
            of_pairs.append(ratio)
    return _mean_of(of_pairs)


def _pairs(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["pair"] for row in rows))


def _gap_and_gain(rows: Sequence[Row], pair: str, method: str, n: int) -> tuple[Matrix, Matrix]:
    """Accuracy to be won and accuracy won in each division [divisions], in the order of seeds."""
    own = [r for r in rows if (r["pair"], r["method"], r["n"]) == (pair, method, n)]
    own.sort(key=lambda row: row["seed"])
    gap = np.array([row["accuracy_clean"] - row["accuracy_biased"] for row in own])
    gain = np.array([row["accuracy_ablated"] - row["accuracy_biased"] for row in own])
    return gap, gain


def _ratio(gain: Matrix, gap: Matrix) -> _Ratio | None:
    """The ratio of the sums; None where there is too little to be won."""
    if not gap.mean() >= LEAST_GAP:
        return None
    score = float(gain.sum() / gap.sum())
    return _Ratio(score, (gain - score * gap) / gap.mean())


def _mean_of(ratios: Sequence[_Ratio]) -> tuple[float | None, float | None]:
    """The mean of ratios over the same divisions, and half of its 95% interval."""
    if not ratios:
        return None, None
    score = math.fsum(each.score for each in ratios) / len(ratios)
    return score, _half_width(np.mean([each.beyond for each in ratios], axis=0))


def _half_width(beyond: Matrix) -> float | None:
    """Half of the 95% interval of a mean whose units differ from it by so much."""
    if len(beyond) < 2:
        return None
    count = len(beyond)
    spread = math.sqrt(float(np.square(beyond).sum()) / (count * (count - 1)))
    return float(stats.t.ppf(0.975, count - 1)) * spread
