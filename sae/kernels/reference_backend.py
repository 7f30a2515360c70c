"""The truth that every fast kernel is tested against: plain dense torch.

Shapes are those of `sae.kernels.backend`.
"""

import torch
from torch import Tensor

from sae.kernels.codes import SparseCodes, csr_of

NAME = "reference"
DENSE = 0.0


def _pre(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    pre = x @ W.T
    return pre if b is None else pre + b


def topk(
    x: Tensor, W: Tensor, b: Tensor | None, k: int, *, signed: bool = False
) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each row (in magnitude, if signed)."""
    pre = _pre(x, W, b)
    index = (pre.abs() if signed else pre).topk(k, dim=-1, sorted=False).indices
    return index, pre.gather(1, index)


def above(
    x: Tensor, W: Tensor, b: Tensor | None, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Pre-activations above their feature's threshold."""
    pre = _pre(x, W, b)
    mask = pre > threshold
    return (*csr_of(mask), pre[mask])


def decode(row_ptr: Tensor, index: Tensor, value: Tensor, W: Tensor) -> Tensor:
    """Sum of value W[index] over each row's entries."""
    return SparseCodes(row_ptr, index, value, len(W)).dense() @ W


def entry_dots(row_ptr: Tensor, index: Tensor, rows: Tensor, W: Tensor) -> Tensor:
    """The dot product of an entry's row and its feature's row of W."""
    return (rows @ W.T)[SparseCodes(row_ptr, index, index, len(W)).rows(), index]


def decode_error(
    row_ptr: Tensor, index: Tensor, value: Tensor, W: Tensor, b: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The reconstruction's error, its squared norms and its dots with the entries' rows of W."""
    error = decode(row_ptr, index, value, W) + b - target
    return error, error.square().sum(1), entry_dots(row_ptr, index, error, W)


def weight_gradient(
    row_ptr: Tensor, index: Tensor, value: Tensor, rows: Tensor, d_sae: int
) -> Tensor:
    """For each feature the sum of value times its entry's row."""
    return SparseCodes(row_ptr, index, value, d_sae).dense().T @ rows


def feature_sums(index: Tensor, value: Tensor, d_sae: int) -> Tensor:
    """For each feature the sum of its values."""
    return torch.zeros(d_sae, dtype=value.dtype, device=value.device).index_add(0, index, value)
