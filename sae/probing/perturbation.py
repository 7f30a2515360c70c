"""Targeted probe perturbation (TPP): whether ablating a class's features harms its probe alone.

A probe a class tells its texts from as many of the other classes. The features of largest effect on
it are ablated, of those that fire more on its texts, and all probes are tested again:

    TPP_i = (clean_i - ablated_ii) - mean over j != i of (clean_j - ablated_ij)

with ablated_ij the accuracy of class j's probe once class i's features are ablated; the score is
the mean over classes (Karvonen et al. 2024, arXiv 2411.18895; SAEBench). What differs from there:
probes are fitted to their minimum, and tested on as many texts of each of the other classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sae.probing.divisions import TEST_SHARE, Indices
from sae.probing.kept_rows import Row
from sae.probing.labelled_sets import LabelledSet
from sae.probing.logistic import Matrix, fit
from sae.probing.removal import effects, largest, without
from sae.probing.scores import accuracy, mean_and_interval
from sae.probing.text_features import Subject, TextFeatures
from saescope.errors import InputError

VERSION = 1
FEWEST = 10
"""texts that a class needs"""


class Group(NamedTuple):
    """Texts of several classes, as many of each."""

    name: str
    classes: tuple[str, ...]
    texts: tuple[str, ...]
    label: NDArray[np.int64]
    """[texts], index in `classes`"""


def group_of(name: str, sets: Mapping[str, LabelledSet], classes: int, most: int) -> Group:
    """The texts that have one of the labels alone, of the classes of most texts.

    Raises InputError for fewer than two classes with ten texts.
    """
    times: dict[str, int] = {}
    for each in sets.values():
        for text in _of_class(each):
            times[text] = times.get(text, 0) + 1
    own = {each: [t for t in _of_class(data) if times[t] == 1] for each, data in sets.items()}
    order = sorted(own, key=lambda each: (-len(own[each]), each))
    chosen = [each for each in order if len(own[each]) >= FEWEST][:classes]
    if len(chosen) < 2:
        counts = ", ".join(f"{each} has {len(own[each])}" for each in order)
        raise InputError(
            f"needs two classes with {FEWEST} texts each", where=name, given=counts or "none"
        )
    count = min(most, *(len(own[each]) for each in chosen))
    draw = np.random.default_rng(0)
    kept = {each: np.sort(draw.permutation(len(own[each]))[:count]) for each in chosen}
    return Group(
        name=name,
        classes=tuple(chosen),
        texts=tuple(own[each][index] for each in chosen for index in kept[each]),
        label=np.repeat(np.arange(len(chosen)), count),
    )


def _of_class(data: LabelledSet) -> list[str]:
    return [text for text, label in zip(data.texts, data.labels.tolist(), strict=True) if label]


def tpp_rows(group: Group, subject: Subject, ns: Sequence[int], seeds: int) -> Iterator[Row]:
    """Rows of results of a group: one for each division, class, method and number of features."""
    features, known = subject.features(group.name, group.texts)
    label = group.label[known]
    for seed in range(seeds):
        for row in division_rows(features, label, subject, ns, seed):
            yield {"group": group.name, **row, "class": group.classes[row["class"]]}


def division_rows(
    features: TextFeatures,
    label: NDArray[np.int64],
    subject: Subject,
    ns: Sequence[int],
    seed: int,
) -> Iterator[Row]:
    """Rows of results of one division of texts with a class each, label [texts], drawn by `seed`.

    Only training texts are looked at before a test text is scored.
    """
    draw = np.random.default_rng(seed)
    classes = range(int(label.max()) + 1)
    train, test = _divided(label, draw)
    probes, training, tests = [], [], []
    for each in classes:
        training.append(_against_others(label, train, each, draw))
        tests.append(_against_others(label, test, each, draw))
        own = training[-1]
        probes.append(fit(features.x[own], label[own] == each, seed=seed))

    def accuracies(x: Matrix) -> list[float]:
        return [
            accuracy(probe.score(x[own]), label[own] == each)
            for each, (probe, own) in enumerate(zip(probes, tests, strict=True))
        ]

    clean = accuracies(features.x)
    for each in classes:
        own, y = training[each], label[training[each]] == each
        # others for each class: where all have the same features, TPP is 0 whatever these are
        for method, codes, decoder, order in subject.by_method(features, train, (seed, each)):
            if order is None:
                effect = effects(codes[own], y, decoder, probes[each], signed=True)
                order = largest(effect, max(ns))
            for n in sorted(ns):
                ablated = accuracies(without(features.x, codes, decoder, order[:n]))
                drops = [a - b for a, b in zip(clean, ablated, strict=True)]
                others = [drop for other, drop in enumerate(drops) if other != each]
                unintended = sum(others) / len(others)
                yield {
                    "seed": seed,
                    "class": each,
                    "method": method,
                    "n": n,
                    "features": order[:n].tolist(),
                    "train": len(own),
                    "test": len(tests[each]),
                    "accuracy_clean": clean[each],
                    "intended": drops[each],
                    "unintended": unintended,
                    "tpp": drops[each] - unintended,
                }


def _divided(label: NDArray[np.int64], draw: np.random.Generator) -> tuple[Indices, Indices]:
    train, test = [], []
    for each in np.unique(label):
        order = draw.permutation(np.flatnonzero(label == each))
        count = max(2, round(TEST_SHARE * len(order)))
        test.append(order[:count])
        train.append(order[count:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def _against_others(
    label: NDArray[np.int64], part: Indices, wanted: int, draw: np.random.Generator
) -> Indices:
    """A class's texts of a part, and about as many of the others, of each as many."""
    own = part[label[part] == wanted]
    others = [part[label[part] == each] for each in np.unique(label) if each != wanted]
    count = max(1, round(len(own) / len(others)))
    drawn = [draw.permutation(each)[:count] for each in others]
    return np.sort(np.concatenate([own, *drawn]))


def tpp_scores(rows: Sequence[Row]) -> list[Row]:
    """TPP of each group, method and number of features, and the mean over groups (group None).

    Of a division it is the mean over classes; intervals are of Student's t over divisions.
    """
    groups = list(dict.fromkeys(row["group"] for row in rows))
    found: list[Row] = []
    for method, n in dict.fromkeys((row["method"], row["n"]) for row in rows):
        of_method = [row for row in rows if (row["method"], row["n"]) == (method, n)]
        by_group = [[row for row in of_method if row["group"] == name] for name in groups]
        for name, own in (
            (None, by_group),
            *zip(groups, ([each] for each in by_group), strict=True),
        ):
            row: Row = {"group": name, "method": method, "n": n, "groups": len(own)}
            for value in ("tpp", "intended", "unintended"):
                row[value], row[f"{value}_interval"] = mean_and_interval(_by_seed(own, value))
            found.append(row)
    return found


def tpp_by_division(rows: Sequence[Row], method: str, n: int) -> dict[int, float]:
    """TPP of a method and number of features in each division, by its seed: mean over groups."""
    own = [row for row in rows if (row["method"], row["n"]) == (method, n)]
    groups = [[row for row in own if row["group"] == name] for name in {r["group"]: 0 for r in own}]
    return dict(zip(sorted({row["seed"] for row in own}), _by_seed(groups, "tpp"), strict=True))


def _by_seed(groups: Sequence[Sequence[Row]], value: str) -> list[float]:
    """For each division, the mean over groups of the mean over classes."""
    seeds = sorted({row["seed"] for own in groups for row in own})
    return [
        float(np.mean([np.mean([r[value] for r in own if r["seed"] == seed]) for own in groups]))
        for seed in seeds
    ]
