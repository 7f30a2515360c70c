"""Rows that are computed when they are read, and moments of rows."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class RowSource(Protocol):
    """Where the rows of a store are from that has none on disk."""

    def chunk(self, site: str, chunk: int) -> NDArray[Any]:
        """The bits of bfloat16 [row, d_in] of a committed chunk, filled up where its rows end."""
        ...


@dataclass(frozen=True)
class SiteStatistics:
    """Moments of one site over the kept positions of the train split."""

    count: int
    mean: NDArray[np.float64]
    """[d_in]"""
    mean_square: float
    """E ||x||^2"""
