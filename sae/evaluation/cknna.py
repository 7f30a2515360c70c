"""CKNNA: whether two representations of the same rows have the same near neighbours.

Centred kernel nearest-neighbour alignment (Huh et al. 2024, "The Platonic Representation
Hypothesis", section 2 and appendix A): with linear kernels K = A A^T, L = B B^T of n rows, and a
mask of the pairs (i, j), i != j, where j is among the k nearest of i in both,

    CKNNA = HSIC_m(K, L) / sqrt(HSIC_K(K, K) HSIC_L(L, L))

HSIC is the unbiased estimate (Song et al. 2012, equation 5), of kernels masked by the neighbours
that both share (m), or that each has by itself (K, L).
"""

import torch
from torch import Tensor

from saescope.errors import InputError
from saescope.integers import as_index


def cknna(a: Tensor, b: Tensor, *, neighbours: int = 10) -> float | None:
    """Alignment of two representations of the same rows, [n, d_a] and [n, d_b]; 1 if they agree.

    None where either has no neighbourhood (all of its rows are equal). Raises InputError for other
    numbers of rows, or too few.

    >>> rows = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    >>> round(cknna(rows, 3 * rows) or 0, 6)
    1.0
    """
    if len(a) != len(b):
        raise InputError("needs the same rows of both", where="cknna", given=(len(a), len(b)))
    n = as_index(len(a), where="cknna.rows", low=4)
    neighbours = as_index(neighbours, where="cknna.neighbours", low=1, high=n - 1)
    kernels = [_products(each) for each in (a, b)]
    masks = [_nearest(kernel, neighbours) for kernel in kernels]
    shared = _hsic(kernels[0] * masks[0] * masks[1], kernels[1] * masks[0] * masks[1])
    own = [_hsic(k * mask, k * mask) for k, mask in zip(kernels, masks, strict=True)]
    square = own[0] * own[1]
    if own[0] <= 0 or square <= 0:
        return None
    return shared / square**0.5


def _products(rows: Tensor) -> Tensor:
    """Products of rows with each other [n, n], float64, from some columns at a time."""
    found = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for part in rows.split(4096, dim=1):
        found += part.double() @ part.double().T
    return found


def _nearest(kernel: Tensor, neighbours: int) -> Tensor:
    """1.0 where the column is among the row's so many largest products, itself left out."""
    others = kernel.clone().fill_diagonal_(-torch.inf)
    return torch.zeros_like(kernel).scatter_(1, others.topk(neighbours, dim=1).indices, 1.0)


def _hsic(k: Tensor, ell: Tensor) -> float:
    """The unbiased estimate of two kernels [n, n], whose diagonals are taken for 0."""
    n = len(k)
    k, ell = k.clone().fill_diagonal_(0), ell.clone().fill_diagonal_(0)
    traced = (k * ell.T).sum()
    product = k.sum() * ell.sum() / ((n - 1) * (n - 2))
    between = 2 * (k.sum(0) * ell.sum(1)).sum() / (n - 2)
    return float((traced + product - between) / (n * (n - 3)))
