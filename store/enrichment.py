"""In which groups of documents (topics, sources) a feature fires more often than by chance.

The test is over documents, not over positions, which are not independent of one another within a
document: a one-sided hypergeometric test (Fisher's exact test) of whether the documents in which
the feature fires are more often in the group than documents drawn at random, and Benjamini and
Hochberg's false-discovery rate over all features and groups. Documents count alike, however long
they are; where a group's are much longer than others', more features fire in each of them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from store.permutation import benjamini_hochberg

MOST = 10
"""groups kept of each feature"""
LARGEST_Q = 0.05
_NONE = -1
_BLOCK = 1 << 20
_NEGLIGIBLE = 1e-17

Ints = NDArray[np.integer]
Floats = NDArray[np.float64]


def overlap_p_values(both: Ints, drawn: Ints, marked: Ints, total: Ints | int) -> Floats:
    """P(X >= both) where `drawn` of `total` are drawn at random and X of them are among `marked`.

    The upper tail of the hypergeometric distribution, summed from `both` on, with a relative error
    of about 1e-10. It is given as 1 where `both` is no more than expected, where it is about 1/2 or
    more. Arrays are broadcast.

    >>> overlap_p_values(np.array([2, 1]), np.array(2), np.array(2), 4).round(6).tolist()
    [0.166667, 1.0]
    """
    from scipy.special import gammaln

    x, n, k, size = (
        each.astype(np.float64)
        for each in np.broadcast_arrays(
            np.asarray(both), np.asarray(drawn), np.asarray(marked), np.asarray(total)
        )
    )
    p = np.ones(x.shape)
    more = x * size > n * k
    x, n, k, size = x[more], n[more], k[more], size[more]

    def log_choose(a: Floats, b: Floats) -> Floats:
        return gammaln(a + 1) - gammaln(b + 1) - gammaln(a - b + 1)

    first = log_choose(k, x) + log_choose(size - k, n - x) - log_choose(size, n)
    # each term over the first, by the ratio of neighbouring terms; they fall from here on
    sums, term, going = np.ones(len(x)), np.ones(len(x)), np.arange(len(x))
    while len(going):
        a, b, c, d = x[going], n[going], k[going], size[going]
        term = term * (c - a) * (b - a) / ((a + 1) * (d - c - b + a + 1))
        sums[going] += term
        x[going] += 1
        left = term > _NEGLIGIBLE * sums[going]
        going, term = going[left], term[left]
    p[more] = np.exp(np.minimum(first + np.log(sums), 0.0))
    return np.maximum(p, np.finfo(np.float64).tiny)


def log_odds_ratio(both: Ints, drawn: Ints, marked: Ints, total: int) -> Floats:
    """ln of the odds of being drawn when marked over those when not, 1/2 added to each count.

    >>> float(log_odds_ratio(np.array(2), np.array(2), np.array(2), 4).round(4))
    3.2189
    """
    a, b, c = both + 0.5, marked - both + 0.5, drawn - both + 0.5
    return np.log(a * (total - marked - drawn + both + 0.5) / (b * c))


class GroupCounts:
    """Counts, feature by feature, of documents and positions in each group.

    Args:
        groups: the name of each document's group, by kind; a kind with one group only is left out.
        document: of each position, below 0 where there is none or it is not kept [positions].
        features: all those that will be added, in order.
    """

    def __init__(
        self, groups: Mapping[str, Mapping[int, str]], document: Ints, features: Ints
    ) -> None:
        self._document, self._features = document, features
        self._kinds = [
            _Kind(kind, names, document, len(features))
            for kind, names in sorted(groups.items())
            if len(set(names.values())) > 1
        ]
        self._row = 0

    def add(self, feature: int, position: Ints, documents: Ints) -> None:
        """Count a feature: its positions [n], and the documents in which they are, each once."""
        assert feature == self._features[self._row]
        for kind in self._kinds:
            kind.documents[self._row] = kind.count(documents)
            for first in range(0, len(position), _BLOCK):
                at = self._document[position[first : first + _BLOCK]]
                kind.positions[self._row] += kind.count(at)
        self._row += 1

    def tables(self) -> dict[str, pa.Table]:
        """The rows of the table of enriched groups, if there are any groups."""
        if not self._kinds or not len(self._features):
            return {}
        pieces = [kind.columns() for kind in self._kinds]
        q = benjamini_hochberg(np.concatenate([each.pop("p").ravel() for each in pieces]))
        columns: dict[str, NDArray[Any]] = {
            name: np.concatenate([each[name].ravel() for each in pieces]) for name in pieces[0]
        }
        row = np.concatenate(
            [np.repeat(np.arange(len(self._features)), len(kind.names)) for kind in self._kinds]
        )
        order = np.lexsort((-columns["log_odds"], q, row))
        order = order[q[order] <= LARGEST_Q]
        rank = _ranks(row[order])
        kept = order[rank < MOST]
        feature = self._features[row[kept]]
        found: dict[str, Any] = {name: column[kept] for name, column in columns.items()}
        for name in ("kind", "name"):
            found[name] = pa.array(found[name], pa.string())
        return {
            "enrichment": pa.table(
                {"feature": feature, "rank": rank[rank < MOST], **found, "q": q[kept]}
            )
        }


def _ranks(sorted_rows: Ints) -> Ints:
    """The index of each element among the equal ones before it.

    >>> _ranks(np.array([3, 3, 5, 5, 5])).tolist()
    [0, 1, 0, 1, 2]
    """
    first = np.searchsorted(sorted_rows, sorted_rows, side="left")
    return np.arange(len(sorted_rows)) - first


class _Kind:
    """The groups of one kind, and the counts [features, groups] there."""

    def __init__(
        self, kind: str, names: Mapping[int, str], document: Ints, n_features: int
    ) -> None:
        self.kind = kind
        self.names = sorted(set(names.values()))
        number = {name: index for index, name in enumerate(self.names)}
        size = 1 + max(int(document.max(initial=0)), *names)
        self._group = np.full(size + 1, _NONE, dtype=np.int16)  # the last: of no document
        for at, name in names.items():
            self._group[at] = number[name]
        kept = np.zeros(size, dtype=np.int64)
        for first in range(0, len(document), _BLOCK):
            block = document[first : first + _BLOCK]
            kept += np.bincount(block[block >= 0], minlength=size)
        self._kept = self._sum(np.arange(size), kept)
        self._sizes = self.count(np.flatnonzero(kept))
        self.documents = np.zeros((n_features, len(self.names)), dtype=np.int64)
        self.positions = np.zeros_like(self.documents)

    def count(self, documents: Ints) -> NDArray[np.int64]:
        """How many of these documents (below 0: none) are in each group."""
        return self._sum(np.maximum(documents, -1), None)

    def _sum(self, documents: Ints, weights: Ints | None) -> NDArray[np.int64]:
        group = self._group[documents]
        inside = group >= 0
        chosen = None if weights is None else weights[inside]
        found = np.bincount(group[inside], weights=chosen, minlength=len(self.names))
        return found.astype(np.int64)

    def columns(self) -> dict[str, NDArray[Any]]:
        """What the table has of each feature and group [features, groups], and p-values."""
        shape = self.documents.shape
        total = int(self._sizes.sum())
        drawn = self.documents.sum(1, keepdims=True)
        fires = np.maximum(self.positions.sum(1, keepdims=True), 1)
        return {
            "kind": np.full(shape, self.kind, dtype=object),
            "name": np.broadcast_to(np.array(self.names, dtype=object), shape),
            "documents": self.documents,
            "expected": drawn * self._sizes / max(total, 1),
            "log_odds": log_odds_ratio(self.documents, drawn, self._sizes, total),
            "p": overlap_p_values(self.documents, drawn, self._sizes, total),
            "positions": self.positions,
            "share": self.positions / fires,
            "expected_share": np.broadcast_to(self._kept / max(self._kept.sum(), 1), shape),
        }
