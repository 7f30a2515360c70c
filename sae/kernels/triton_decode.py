"""Triton programs that read feature rows for the entries of codes: decode, its error, dots.

A program has one row of codes and some columns of W. Programs of the same columns run one after
another, so that those columns of W stay in the cache, and W is read from memory about once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae.kernels.triton_launch import blocks, launch, power_of_2

_TILE = 8192
"""elements of W that a program holds"""
_MOST_ENTRIES = 128
_MOST_WIDTH = 512
_PARTIAL = 2**26
"""elements of scratch that dots of parts of rows may take"""


@triton.jit
def _decode(row_ptr, index, value, W, out, d, ENTRIES: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < d
    start = tl.load(row_ptr + row)
    count = (tl.load(row_ptr + row + 1) - start).to(tl.int32)
    total = tl.zeros([ENTRIES, WIDTH], tl.float32)
    for first in range(0, count, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        held = entry < count
        feature = tl.load(index + start + entry, mask=held, other=0)
        f = tl.load(value + start + entry, mask=held, other=0.0).to(tl.float32)
        where = feature[:, None] * d + column[None, :]
        tile = tl.load(W + where, mask=held[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += f[:, None] * tile
    tl.store(out + row * d + column, tl.sum(total, 0), mask=inside)


@triton.jit
def _decode_error(
    row_ptr,
    index,
    value,
    W,
    b,
    target,
    error,
    squares,
    dots,
    entries,
    d,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Of one row and some columns: the error, its squared norm, and its dots with W's rows."""
    row = tl.program_id(0).to(tl.int64)
    column_block = tl.program_id(1).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < d
    start = tl.load(row_ptr + row)
    count = (tl.load(row_ptr + row + 1) - start).to(tl.int32)
    wanted = tl.load(target + row * d + column, mask=inside, other=0.0).to(tl.float32)
    e = tl.load(b + column, mask=inside, other=0.0).to(tl.float32) - wanted
    dots += column_block * entries + start
    if count <= ENTRIES:  # the tile is read once and kept
        entry = tl.arange(0, ENTRIES)
        held = entry < count
        feature = tl.load(index + start + entry, mask=held, other=0)
        f = tl.load(value + start + entry, mask=held, other=0.0).to(tl.float32)
        where = feature[:, None] * d + column[None, :]
        tile = tl.load(W + where, mask=held[:, None] & inside[None, :], other=0.0).to(tl.float32)
        e += tl.sum(f[:, None] * tile, 0)
        tl.store(dots + entry, tl.sum(tile * e[None, :], 1), mask=held)
    else:
        total = tl.zeros([ENTRIES, WIDTH], tl.float32)
        for first in range(0, count, ENTRIES):
            entry = first + tl.arange(0, ENTRIES)
            held = entry < count
            feature = tl.load(index + start + entry, mask=held, other=0)
            f = tl.load(value + start + entry, mask=held, other=0.0).to(tl.float32)
            where = feature[:, None] * d + column[None, :]
            valid = held[:, None] & inside[None, :]
            total += f[:, None] * tl.load(W + where, mask=valid, other=0.0).to(tl.float32)
        e += tl.sum(total, 0)
        for first in range(0, count, ENTRIES):
            entry = first + tl.arange(0, ENTRIES)
            held = entry < count
            feature = tl.load(index + start + entry, mask=held, other=0)
            where = feature[:, None] * d + column[None, :]
            valid = held[:, None] & inside[None, :]
            tile = tl.load(W + where, mask=valid, other=0.0).to(tl.float32)
            tl.store(dots + entry, tl.sum(tile * e[None, :], 1), mask=held)
    tl.store(error + row * d + column, e, mask=inside)
    tl.store(squares + column_block * tl.num_programs(0) + row, tl.sum(e * e, 0))


@triton.jit
def _entry_dots(
    row_ptr, index, rows, W, dots, entries, d, span, ENTRIES: tl.constexpr, WIDTH: tl.constexpr
):
    """Of one row and `span` columns (a multiple of WIDTH)."""
    row = tl.program_id(0).to(tl.int64)
    column_block = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(1) * span
    start = tl.load(row_ptr + row)
    count = (tl.load(row_ptr + row + 1) - start).to(tl.int32)
    for first in range(0, count, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        held = entry < count
        feature = tl.load(index + start + entry, mask=held, other=0)
        total = tl.zeros([ENTRIES, WIDTH], tl.float32)
        for left in range(begin, begin + span, WIDTH):
            column = left + tl.arange(0, WIDTH)
            inside = column < d
            x = tl.load(rows + row * d + column, mask=inside, other=0.0).to(tl.float32)
            where = feature[:, None] * d + column[None, :]
            valid = held[:, None] & inside[None, :]
            total += tl.load(W + where, mask=valid, other=0.0).to(tl.float32) * x[None, :]
        tl.store(dots + column_block * entries + start + entry, tl.sum(total, 1), mask=held)


def decode(row_ptr: Tensor, index: Tensor, value: Tensor, W: Tensor) -> Tensor:
    """Sum of value W[index] over each row's entries."""
    batch, d = len(row_ptr) - 1, W.shape[1]
    out = torch.empty(batch, d, dtype=value.dtype, device=value.device)
    tile = _tile(len(index), batch, d)
    given = [each.contiguous() for each in (row_ptr, index, value, W)]
    launch(_decode, (batch, blocks(d, tile["WIDTH"])), W, *given, out, d, **tile)
    return out


def entry_dots(row_ptr: Tensor, index: Tensor, rows: Tensor, W: Tensor) -> Tensor:
    """The dot product of an entry's row and its feature's row of W."""
    batch, d = rows.shape
    tile = _tile(len(index), batch, d)
    span, column_blocks = tile["WIDTH"], blocks(d, tile["WIDTH"])
    if column_blocks * len(index) > _PARTIAL:
        span, column_blocks = span * column_blocks, 1
    dots = torch.empty(column_blocks, len(index), dtype=torch.float32, device=rows.device)
    given = [each.contiguous() for each in (row_ptr, index, rows, W)]
    launch(_entry_dots, (batch, column_blocks), W, *given, dots, len(index), d, span, **tile)
    return dots.sum(0).to(rows.dtype)


def decode_error(
    row_ptr: Tensor, index: Tensor, value: Tensor, W: Tensor, b: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The reconstruction's error, its squared norms and its dots with the entries' rows of W."""
    batch, d = target.shape
    tile = _tile(len(index), batch, d)
    column_blocks = blocks(d, tile["WIDTH"])
    if column_blocks * len(index) > _PARTIAL:  # rather read W twice
        error = decode(row_ptr, index, value, W).add_(b).sub_(target)
        return error, error.square().sum(1), entry_dots(row_ptr, index, error, W)
    error = torch.empty(batch, d, dtype=value.dtype, device=value.device)
    squares, dots = (
        torch.empty(column_blocks, size, dtype=torch.float32, device=value.device)
        for size in (batch, len(index))
    )
    given = [each.contiguous() for each in (row_ptr, index, value, W, b, target)]
    made = (error, squares, dots)
    launch(_decode_error, (batch, column_blocks), W, *given, *made, len(index), d, **tile)
    return error, squares.sum(0).to(value.dtype), dots.sum(0).to(value.dtype)


def _tile(entries: int, batch: int, d: int) -> dict[str, int]:
    """How much of W a program holds at a time: enough entries for a row of mean length."""
    mean = power_of_2(blocks(max(1, entries), max(1, batch)))
    tall = min(max(16, mean), _MOST_ENTRIES)
    wide = min(max(16, power_of_2(d)), _TILE // tall, _MOST_WIDTH)
    return {"ENTRIES": tall, "WIDTH": wide, "num_warps": 8 if tall * wide >= _TILE else 4}
