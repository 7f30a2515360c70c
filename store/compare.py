"""Comparing two feature stores of one harvest: which features fire alike."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from saescope.errors import InputError
from saescope.integers import as_index
from store.feature_store import FeatureStore
from store.matching import MATCHED, Matching, correlation_blocks, match_features

MOST_ACTIVATIONS = 1 << 24


@dataclass(frozen=True)
class StoreComparison:
    """The features of two stores, matched by the correlation of their activations."""

    matching: Matching
    positions: int
    """kept positions over which activations are correlated"""
    all_positions: int
    """kept positions of the stores"""


def same_harvest(a: FeatureStore, b: FeatureStore) -> bool:
    """Whether two stores are of one harvest, so that a position means the same in both."""
    harvests = [str(store.meta.get("harvest") or "") for store in (a, b)]
    return bool(harvests[0]) and harvests[0] == harvests[1] and a.context == b.context


def compare_stores(
    a: FeatureStore,
    b: FeatureStore,
    *,
    most_activations: int = MOST_ACTIVATIONS,
    threshold: float = MATCHED,
) -> StoreComparison:
    """Match two stores' features by Pearson's correlation of their activations.

    most_activations: of each store; where there are more, only the first sequences are read, as
    many as hold about that many.

    Raises InputError if the stores are not of one harvest.
    """
    if not same_harvest(a, b):
        raise InputError(
            "activations can be compared only over one harvest, and these stores are of two",
            where=str(b.path),
            given=b.meta.get("harvest"),
            allowed=str(a.meta.get("harvest")),
        )
    most = as_index(most_activations, where="most_activations", low=1)
    largest = max(a.overview().n_activations, b.overview().n_activations, 1)
    sequences = a.database.columns("SELECT sequence FROM db.sequence ORDER BY sequence")["sequence"]
    count = min(len(sequences), max(1, len(sequences) * most // largest))
    end = int(sequences[count - 1]) + 1
    keep = a.database.columns(
        "SELECT unnest(keep) AS keep FROM (SELECT keep FROM db.sequence WHERE sequence < ?"
        " ORDER BY sequence)",
        [end],
    )["keep"].astype(bool)
    a.database.check_fits(len(keep) == count * a.context, "sequence")
    row_of = np.where(keep, np.cumsum(keep) - 1, -1)
    codes = [_codes(store, sequences[:count], row_of, int(keep.sum())) for store in (a, b)]
    matching = match_features(correlation_blocks(*codes), a.d_sae, b.d_sae, threshold=threshold)
    return StoreComparison(matching, int(keep.sum()), a.overview().n_kept)


def _codes(store: FeatureStore, sequences: np.ndarray, row_of: np.ndarray, rows: int) -> Any:
    """A store's activations as a scipy sparse array [kept positions, d_sae]."""
    from scipy.sparse import coo_array

    end = (int(sequences[-1]) + 1) * store.context
    found = store.database.columns(
        "SELECT position, feature, activation FROM db.activation_by_position WHERE position < ?",
        [end],
    )
    sequence, index = np.divmod(found["position"], store.context)
    at = np.searchsorted(sequences, sequence)
    known = bool((sequences[np.minimum(at, len(sequences) - 1)] == sequence).all())
    store.database.check_fits(known, "activation_by_position")
    row = row_of[at * store.context + index]
    feature = found["feature"]
    inside = bool(((row >= 0) & (feature >= 0) & (feature < store.d_sae)).all())
    store.database.check_fits(inside, "activation_by_position")
    return coo_array((found["activation"], (row, feature)), shape=(rows, store.d_sae)).tocsc()
