"""Where the effects of a store's features are measured: some positions at which each is active."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store import FeatureStore

_MIX, _PRIME = 2654435761, 4294967291


@dataclass(frozen=True)
class EffectPlan:
    """Pairs of a direction and a position, [pairs] each, those of one sequence together.

    The sequences that serve most directions come first, so that what is cut short has measured
    something of most of them.
    """

    direction: NDArray[np.int64]
    """the number of a feature; from d_sae on, of a random direction"""
    sequence: NDArray[np.int64]
    index: NDArray[np.int64]
    """in the sequence"""

    def sequences(self) -> list[slice]:
        """The pairs of each sequence, in order."""
        ends = np.flatnonzero(np.diff(self.sequence)) + 1
        bounds = [0, *ends.tolist(), len(self.sequence)] if len(self.sequence) else [0]
        return [slice(a, b) for a, b in pairwise(bounds)]


def plan_effects(
    store: FeatureStore,
    positions: int,
    features: NDArray[np.int64],
    stand_ins: NDArray[np.int64],
    seed: int,
) -> EffectPlan:
    """Up to so many positions of each of these features, each in another sequence, by chance.

    Sequences are taken in one random order, and positions in another, so that features share as
    many as can be. Args: stand_ins are the features at whose positions random directions are
    measured, which are numbered from d_sae on.

    Cost: a pass over the store's activations, some 0.1 s for each million of them.
    """
    found = _sampled(store, positions, seed)
    owner, at = found["feature"].astype(np.int64), found["position"].astype(np.int64)
    wanted = np.isin(owner, features)
    pairs = [(owner[wanted], at[wanted])]
    for number, feature in enumerate(stand_ins):
        mine = at[owner == feature]
        pairs.append((np.full(len(mine), store.d_sae + number), mine))
    owner, at = (np.concatenate(column) for column in zip(*pairs, strict=True))
    sequence = at // store.context
    known, inverse, counts = np.unique(sequence, return_inverse=True, return_counts=True)
    order = np.lexsort((at, owner, known[inverse], -counts[inverse]))
    return EffectPlan(owner[order], sequence[order], at[order] % store.context)


def _sampled(store: FeatureStore, positions: int, seed: int) -> dict[str, NDArray[Any]]:
    """Features and positions: in the first sequences of a random order that a feature fires in,
    the first of its positions in another random order."""
    by_sequence = f"((sequence + {seed + 1}) * {_MIX} % {_PRIME})"
    by_position = f"((position + {seed + 2}) * {_MIX} % {_PRIME})"
    return store.database.columns(
        f"WITH one AS (SELECT feature, sequence, arg_min(position, {by_position}) AS position FROM"
        f" (SELECT feature, position, position // {store.context} AS sequence"
        " FROM db.activation_by_feature) GROUP BY feature, sequence),"
        f" few AS (SELECT feature, unnest(min_by(position, {by_sequence}, {int(positions)}))"
        " AS position FROM one GROUP BY feature)"
        " SELECT feature, position FROM few ORDER BY feature, position"
    )
