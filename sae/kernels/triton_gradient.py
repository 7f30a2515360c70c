"""Triton programs for the gradients of feature rows: sums of rows over each feature's entries.

Entries are sorted by feature and cut into chunks of equal length, so that frequent features do not
hold up the rest. A program sums the runs of equal features in its chunk. A run that lies within the
chunk is a feature's whole sum and is stored. One that touches an end of the chunk may go on in the
next: such sums are either added to the result atomically, or set aside as pieces and summed in
their order by a second program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae.kernels.torch_backend import row_of_entry
from sae.kernels.triton_launch import blocks, launch, power_of_2

_CHUNK = 128
"""entries a program"""
_MOST_WIDTH = 512


@triton.jit
def _sum_runs(
    feature,
    row,
    value,
    rows,
    out,
    pieces,
    piece_feature,
    entries,
    d,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < d
    first = chunk * CHUNK
    current = tl.load(feature + first)
    total = tl.zeros([WIDTH], tl.float32)
    runs = tl.full([], 0, tl.int32)
    for entry in range(first, tl.minimum(first + CHUNK, entries)):
        at = tl.load(feature + entry)
        if at != current:
            if runs > 0:  # the run began and ended in this chunk
                tl.store(out + current * d + column, total, mask=inside)
            elif ATOMIC:
                tl.atomic_add(out + current * d + column, total, mask=inside, sem="relaxed")
            else:
                tl.store(pieces + 2 * chunk * d + column, total, mask=inside)
                tl.store(piece_feature + 2 * chunk, current)
            total = tl.zeros([WIDTH], tl.float32)
            current = at
            runs += 1
        f = tl.load(value + entry).to(tl.float32)
        x = tl.load(rows + tl.load(row + entry) * d + column, mask=inside, other=0.0)
        total += f * x.to(tl.float32)
    if ATOMIC:
        tl.atomic_add(out + current * d + column, total, mask=inside, sem="relaxed")
    else:
        tl.store(pieces + (2 * chunk + 1) * d + column, total, mask=inside)
        tl.store(piece_feature + 2 * chunk + 1, current)
        if runs == 0:  # the chunk is one run: its sum is the second piece
            tl.store(pieces + 2 * chunk * d + column, tl.zeros([WIDTH], tl.float32), mask=inside)
            tl.store(piece_feature + 2 * chunk, current)


@triton.jit
def _sum_pieces(pieces, piece_feature, out, number, d, WIDTH: tl.constexpr):
    """The sum of consecutive pieces of one feature, by the program of the first of them."""
    piece = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < d
    current = tl.load(piece_feature + piece)
    before = tl.load(piece_feature + piece - 1, mask=piece > 0, other=-1)
    if before != current:
        total = tl.zeros([WIDTH], tl.float32)
        same = before != current
        while same:
            total += tl.load(pieces + piece * d + column, mask=inside, other=0.0)
            piece += 1
            same = tl.load(piece_feature + piece, mask=piece < number, other=-1) == current
        tl.store(out + current * d + column, total, mask=inside)


_last: list[tuple[Tensor, int, Tensor, Tensor]] = []
"""What `_sort` gave last, and for what: a step asks for the gradients of two weights with the same
codes. That tensor is kept, so nothing else can come to lie where it is."""


def weight_gradient(
    row_ptr: Tensor, index: Tensor, value: Tensor, rows: Tensor, d_sae: int
) -> Tensor:
    """For each feature the sum of value times its entry's row.

    In an order that only the codes decide if torch is asked for deterministic algorithms, or if the
    result has less precision than float32, which atomic additions would round to each time.
    """
    ordered = torch.are_deterministic_algorithms_enabled() or rows.dtype != torch.float32
    return sum_by_feature(row_ptr, index, value, rows, d_sae, atomic=not ordered)


def sum_by_feature(
    row_ptr: Tensor, index: Tensor, value: Tensor, rows: Tensor, d_sae: int, *, atomic: bool
) -> Tensor:
    """`weight_gradient` by atomic additions, or in a fixed order."""
    d = rows.shape[1]
    out = torch.zeros(d_sae, d, dtype=rows.dtype, device=rows.device)
    if len(index) == 0:
        return out
    feature, order = _sort(index)
    width = min(max(16, power_of_2(d)), _MOST_WIDTH)
    chunks, columns = blocks(len(index), _CHUNK), blocks(d, width)
    shape = (1, 1) if atomic else (2 * chunks, d)
    pieces = torch.empty(shape, dtype=torch.float32, device=rows.device)
    piece_feature = torch.empty(shape[0], dtype=torch.int64, device=rows.device)
    row = row_of_entry(row_ptr, len(index))[order]
    size = {"WIDTH": width, "num_warps": 2}
    launch(
        _sum_runs,
        (chunks, columns),
        rows,
        feature,
        row,
        value[order],
        rows.contiguous(),
        out,
        pieces,
        piece_feature,
        len(index),
        d,
        CHUNK=_CHUNK,
        ATOMIC=atomic,
        **size,
    )
    if not atomic:
        grid = (2 * chunks, columns)
        launch(_sum_pieces, grid, rows, pieces, piece_feature, out, 2 * chunks, d, **size)
    return out


def _sort(index: Tensor) -> tuple[Tensor, Tensor]:
    """Entries in the order of their features: (feature, entry), both int64 [entries]."""
    for known, version, feature, order in _last:
        alike = known.shape == index.shape and known.stride() == index.stride()
        if alike and known.data_ptr() == index.data_ptr() and version == index._version:
            return feature, order
    feature, order = torch.sort(index.to(torch.int32), stable=True)
    feature = feature.to(torch.int64)
    _last[:] = [(index.detach(), index._version, feature, order)]
    return feature, order
