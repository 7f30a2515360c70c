"""Permutation tests over documents, and the false-discovery rate over many of them.

The unit that is exchanged is the document: positions of one document are not independent of one
another, and a test that shuffles positions finds differences between any two sets of documents.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from saescope.errors import InputError

Floats = NDArray[np.float64]
_BLOCK = 256
"""permutations computed by one matrix product"""
_ENOUGH = 50
"""permutations as extreme as what was observed after which a feature needs no more"""
_EXACT = 1 << 24
"""whole numbers up to which a float32 is exact"""
_ROUNDING = 1e-9


class Relabellings:
    """Random divisions of n documents into groups of the same two sizes, the same for a seed.

    Kept as one bit a document, since every block of features needs the same ones.
    """

    def __init__(self, n: int, n_a: int, count: int, seed: int) -> None:
        self.n, self.count = n, count
        self._n_a = n_a
        self._rng = np.random.default_rng(seed)
        self._packed: list[NDArray[np.uint8]] = []

    def blocks(self) -> Iterator[NDArray[np.bool_]]:
        """Which documents are in group A [n, permutations], some permutations at a time."""
        for index, first in enumerate(range(0, self.count, _BLOCK)):
            if index == len(self._packed):
                self._packed.append(self._draw(min(_BLOCK, self.count - first)))
            yield np.unpackbits(self._packed[index], axis=1, count=self.n).T.astype(bool)

    def _draw(self, count: int) -> NDArray[np.uint8]:
        few = min(self._n_a, self.n - self._n_a)
        in_few = np.zeros((count, self.n), dtype=bool)
        for row in in_few:
            row[self._rng.choice(self.n, few, replace=False, shuffle=False)] = True
        return np.packbits(in_few if few == self._n_a else ~in_few, axis=1)


def density_difference(
    in_a: NDArray, total: NDArray, kept_a: NDArray | float, kept: float
) -> Floats:
    """Density in A less density in B, where a feature fires `in_a` times in A, `total` in both.

    >>> density_difference(np.array([3]), np.array([4]), np.array(10), 30).tolist()
    [0.25]
    """
    return in_a / kept_a - (total - in_a) / (kept - kept_a)


def density_p_values(
    counts: NDArray, kept: NDArray, in_a: NDArray[np.bool_], relabellings: Relabellings
) -> Floats:
    """p-values [features] of the difference in density between two groups of documents.

    Args:
        counts: how often each feature fires in each document [features, documents].
        kept: positions of each document [documents], none 0.
        in_a: which documents are in group A [documents].

    Two-sided: the share of relabellings whose difference is at least as large as the observed one,
    (r + 1) / (B + 1) of B, r of them as large, which is never 0 (Phipson & Smyth 2010). A feature
    stops at its 50th such relabelling, the l-th tried, with p = 50 / l, which is as valid a
    p-value (Besag & Clifford 1991, section 2): only features that differ need all of them.
    """
    total = counts.sum(1, dtype=np.float64)
    everything = float(kept.sum())
    exact = np.float32 if total.max(initial=0) < _EXACT else np.float64
    counts = np.ascontiguousarray(counts, dtype=exact)
    sums_a, kept_a = (counts @ in_a.astype(exact)).astype(np.float64), float(kept[in_a].sum())
    observed = np.abs(density_difference(sums_a, total, kept_a, everything))
    reached = observed * (1 - _ROUNDING)
    p = np.empty(len(counts))
    hits = np.zeros(len(counts), dtype=np.int64)
    open_ = np.arange(len(counts))
    tried = 0
    for block in relabellings.blocks():
        if not len(open_):
            break
        labels = block.astype(exact)
        sums = (counts @ labels).astype(np.float64)
        differences = density_difference(
            sums, total[open_, None], kept.astype(np.float64) @ block, everything
        )
        running = hits[open_, None] + np.cumsum(np.abs(differences) >= reached[open_, None], axis=1)
        hits[open_] = running[:, -1]
        done = running[:, -1] >= _ENOUGH
        last = tried + 1 + (running[done] >= _ENOUGH).argmax(1)
        p[open_[done]] = _ENOUGH / last
        open_, counts = open_[~done], counts[~done]
        tried += block.shape[1]
    p[open_] = (hits[open_] + 1) / (relabellings.count + 1)
    return p


def benjamini_hochberg(p: NDArray) -> Floats:
    """Adjusted p-values (q-values): rejecting where q <= a holds the false-discovery rate at a.

    q of the i-th smallest of m p-values is the least of m p(j) / j over j >= i (Benjamini &
    Hochberg 1995, theorem 1; as adjusted p-values: Yekutieli & Benjamini 1999, section 3). The
    rate holds for independent tests, and for those that are positively dependent (Benjamini &
    Yekutieli 2001).

    >>> benjamini_hochberg(np.array([0.01, 0.04, 0.03, 0.5])).round(4).tolist()
    [0.04, 0.0533, 0.0533, 0.5]
    """
    values = np.asarray(p, dtype=np.float64)
    if values.size and not (values.min() > 0 and values.max() <= 1):
        raise InputError("p-values lie above 0 and at most at 1", where="p")
    order = np.argsort(values, kind="stable")
    scaled = values[order] * len(values) / np.arange(1, len(values) + 1)
    q = np.empty_like(values)
    q[order] = np.minimum.accumulate(scaled[::-1])[::-1]
    return q
