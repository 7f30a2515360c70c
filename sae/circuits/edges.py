"""Which active features become nodes: the most influential, found out as their edges are computed.

Edges into a feature are known once it was visited. The influence of the others is known from the
edges that lead from them to visited ones: each output's weight, and each visited feature's
influence, is shared out over its sources in proportion to the sizes of its edges (Ameisen et al.
2025, "Circuit Tracing").
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sae.circuits.outputs import Outputs
from sae.circuits.rows import EdgeRows
from saescope.progress import Progress

UPDATE = 4
"""batches of features between two rankings"""


@dataclass
class Edges:
    """Edges into outputs and into the features visited so far, a row a target."""

    rows: EdgeRows
    weight: NDArray[np.float32]
    into: NDArray[np.float32]
    """[outputs, width], then [visited, width]"""
    totals: NDArray[np.float32]
    """the sizes of each row, summed"""
    visited: NDArray[np.int64]
    """the feature of each row behind those of the outputs"""

    @classmethod
    def into_outputs(cls, rows: EdgeRows, outputs: Outputs, most: int) -> "Edges":
        """With room for so many features."""
        count = len(outputs.token)
        room = count + min(most, rows.columns.features)
        into = np.zeros((room, rows.columns.width), np.float32)
        into[:count] = rows.into_outputs(outputs.direction)
        totals = np.zeros(room, np.float32)
        totals[:count] = np.abs(into[:count]).sum(1)
        weight = outputs.weight.numpy().astype(np.float32)
        return cls(rows, weight, into, totals, np.zeros(0, np.int64))

    def both(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Edges into the visited features [visited, width] and into outputs [outputs, width]."""
        count = len(self.weight)
        return self.into[count : count + len(self.visited)], self.into[:count]

    def visit(self, most: int, batch: int, effects: NDArray[np.float32] | None = None) -> None:
        """Compute edges into features, the most influential first, until there are `most`.

        Args: effects [width], if given, say which are the most influential.
        """
        every = np.arange(self.rows.columns.features)
        most = min(most, len(every))
        with Progress("edges", most, "features") as progress:
            while len(self.visited) < most:
                left = np.setdiff1d(every, self.visited, assume_unique=True)
                if most < len(every):
                    count = most if effects is not None else UPDATE * batch
                    found = self.influence() if effects is None else np.abs(effects)
                    ranked = np.argsort(-found[left], kind="stable")
                    left = left[ranked][: min(count, most - len(self.visited))]
                groups = self.rows.group(left)
                for group in np.unique(groups):
                    own = np.sort(left[groups == group])
                    for start in range(0, len(own), batch):
                        self._add(own[start : start + batch])
                        progress.advance(len(own[start : start + batch]))

    def _add(self, features: NDArray[np.int64]) -> None:
        first = len(self.weight) + len(self.visited)
        found = self.rows.into_features(features)
        self.into[first : first + len(features)] = found
        self.totals[first : first + len(features)] = np.abs(found).sum(1)
        self.visited = np.concatenate([self.visited, features])

    def influence(self) -> NDArray[np.float32]:
        """Of each possible source [width] on the outputs, through the features visited so far.

        Features get nothing from later parts, so one walk from the last part to the first is all.
        """
        count, starts = len(self.weight), self.rows.columns.starts
        found = _shares(self.into[:count], self.totals[:count], self.weight)
        for start, end in zip(starts[-2::-1], starts[:0:-1], strict=True):
            own = np.flatnonzero((self.visited >= start) & (self.visited < end))
            if len(own):
                rows, above = self.into[count + own], found[self.visited[own]]
                found += _shares(rows, self.totals[count + own], above)
        return found


def _shares(
    rows: NDArray[np.float32], totals: NDArray[np.float32], weight: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Each row's weight shared out over its sources, by the sizes of its edges; [width]."""
    each = (weight / np.maximum(totals, np.finfo(np.float32).tiny)).astype(np.float32)
    return each @ np.abs(rows)
