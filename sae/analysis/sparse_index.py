"""An exact index of sparse codes: for each feature the rows that have it, with their values.

The inner product of a query with a row is a sum over the features that both have. So a search reads
the lists of the query's features alone: with k of d_sae features a row, and features that fire
equally often, k^2 / d_sae products a row instead of the d_in of dense vectors. Rows whose products
are never touched have the score 0. Nothing is approximated (Wen et al. 2025, section 3.3, count on
such a search).
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Self

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray

from sae.kernels.codes import SparseCodes
from saescope.errors import InputError
from saescope.integers import as_index


class SparseIndex:
    """Rows of sparse codes, searched by inner product; of unit codes, by cosine.

    >>> rows = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0], [0.0, 1.0, 1.0]])
    >>> index = SparseIndex(SparseCodes.from_dense(rows))
    >>> scores, found = index.search(SparseCodes.from_dense(torch.tensor([[0.0, 1.0, 1.0]])), 2)
    >>> scores.tolist(), found.tolist()
    ([[3.0, 2.0]], [[1, 0]])
    """

    def __init__(self, codes: SparseCodes) -> None:
        codes = codes.compact()
        if not codes.batch:
            raise InputError("has no rows to search", where="SparseIndex", given=0)
        if not bool(torch.isfinite(codes.value).all()):
            raise InputError("has values that are not finite", where="SparseIndex")
        self.rows, self.d_sae = codes.batch, codes.d_sae
        by_feature = codes.index.cpu().argsort(stable=True)
        counts = torch.bincount(codes.index.cpu(), minlength=codes.d_sae)
        self._ends = np.concatenate([[0], counts.cumsum(0).numpy()])
        self._row = codes.rows().cpu()[by_feature].to(torch.int32).numpy()
        self._value = codes.value.detach().cpu().float()[by_feature].numpy()

    @classmethod
    def of_unit(cls, codes: SparseCodes) -> Self:
        """An index of the codes scaled to unit length; rows on which nothing fires stay 0."""
        return cls(unit(codes))

    @property
    def bytes(self) -> int:
        """What the lists take in memory."""
        return self._row.nbytes + self._value.nbytes + self._ends.nbytes

    def search(
        self, queries: SparseCodes, k: int
    ) -> tuple[Float[NDArray[np.float32], "query k"], Int[NDArray[np.int64], "query k"]]:
        """Scores and numbers of the k best rows of each query, best first; of equals the first.

        Raises InputError for codes of another width, or a k that is not 1 to the number of rows.
        """
        if queries.d_sae != self.d_sae:
            raise InputError(
                "has codes of another width",
                where="SparseIndex.search",
                given=queries.d_sae,
                allowed=str(self.d_sae),
            )
        k = as_index(k, where="SparseIndex.search.k", low=1, high=self.rows)
        scores = np.empty((queries.batch, k), np.float32)
        found = np.empty((queries.batch, k), np.int64)
        sums = np.zeros(self.rows, np.float32)
        for number, (features, values) in enumerate(_each(queries)):
            sums[:] = 0
            for feature, value in zip(features, values, strict=True):
                start, end = self._ends[feature], self._ends[feature + 1]
                # a row is in a list once at most
                sums[self._row[start:end]] += value * self._value[start:end]
            found[number] = strongest(sums, k)
            scores[number] = sums[found[number]]
        return scores, found


def _each(codes: SparseCodes) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
    """Features and values of each row, stored zeros left out."""
    codes = codes.compact()
    ends = codes.row_ptr.tolist()
    index, value = codes.index.tolist(), codes.value.detach().cpu().float().numpy()
    for start, end in pairwise(ends):
        yield index[start:end], value[start:end]


def unit(codes: SparseCodes) -> SparseCodes:
    """The codes scaled to unit length; rows on which nothing fires stay 0."""
    square = codes.value.new_zeros(codes.batch).index_add(0, codes.rows(), codes.value.square())
    return codes.scale(square.clamp_min(torch.finfo(square.dtype).tiny).rsqrt()[:, None])


def strongest(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Indices of the k largest of scores [n], largest first; of equals the first.

    >>> strongest(np.array([1.0, 3.0, 1.0, 3.0]), 3).tolist()
    [1, 3, 0]
    """
    n = len(scores)
    if k == 1:
        return np.array([scores.argmax()])
    last = np.partition(scores, n - k)[n - k]
    above = np.flatnonzero(scores > last)
    equal = np.flatnonzero(scores == last)[: k - len(above)]
    chosen = np.concatenate([above, equal])
    return chosen[np.argsort(-scores[chosen], kind="stable")]
