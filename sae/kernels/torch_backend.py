"""The `torch` backend: torch's embedding-bag operators. No compiler, any device, any dtype.

A code is a bag of decoder rows with weights: the cost is batch * k * d_in, where dense products
pay batch * d_sae * d_in. Shapes are those of `sae.kernels.backend`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from sae.kernels.codes import SparseCodes, csr_of

NAME = "torch"
DENSE = 1 / 32
"""a bag's entry costs about as much as 32 elements of a matrix product"""
_SUM = 0
"""the operators' number for mode="sum\""""
_GROUP = 16
"""entries a group in `topk_by_groups`"""
_CHUNK_ELEMENTS = 2**22
"""Pre-activations held at a time: [batch, d_sae] never exists."""


def _chunks(x: Tensor, W: Tensor, b: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Consecutive rows of x and their pre-activations, so many that they stay in the cache."""
    rows = max(1, _CHUNK_ELEMENTS // len(W))
    for start in range(0, len(x), rows):
        block = slice(start, min(start + rows, len(x)))
        yield block, functional.linear(x[block], W, b)


def topk(
    x: Tensor, W: Tensor, b: Tensor | None, k: int, *, signed: bool = False
) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each row (in magnitude, if signed)."""
    index = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    value = torch.empty(len(x), k, dtype=x.dtype, device=x.device)
    for block, pre in _chunks(x, W, b):
        if signed:
            index[block] = topk_by_groups(pre.abs(), k)[1]
            value[block] = pre.gather(1, index[block])
        else:
            value[block], index[block] = topk_by_groups(pre, k)
    return index, value


def topk_by_groups(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row (value, index), unsorted; exact, and faster than `topk` alone.

    Deal a row into groups. An entry among the k largest is in one of the k groups with the largest
    maxima: otherwise k other groups would each hold a larger one. So only those are searched.
    """
    rows, width = pre.shape
    groups = width // _GROUP
    if width % _GROUP or groups < 4 * k:
        return pre.topk(k, dim=-1, sorted=False)
    dealt = pre.view(rows, _GROUP, groups)
    chosen = dealt.amax(1).topk(k, dim=-1, sorted=False).indices
    candidates = dealt.gather(2, chosen[:, None].expand(rows, _GROUP, k)).view(rows, -1)
    value, at = candidates.topk(k, dim=-1, sorted=False)
    return value, at // k * groups + chosen.gather(1, at % k)


def above(
    x: Tensor, W: Tensor, b: Tensor | None, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Pre-activations above their feature's threshold, by chunks of rows."""
    blocks = []
    for _, pre in _chunks(x, W, b):
        mask = pre > threshold
        blocks.append(SparseCodes(*csr_of(mask), pre[mask].to(x.dtype), len(W)))
    if not blocks:
        none = torch.zeros(1, dtype=torch.int64, device=x.device)
        return none, none[:0], x.new_zeros(0)
    codes = SparseCodes.concatenate(blocks)
    return codes.row_ptr, codes.index, codes.value


def decode(row_ptr: Tensor, index: Tensor, value: Tensor, W: Tensor) -> Tensor:
    """Sum of value W[index] over each row's entries."""
    return functional.embedding_bag(
        index, W, row_ptr, mode="sum", per_sample_weights=value, include_last_offset=True
    )


def entry_dots(row_ptr: Tensor, index: Tensor, rows: Tensor, W: Tensor) -> Tensor:
    """The dot product of an entry's row and its feature's row of W."""
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows.contiguous(),
        W,
        index,
        row_ptr[:-1].contiguous(),
        row_of_entry(row_ptr, len(index)),
        _SUM,
        -1,
    )


def decode_error(
    row_ptr: Tensor, index: Tensor, value: Tensor, W: Tensor, b: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The reconstruction's error, its squared norms and its dots with the entries' rows of W."""
    error = decode(row_ptr, index, value, W).add_(b).sub_(target)
    return error, error.square().sum(1), entry_dots(row_ptr, index, error, W)


def weight_gradient(
    row_ptr: Tensor, index: Tensor, value: Tensor, rows: Tensor, d_sae: int
) -> Tensor:
    """For each feature the sum of value times its entry's row."""
    order = torch.argsort(index, stable=True)
    feature_ptr = torch.zeros(d_sae + 1, dtype=torch.int64, device=index.device)
    torch.cumsum(torch.bincount(index, minlength=d_sae), 0, out=feature_ptr[1:])
    # transposed codes: bag = feature, entries = rows; faster than the operator's own backward
    return decode(feature_ptr, row_of_entry(row_ptr, len(index))[order], value[order], rows)


def feature_sums(index: Tensor, value: Tensor, d_sae: int) -> Tensor:
    """For each feature the sum of its values."""
    return torch.zeros(d_sae, dtype=value.dtype, device=value.device).index_add_(0, index, value)


def row_of_entry(row_ptr: Tensor, entries: int) -> Tensor:
    """Row of each entry, int64 [entries]."""
    rows = torch.arange(len(row_ptr) - 1, device=row_ptr.device)
    # with the length given, nothing waits for a GPU to count it
    return torch.repeat_interleave(rows, row_ptr.diff(), output_size=entries)
