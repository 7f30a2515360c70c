"""Queries of two features: where one fires without the other, and where both fire near by."""

import numpy as np

from saescope.errors import InputError
from saescope.integers import as_index
from store.results import Nearby, Spots
from store.store_base import MOST, StoreBase, is_among


class CoOccurrence(StoreBase):
    """Queries of the firings of two features."""

    def fires_without(self, feature: int, other: int, limit: int = 100) -> Spots:
        """Where a feature fires and another does not, strongest first.

        Cost: reads both features' rows, about 2 ms for each 100,000 of them.
        Raises InputError for the same feature twice.
        """
        mine, others = self._pair(feature, other)
        limit = as_index(limit, where="limit", low=0, high=MOST)
        alone = np.flatnonzero(~is_among(mine["position"], others["position"]))
        shown = alone[:limit]
        return Spots(len(alone), mine["position"][shown], mine["activation"][shown])

    def fires_near(self, feature: int, other: int, within: int = 5, limit: int = 100) -> Nearby:
        """Where a feature fires and another does within so many tokens of it, in the same sequence.

        within: 0 for the same token. Of several firings of the other feature the nearest counts,
        the earlier of two as near. Strongest first, by the first feature's activation.
        Cost: reads both features' rows and sorts the other's, about 4 ms for each 100,000 of them.
        Raises InputError for the same feature twice.
        """
        mine, others = self._pair(feature, other)
        within = as_index(within, where="within", low=0, high=self.context - 1)
        limit = as_index(limit, where="limit", low=0, high=MOST)
        order = np.argsort(others["position"])
        at, value = others["position"][order], others["activation"][order]
        position = mine["position"]
        nearest = np.full(len(position), -1)
        distance = np.full(len(position), within + 1)
        after = np.searchsorted(at, position)
        for candidate in (after - 1, after):
            there = np.flatnonzero((candidate >= 0) & (candidate < len(at)))
            found = at[candidate[there]]
            apart = np.abs(found - position[there])
            nearer = (apart < distance[there]) & (
                found // self.context == position[there] // self.context
            )
            better = there[nearer]
            nearest[better], distance[better] = candidate[better], apart[nearer]
        near = np.flatnonzero(nearest >= 0)
        shown = near[:limit]
        return Nearby(
            n=len(near),
            position=position[shown],
            activation=mine["activation"][shown],
            other_position=at[nearest[shown]],
            other_activation=value[nearest[shown]],
        )

    def _pair(
        self, feature: int, other: int
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        first, second = self._check(feature), self._check(other)
        if first == second:
            raise InputError("needs two different features", where="other", given=second)
        return self._rows_of(first), self._rows_of(second)
