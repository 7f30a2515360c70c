"""Triton programs that choose among pre-activations: exact top-k, and all above thresholds.

The product with the encoder is torch's, in chunks of rows, so pre-activations [batch, d_sae] never
exist. Top-k reads a chunk twice. The k-th largest of the maxima of any groups of a row bounds its
k-th largest element from below, so only what reaches that bound, rarely more than a few beyond k,
is set aside and searched by a second program. Where too much reaches it (ties), the second program
searches the whole row instead, so that the result is exact in any case.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from sae.kernels.triton_launch import launch, power_of_2
from saescope.errors import InputError

_CHUNK_ELEMENTS = 2**26
"""pre-activations held at a time"""
_GROUPS = (2048, 4096)
"""groups of a row, which are also the columns read at a time: 16 for each of k, within bounds"""
_LANES = 1024
"""columns read at a time by `above`"""
_NARROW = 256
"""candidates read at a time"""


@triton.jit
def _keys(pre, MASK: tl.constexpr, SIGNED: tl.constexpr):
    """Integers in the order of the numbers (of their magnitudes, if signed), -MASK - 1 to MASK."""
    if MASK == 0x7FFF:  # of 16 bits
        bits = pre.to(tl.int16, bitcast=True).to(tl.int32)
    else:
        bits = pre.to(tl.int32, bitcast=True)
    return bits & MASK if SIGNED else bits ^ ((bits >> 31) & MASK)


@triton.jit
def _kth(keys, k, MASK: tl.constexpr, BITS: tl.constexpr):
    """The k-th largest of keys int32 [n]; -MASK - 1, below all, if there are fewer."""
    reached = tl.sum((keys >= 0).to(tl.int32), 0) >= k
    best = tl.where(reached, 0, -MASK - 1)
    step = tl.full([], (MASK + 1) // 2, tl.int32)
    for _ in range(BITS):
        reached = tl.sum((keys >= best + step).to(tl.int32), 0) >= k
        best = tl.where(reached, best + step, best)
        step = step >> 1
    return best


@triton.jit
def _candidates(
    pre,
    found,
    found_index,
    counts,
    k,
    d_sae,
    MASK: tl.constexpr,
    BITS: tl.constexpr,
    SIGNED: tl.constexpr,
    LANES: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Of one row: what reaches the k-th largest of the maxima of LANES groups, and how many do."""
    row = tl.program_id(0).to(tl.int64)
    pre += row * d_sae
    found += row * CAPACITY
    found_index += row * CAPACITY
    maxima = tl.full([LANES], -MASK - 1, tl.int32)
    for left in range(0, d_sae, LANES):
        column = left + tl.arange(0, LANES)
        inside = column < d_sae
        key = _keys(tl.load(pre + column, mask=inside, other=0.0), MASK, SIGNED)
        maxima = tl.maximum(maxima, tl.where(inside, key, -MASK - 1))
    bar = _kth(maxima, k, MASK, BITS)
    count = tl.full([], 0, tl.int32)
    for left in range(0, d_sae, LANES):
        column = left + tl.arange(0, LANES)
        inside = column < d_sae
        value = tl.load(pre + column, mask=inside, other=0.0)
        passed = ((_keys(value, MASK, SIGNED) >= bar) & inside).to(tl.int32)
        slot = count + tl.cumsum(passed, 0) - 1
        kept = (passed > 0) & (slot < CAPACITY)
        tl.store(found + slot, value, mask=kept)
        tl.store(found_index + slot, column, mask=kept)
        count += tl.sum(passed, 0)
    tl.store(counts + row, count)


@triton.jit
def _load(found, pre, position, narrow, inside):
    """Candidates where they are all there, otherwise the row itself."""
    few = tl.load(found + position, mask=inside & narrow, other=0.0)
    all_ = tl.load(pre + position, mask=inside & (narrow == 0), other=0.0)
    return tl.where(narrow, few, all_)


@triton.jit
def _count_above(
    found, pre, narrow, number, bar, MASK: tl.constexpr, SIGNED: tl.constexpr, LANES: tl.constexpr
):
    above = tl.full([], 0, tl.int32)
    for first in range(0, number, LANES):
        position = first + tl.arange(0, LANES)
        inside = position < number
        key = _keys(_load(found, pre, position, narrow, inside), MASK, SIGNED)
        above += tl.sum(((key > bar) & inside).to(tl.int32), 0)
    return above


@triton.jit
def _choose(
    pre,
    found,
    found_index,
    counts,
    index,
    values,
    k,
    d_sae,
    MASK: tl.constexpr,
    BITS: tl.constexpr,
    SIGNED: tl.constexpr,
    LANES: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Of one row: the k largest of its candidates; of equals, those that come first."""
    row = tl.program_id(0).to(tl.int64)
    pre += row * d_sae
    found += row * CAPACITY
    found_index += row * CAPACITY
    index += row * k
    values += row * k
    count = tl.load(counts + row)
    narrow = count <= CAPACITY
    number = tl.where(narrow, count, d_sae)
    # the k-th largest, from its highest bit down: at least k are above one less than it
    above = _count_above(found, pre, narrow, number, -1, MASK, SIGNED, LANES)
    kth = tl.where(above >= k, 0, -MASK - 1)
    step = tl.full([], (MASK + 1) // 2, tl.int32)
    for _ in range(BITS):
        above = _count_above(found, pre, narrow, number, kth + step - 1, MASK, SIGNED, LANES)
        kth = tl.where(above >= k, kth + step, kth)
        step = step >> 1
    wanted_ties = k - _count_above(found, pre, narrow, number, kth, MASK, SIGNED, LANES)
    written = tl.full([], 0, tl.int32)
    ties = tl.full([], 0, tl.int32)
    for first in range(0, number, LANES):
        position = first + tl.arange(0, LANES)
        inside = position < number
        value = _load(found, pre, position, narrow, inside)
        key = _keys(value, MASK, SIGNED)
        tie = ((key == kth) & inside).to(tl.int32)
        early = (tie > 0) & (ties + tl.cumsum(tie, 0) <= wanted_ties)
        chosen = (((key > kth) & inside) | early).to(tl.int32)
        slot = written + tl.cumsum(chosen, 0) - 1
        column = tl.load(found_index + position, mask=inside & narrow, other=0)
        column = tl.where(narrow, column, position)
        tl.store(index + slot, column.to(tl.int64), mask=chosen > 0)
        tl.store(values + slot, value, mask=chosen > 0)
        written += tl.sum(chosen, 0)
        ties += tl.sum(tie, 0)


@triton.jit
def _count(pre, threshold, counts, d_sae, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([LANES], tl.int32)
    for left in range(0, d_sae, LANES):
        column = left + tl.arange(0, LANES)
        inside = column < d_sae
        value = tl.load(pre + row * d_sae + column, mask=inside, other=0.0).to(tl.float32)
        bar = tl.load(threshold + column, mask=inside, other=0.0)
        total += ((value > bar) & inside).to(tl.int32)
    tl.store(counts + row, tl.sum(total, 0))


@triton.jit
def _fill(pre, threshold, row_ptr, index, values, d_sae, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(row_ptr + row)
    for left in range(0, d_sae, LANES):
        column = left + tl.arange(0, LANES)
        inside = column < d_sae
        value = tl.load(pre + row * d_sae + column, mask=inside, other=0.0)
        bar = tl.load(threshold + column, mask=inside, other=0.0)
        passed = ((value.to(tl.float32) > bar) & inside).to(tl.int32)
        slot = start + tl.cumsum(passed, 0) - 1
        tl.store(index + slot, column.to(tl.int64), mask=passed > 0)
        tl.store(values + slot, value, mask=passed > 0)
        start += tl.sum(passed, 0)


def topk(
    x: Tensor, W: Tensor, b: Tensor | None, k: int, *, signed: bool = False
) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each row (in magnitude, if signed).

    Raises InputError if there are not as many.
    """
    if k > len(W):
        raise InputError(
            "k exceeds the dictionary", where="topk", given=k, allowed=f"1 to {len(W)}"
        )
    index = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    value = torch.empty(len(x), k, dtype=x.dtype, device=x.device)
    for block, pre in _products(x, W, b):
        _largest(pre, index[block], value[block], signed=signed)
        del pre  # before the next is made
    return index, value


def _largest(pre: Tensor, index: Tensor, value: Tensor, *, signed: bool) -> None:
    """Put the k largest of each row of pre into index and value [rows, k]."""
    (rows, d_sae), k = pre.shape, index.shape[1]
    capacity, bits = power_of_2(2 * k), 8 * pre.element_size() - 1
    found = torch.empty(rows, capacity, dtype=pre.dtype, device=pre.device)
    found_index = torch.empty(rows, capacity, dtype=torch.int32, device=pre.device)
    counts = torch.empty(rows, dtype=torch.int32, device=pre.device)
    given = (pre, found, found_index, counts)
    kind = {"MASK": 2**bits - 1, "BITS": bits, "SIGNED": signed, "CAPACITY": capacity}
    groups = min(max(power_of_2(16 * k), _GROUPS[0]), _GROUPS[1])
    groups = min(groups, power_of_2(d_sae))
    launch(_candidates, (rows,), pre, *given, k, d_sae, **kind, LANES=groups, num_warps=8)
    made = (index, value)
    launch(_choose, (rows,), pre, *given, *made, k, d_sae, **kind, LANES=_NARROW, num_warps=2)


def above(
    x: Tensor, W: Tensor, b: Tensor | None, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Pre-activations above their feature's threshold."""
    d_sae, bars = len(W), threshold.float().contiguous()
    row_ptr = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
    size = {"LANES": min(power_of_2(d_sae), _LANES), "num_warps": 4}
    indices, values, before = [row_ptr[:0]], [x.new_zeros(0)], 0
    for block, pre in _products(x, W, b):
        counts = torch.empty(len(pre), dtype=torch.int64, device=x.device)
        launch(_count, (len(pre),), x, pre, bars, counts, d_sae, **size)
        starts = functional.pad(counts.cumsum(0), (1, 0))
        row_ptr[block.start + 1 : block.stop + 1] = starts[1:] + before
        total = int(starts[-1])
        index = torch.empty(total, dtype=torch.int64, device=x.device)
        value = torch.empty(total, dtype=x.dtype, device=x.device)
        launch(_fill, (len(pre),), x, pre, bars, starts, index, value, d_sae, **size)
        indices.append(index)
        values.append(value)
        before += total
        del pre
    return row_ptr, torch.cat(indices), torch.cat(values)


def _products(x: Tensor, W: Tensor, b: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """x W^T + b by chunks of rows, in the type that torch's products have here."""
    if torch.is_autocast_enabled(x.device.type):  # once, not for every chunk
        low = torch.get_autocast_dtype(x.device.type)
        x, W, b = x.to(low), W.to(low), None if b is None else b.to(low)
    rows = max(1, _CHUNK_ELEMENTS // len(W))
    for start in range(0, len(x), rows):
        block = slice(start, min(start + rows, len(x)))
        yield block, functional.linear(x[block], W, b)
