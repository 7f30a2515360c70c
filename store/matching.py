"""Matching the features of two SAEs, from any similarity that is computed a block at a time.

Nothing of size [features of one, features of the other] is kept: of each feature only its most
similar ones of the other SAE are remembered, and the one-to-one matching chooses among those.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from saescope.errors import InputError, check_range
from saescope.integers import as_index

Block = tuple[int, NDArray[np.float32]]
"""the first feature of A, and similarities [some features of A, all features of B]"""
Floats = NDArray[np.float64]
MATCHED = 0.7
"""similarity from which two features count as the same: as in Paulo & Belrose 2025"""
_FEATURES = 256
_STEPS = 20_001


@dataclass(frozen=True, kw_only=True)
class Matching:
    """Which features of an SAE A are those of an SAE B."""

    pairs: pa.Table
    """feature_a, feature_b, similarity: one to one, most similar first (Hungarian matching).

    The sum of the similarities is the largest there is, among each feature's `candidates` most
    similar ones; pairs of similarity 0 or less are left out.
    """
    nearest_a: NDArray[np.int64]
    """for each feature of A the most similar one of B [n_a]"""
    similarity_a: Floats
    """its similarity"""
    nearest_b: NDArray[np.int64]
    """for each feature of B the most similar one of A [n_b]"""
    similarity_b: Floats
    candidates: int
    threshold: float
    """similarity from which a pair counts as matched"""

    @property
    def mean_max_a(self) -> float:
        """Mean over the features of A of the largest similarity to any of B.

        Of decoder cosines this is the mean max cosine similarity (Sharkey et al. 2022).
        """
        return float(self.similarity_a.mean())

    @property
    def mean_max_b(self) -> float:
        """The same, of the features of B to those of A."""
        return float(self.similarity_b.mean())

    @property
    def matched(self) -> pa.Table:
        """The pairs from the threshold on."""
        return self.pairs.filter(pa.array(self.pairs["similarity"].to_numpy() >= self.threshold))

    @property
    def flipped(self) -> "Matching":
        """The same with A and B exchanged."""
        names = {"feature_a": "feature_b", "feature_b": "feature_a"}
        columns = [names.get(name, name) for name in self.pairs.column_names]
        return replace(
            self,
            pairs=self.pairs.rename_columns(columns),
            nearest_a=self.nearest_b,
            similarity_a=self.similarity_b,
            nearest_b=self.nearest_a,
            similarity_b=self.similarity_a,
        )

    @property
    def unmatched_a(self) -> NDArray[np.int64]:
        """The features of A in no matched pair."""
        return np.setdiff1d(np.arange(len(self.nearest_a)), self.matched["feature_a"].to_numpy())

    @property
    def unmatched_b(self) -> NDArray[np.int64]:
        """The features of B in no matched pair."""
        return np.setdiff1d(np.arange(len(self.nearest_b)), self.matched["feature_b"].to_numpy())


class _Strongest:
    """The most similar features of each of n, from blocks of columns seen one after another."""

    def __init__(self, n: int, candidates: int) -> None:
        self.value = np.full((n, candidates), -np.inf, dtype=np.float32)
        self.index = np.zeros((n, candidates), dtype=np.int64)

    def update(self, rows: slice, similarity: NDArray, first: int) -> None:
        """Rows see more columns: similarity [rows, columns], the first of which is `first`."""
        keep = self.value.shape[1]
        size = similarity.shape[1]
        chosen = np.broadcast_to(np.arange(size), similarity.shape)
        if size > keep:
            chosen = np.argpartition(-similarity, keep - 1, axis=1)[:, :keep]
        value = np.take_along_axis(similarity, chosen, axis=1)
        value = np.concatenate([self.value[rows], value], axis=1)
        index = np.concatenate([self.index[rows], chosen + first], axis=1)
        best = np.argsort(-value, axis=1, kind="stable")[:, :keep]
        self.value[rows] = np.take_along_axis(value, best, axis=1)
        self.index[rows] = np.take_along_axis(index, best, axis=1)


def match_features(
    blocks: Iterable[Block],
    n_a: int,
    n_b: int,
    *,
    candidates: int = 32,
    threshold: float = MATCHED,
) -> Matching:
    """Match the n_a features of one SAE with the n_b of another.

    Args:
        blocks: similarities of consecutive features of A with all of B.
        candidates: of each feature, how many of the most similar ones of the other SAE may be its
            partner. With as many as there are features the matching is the Hungarian one.
        threshold: similarity from which a pair counts as matched.

    Memory: one block, and 12 bytes for each candidate. Raises InputError for blocks that do not
    cover A, or have another width than B.
    """
    check_range("threshold", threshold, above=0, high=1)
    candidates = as_index(candidates, where="candidates", low=1)
    of_a, of_b = _Strongest(n_a, min(candidates, n_b)), _Strongest(n_b, min(candidates, n_a))
    seen = 0
    for first, similarity in blocks:
        if first != seen or similarity.shape[1] != n_b:
            given = (first, similarity.shape)
            raise InputError("blocks do not follow one another", where="blocks", given=given)
        seen += len(similarity)
        of_a.update(slice(first, seen), similarity, 0)
        of_b.update(slice(0, n_b), similarity.T, first)
    if seen != n_a:
        raise InputError("blocks do not cover all features", where="blocks", given=seen)
    return Matching(
        pairs=_one_to_one(of_a, of_b),
        nearest_a=of_a.index[:, 0].copy(),
        similarity_a=of_a.value[:, 0].astype(np.float64),
        nearest_b=of_b.index[:, 0].copy(),
        similarity_b=of_b.value[:, 0].astype(np.float64),
        candidates=candidates,
        threshold=threshold,
    )


def _one_to_one(of_a: _Strongest, of_b: _Strongest) -> pa.Table:
    """The matching of largest total similarity among the candidates.

    Each feature of A may also be matched with a stand-in of its own at similarity 0, so that a
    matching of all of A always exists.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    n_a, n_b = len(of_a.value), len(of_b.value)
    a = np.concatenate([np.repeat(np.arange(n_a), of_a.value.shape[1]), of_b.index.ravel()])
    b = np.concatenate([of_a.index.ravel(), np.repeat(np.arange(n_b), of_b.value.shape[1])])
    value = np.concatenate([of_a.value.ravel(), of_b.value.ravel()]).astype(np.float64)
    _, once = np.unique(a * n_b + b, return_index=True)
    once = once[value[once] > 0]
    a, b, value = a[once], b[once], value[once]
    # costs are above 0, since a stored 0 would count as no edge
    cost = np.concatenate([2 - value, np.full(n_a, 2.0)])
    rows = np.concatenate([a, np.arange(n_a)])
    columns = np.concatenate([b, n_b + np.arange(n_a)])
    graph = csr_array((cost, (rows, columns)), shape=(n_a, n_b + n_a))
    left, right = min_weight_full_bipartite_matching(graph)
    real = right < n_b
    left, right = left[real].astype(np.int64), right[real].astype(np.int64)
    known = dict(zip((a * n_b + b).tolist(), value.tolist(), strict=True))
    similarity = np.array([known[key] for key in (left * n_b + right).tolist()], dtype=np.float64)
    order = np.lexsort((left, -similarity))
    return pa.table(
        {
            "feature_a": left[order],
            "feature_b": right[order],
            "similarity": similarity[order],
        }
    )


def cosine_blocks(directions_a: NDArray, directions_b: NDArray) -> Iterator[Block]:
    """Cosines of the rows of A [n_a, d] with those of B [n_b, d]; of a row of zeros they are 0.

    Raises InputError if the rows have different widths.
    """
    if directions_a.shape[1] != directions_b.shape[1]:
        raise InputError(
            "decoders write activations of different widths, so their directions cannot be "
            "compared",
            where="decoders",
            given=(directions_a.shape[1], directions_b.shape[1]),
        )
    unit_b = _unit(directions_b)
    for first in range(0, len(directions_a), _FEATURES):
        yield first, _unit(directions_a[first : first + _FEATURES]) @ unit_b.T


def _unit(directions: NDArray) -> NDArray[np.float32]:
    rows = np.asarray(directions, dtype=np.float32)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    norm[norm == 0] = 1
    return np.divide(rows, norm, dtype=np.float32)


def expected_max_cosine(d: int, n: int) -> float:
    """Mean of the largest cosine of a random direction in d dimensions with n random ones.

    What a mean max cosine similarity is to be compared with: the chance value. The cosine's
    distribution function is F(t) = I((1 + t) / 2; (d - 1) / 2, (d - 1) / 2), with I the regularised
    incomplete beta function, and the largest of n has F(t)^n.

    >>> round(expected_max_cosine(3, 1), 6), round(expected_max_cosine(3, 2), 4)
    (0.0, 0.3333)
    """
    from scipy.special import betainc

    t = np.linspace(-1, 1, _STEPS)
    half = (as_index(d, where="d", low=2) - 1) / 2
    distribution = betainc(half, half, (1 + t) / 2) ** as_index(n, where="n", low=1)
    return float(1 - np.trapezoid(distribution, t))


def correlation_blocks(codes_a: Any, codes_b: Any) -> Iterator[Block]:
    """Pearson correlations of the features of A with those of B over the same positions.

    codes_a, codes_b: scipy sparse arrays [positions, features]; positions at which nothing fires
    count too. A feature that never varies correlates with none: 0.

    Raises InputError if they are not of the same positions.
    """
    from scipy.sparse import csc_array

    if codes_a.shape[0] != codes_b.shape[0]:
        raise InputError(
            "codes are not of the same positions",
            where="codes",
            given=(codes_a.shape[0], codes_b.shape[0]),
        )
    n = codes_a.shape[0]
    a: Any = csc_array(codes_a, dtype=np.float64)
    b: Any = csc_array(codes_b, dtype=np.float64)
    (mean_a, deviation_a), (mean_b, deviation_b) = _moments(a), _moments(b)
    rows_b = b.tocsr()
    for first in range(0, a.shape[1], _FEATURES):
        some = slice(first, first + _FEATURES)
        product = (a[:, some].T.tocsr() @ rows_b).toarray() / n
        covariance = product - np.outer(mean_a[some], mean_b)
        scale = np.outer(deviation_a[some], deviation_b)
        found = np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)
        yield first, np.clip(found, -1, 1).astype(np.float32)


def _moments(codes: Any) -> tuple[Floats, Floats]:
    """Mean and standard deviation of each column."""
    n = codes.shape[0]
    mean = np.asarray(codes.sum(0)).ravel() / n
    square = np.asarray(codes.multiply(codes).sum(0)).ravel() / n
    variance = square - mean**2
    # what rounding leaves of a constant column is no variance
    return mean, np.sqrt(np.where(variance > 1e-12 * square, variance, 0))
