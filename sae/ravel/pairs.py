"""Pairs of questions: one whose answer is to change, one that the change is taken from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sae.ravel.entities import EntityKind
from sae.ravel.questions import Asked, Indices

FEWEST = 8
"""entities that a model has to know an attribute of, in the training part and in the test part"""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Ordered pairs of known questions that one sentence asks of two entities."""

    base: Indices
    """[pairs], the question that is answered"""
    source: Indices
    """[pairs], the question whose activation is put into it"""

    def __len__(self) -> int:
        return len(self.base)


def drawn(kind: EntityKind, most: int, seed: int) -> list[str]:
    """At most so many entities of a kind, in an order by chance."""
    names = sorted(kind.values)
    order = np.random.default_rng(seed).permutation(len(names))
    return [names[index] for index in order[:most]]


def known_entities(asked: Asked, attribute: str, among: Sequence[str]) -> list[str]:
    """The entities of which the model knows an attribute, asked by any sentence."""
    return sorted(
        {
            each.entity
            for each, known in zip(asked.questions, asked.known, strict=True)
            if known and each.attribute == attribute and each.entity in among
        }
    )


def pairs_of(
    asked: Asked,
    kind: EntityKind,
    *,
    of: str,
    differing: str,
    among: Sequence[str],
    most: int,
    seed: int,
) -> Pairs:
    """Pairs of questions for the attribute `of`, drawn by chance from all that there are.

    Both entities are of `among`, the model knows both answers, and the entities differ in this
    attribute and in `differing`, which is to be changed: where a source has the same value, nothing
    tells whether the answer was left alone.
    """
    by_sentence: dict[int, list[int]] = {}
    for index, (each, known) in enumerate(zip(asked.questions, asked.known, strict=True)):
        if known and each.attribute == of and each.entity in among:
            by_sentence.setdefault(each.sentence, []).append(index)

    def differ(one: int, other: int) -> bool:
        first, second = (kind.values[asked.questions[each].entity] for each in (one, other))
        return first[of] != second[of] and first[differing] != second[differing]

    found = [
        (base, source)
        for own in by_sentence.values()
        for base in own
        for source in own
        if differ(base, source)
    ]
    order = np.random.default_rng(seed).permutation(len(found))[:most]
    drawn = np.array(found, np.int64).reshape(-1, 2)[np.sort(order)]
    return Pairs(base=drawn[:, 0], source=drawn[:, 1])


def usable_attributes(
    asked: Asked, kind: EntityKind, parts: Sequence[Sequence[str]]
) -> dict[str, list[int]]:
    """The attributes that the model knows of `FEWEST` entities in every part: how many, by part."""
    counts = {
        attribute: [len(known_entities(asked, attribute, part)) for part in parts]
        for attribute in kind.sentences
    }
    return {name: count for name, count in counts.items() if min(count) >= FEWEST}
