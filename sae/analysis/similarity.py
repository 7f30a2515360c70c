"""Cosines of a dictionary's rows with each other, a block at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional


def cosines_with_others(directions: Tensor, block: int) -> Iterator[tuple[int, Tensor]]:
    """For each block of rows [rows, d] its first row and the cosines with all rows [block, rows].

    A row's cosine with itself is -inf, so that it is never its own nearest.

    >>> [(first, cosine.tolist()) for first, cosine in cosines_with_others(torch.eye(2), 1)]
    [(0, [[-inf, 0.0]]), (1, [[0.0, -inf]])]
    """
    unit = functional.normalize(directions, dim=1)
    for first in range(0, len(unit), block):
        cosine = unit[first : first + block] @ unit.T
        itself = torch.arange(len(cosine))
        cosine[itself, itself + first] = -torch.inf
        yield first, cosine
