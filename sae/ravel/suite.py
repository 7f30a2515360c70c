"""Cause, isolation and their mean, for every kind of entities, attribute and method.

    cause        share of pairs on which the attribute's answer becomes the source's
    isolation    share of pairs on which another attribute's answer stays the base's, mean over the
                 other attributes; only pairs that differ in both attributes count
    disentangle  mean of both

A swap that does nothing has cause 0 and isolation 1, one of the whole activation the reverse or
nearly so: either way the mean is a half. Features, and how many, are chosen on training entities.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sae.core.base import SparseAutoencoder
from sae.probing.kept_rows import kept_rows
from sae.probing.logistic import Matrix
from sae.ravel.config import RavelConfig
from sae.ravel.entities import EntityKind, chosen_kinds
from sae.ravel.pairs import FEWEST, Pairs, drawn, pairs_of, usable_attributes
from sae.ravel.questions import Answers, Asked, Indices, questions_of
from sae.ravel.swap import effects, ranked, with_features_of
from saescope.errors import InputError
from saescope.progress import Progress, say

VERSION = 1
"""of the definitions of this package; other ones give other figures"""
METHODS = {
    "sae": "the SAE's features of largest effect",
    "random": "as many of the SAE's features that fire on training entities, drawn by chance",
    "untrained": "as many, of largest effect, of an SAE of this shape that was never trained",
    "all": "all features of the SAE",
    "activation": "the whole activation",
}
Row = dict[str, Any]
PairsByAttribute = Mapping[str, Pairs]
"""the attribute that is asked for, to pairs"""


def protocol(config: RavelConfig) -> dict[str, Any]:
    """What decides the results besides the model, the site and the SAE."""
    chosen = {name: value for name, value in asdict(config).items() if name != "kinds"}
    return {
        "version": VERSION,
        **chosen,
        "kinds": {each.name: each.hash for each in chosen_kinds(config.kinds)},
        "selection": "first-order effect on the attribute less that on the others",
        "fewest": FEWEST,
    }


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of entities as a model knows it, and what its attributes are measured on."""

    asked: Asked
    counts: Mapping[str, Sequence[int]]
    """how many entities the model knows each usable attribute of: training, test"""
    train: Mapping[str, PairsByAttribute]
    """by the attribute that is to change, pairs of training entities"""
    test: Mapping[str, PairsByAttribute]


def known_kind(answers: Answers, kind: EntityKind, config: RavelConfig) -> Kind:
    """Ask the model for a kind; which of it can be measured, perhaps nothing."""
    entities = drawn(kind, config.entities, config.seed)
    asked = answers.ask(questions_of(answers.model, kind, entities, config.sentences))
    parts = entities[::2], entities[1::2]
    counts = usable_attributes(asked, kind, parts)

    def pairs(among: Sequence[str]) -> dict[str, PairsByAttribute]:
        found = {}
        for changed in counts:
            by_asked = {
                of: pairs_of(
                    asked,
                    kind,
                    of=of,
                    differing=changed,
                    among=among,
                    most=config.pairs,
                    seed=config.seed,
                )
                for of in counts
            }
            if len(counts) > 1 and all(len(each) for each in by_asked.values()):
                found[changed] = by_asked
        return found

    train, test = pairs(parts[0]), pairs(parts[1])
    both = [name for name in train if name in test]
    return Kind(
        asked=asked,
        counts=counts,
        train={name: train[name] for name in both},
        test={name: test[name] for name in both},
    )


def measure(
    answers: Answers,
    sae: SparseAutoencoder,
    untrained: SparseAutoencoder,
    config: RavelConfig,
    kept: Path,
) -> list[Row]:
    """A row for each kind, attribute and method.

    Rows of kinds that are done are kept in the folder `kept`, so that after a kill the others
    follow. Raises InputError if the model knows too little of every kind.
    """
    rows: list[Row] = []
    counts: dict[str, str] = {}

    def of_kind(kind: EntityKind) -> Iterator[Row]:
        known = known_kind(answers, kind, config)
        right = known.asked.known
        counts[kind.name] = f"{int(right.sum())} of {len(right)}"
        say(f"ravel, {kind.name}: the model answers {counts[kind.name]} questions right")
        if known.test:
            yield from measure_kind(answers, kind.name, known, sae, untrained, config)
        else:
            say(f"ravel: {kind.name} is left out, as the model knows too little of it")

    for kind in chosen_kinds(config.kinds):
        rows += kept_rows(kept / f"{kind.name}.json", partial(of_kind, kind), kind.name)
    if not rows:
        raise InputError(
            f"the model knows too little: no kind has two attributes that it knows of {FEWEST} "
            "training and test entities each. Of the questions, it answers right",
            where="suite ravel",
            given=counts,
        )
    return rows


def measure_kind(
    answers: Answers,
    name: str,
    known: Kind,
    sae: SparseAutoencoder,
    untrained: SparseAutoencoder,
    config: RavelConfig,
) -> Iterator[Row]:
    """The rows of a kind."""
    margins = _margins(answers, known)
    by_sae = {
        method: _effects(one, known.asked, margins)
        for method, one in (("sae", sae), ("untrained", untrained))
    }
    fires = np.flatnonzero(sae.encode_sparse(_training_x(known)).counts().cpu().numpy())
    draw = np.random.default_rng(config.seed)
    with Progress(f"ravel, {name}", len(known.test), "attributes") as progress:
        for attribute, test in known.test.items():
            order = {method: ranked(each, attribute) for method, each in by_sae.items()}
            chosen = _best(answers, known, attribute, sae, order["sae"], config)
            masks = {
                "sae": chosen,
                "random": draw.permutation(fires)[: len(chosen)],
                "untrained": order["untrained"][: len(chosen)],
            }
            for method in METHODS:
                mask = masks.get(method)
                swap = _swap(untrained if method == "untrained" else sae, mask, config.error)
                if method == "activation":
                    swap = _whole
                yield {
                    "kind": name,
                    "attribute": attribute,
                    "method": method,
                    "k": None if mask is None else len(mask),
                    "features": [] if mask is None else mask.tolist(),
                    **scores(answers, known.asked, attribute, test, swap),
                    "pairs": len(test[attribute]),
                    "known_train": known.counts[attribute][0],
                    "known_test": known.counts[attribute][1],
                }
            progress.advance(note=attribute)


Swap = Callable[[Tensor, Tensor], Tensor]
"""base and source activations [pairs, d_in] to what is put into the model"""


def _whole(x: Tensor, source: Tensor) -> Tensor:
    del x
    return source


def _swap(sae: SparseAutoencoder, features: Indices | None, error: bool) -> Swap:
    return lambda x, source: with_features_of(sae, x, source, features, error=error)


def scores(
    answers: Answers, asked: Asked, attribute: str, pairs: PairsByAttribute, swap: Swap
) -> dict[str, float]:
    """Cause, isolation and disentangle of an attribute's swap, on pairs by attribute asked for."""
    share = {}
    for of, each in pairs.items():
        base = [asked.questions[index] for index in each.base]
        source = [asked.questions[index] for index in each.source]
        got = answers.swapped(base, swap(asked.x[each.base], asked.x[each.source]))
        wanted = source if of == attribute else base
        share[of] = float((got == np.array([one.answer for one in wanted])).mean())
    cause = share.pop(attribute)
    isolation = float(np.mean(list(share.values())))
    return {"cause": cause, "isolation": isolation, "disentangle": (cause + isolation) / 2}


Margins = Mapping[str, tuple[Pairs, Tensor, Tensor]]
"""attribute to training pairs, the margins of their answers, gradients"""


def _margins(answers: Answers, known: Kind) -> Margins:
    """How near each attribute's answers are to the sources', on training pairs."""
    found = {}
    with Progress("ravel, gradients", len(known.train), "attributes") as progress:
        for attribute, by_asked in known.train.items():
            pairs, asked = by_asked[attribute], known.asked
            other = np.array([asked.questions[each].answer for each in pairs.source])
            base = [asked.questions[each] for each in pairs.base]
            found[attribute] = (pairs, *answers.margins(base, asked.x[pairs.base], other))
            progress.advance(note=attribute)
    return found


def _effects(sae: SparseAutoencoder, asked: Asked, margins: Margins) -> dict[str, Matrix]:
    return {
        attribute: effects(sae, asked.x[pairs.base], asked.x[pairs.source], margin, gradient)
        for attribute, (pairs, margin, gradient) in margins.items()
    }


def _training_x(known: Kind) -> Tensor:
    """The activations of questions that training pairs are of."""
    pairs = [each for by_asked in known.train.values() for each in by_asked.values()]
    used = np.unique(np.concatenate([part for each in pairs for part in (each.base, each.source)]))
    return known.asked.x[used]


def _best(
    answers: Answers,
    known: Kind,
    attribute: str,
    sae: SparseAutoencoder,
    order: Indices,
    config: RavelConfig,
) -> Indices:
    """The features, as many of the best as disentangle most on training pairs; fewer if equal."""
    best, found = -1.0, order[:0]
    for k in sorted(config.ks):
        mask = order[:k]
        swap = _swap(sae, mask, config.error)
        reached = scores(answers, known.asked, attribute, known.train[attribute], swap)
        if reached["disentangle"] > best:
            best, found = reached["disentangle"], mask
        if len(order) <= k:
            break
    return found
