"""The `cpu` backend: C++ for float32 on the CPU. Shapes are those of `sae.kernels.backend`.

Whatever else comes (other dtypes, other devices) goes to the `torch` backend. No result depends on
the number of threads, except for what the matrix product's library makes of it. Among equal
pre-activations the one with the smallest index is kept; NaN counts as the largest. A value may
differ in its last bit with the rows that are encoded beside it, as in any matrix product.
"""

import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from sae.kernels import (
    cpp_library,
    gradient_buffers,
    matmul,
    operations,
    screen,
    torch_backend,
)
from saescope.errors import InputError

NAME = "cpu"
DENSE = 1 / 8
"""measured: there the sums of a training step cost what their dense products do"""
_CHUNK_ELEMENTS, _CHUNK_ROWS = 2**24, 1024
"""pre-activations held at a time, and rows beyond which a product gains nothing"""
_FEW = 8
"""entries a feature below which rows of W are read one by one, not dealt with tile by tile"""
_IN_CACHE = 2**21
"""elements of W that stay in the caches anyway"""
_SMALL = 2**18
"""multiplications, or pre-activations, that are not worth waking other threads for"""
_MOST_ENTRIES = 2**31 - 1
"""counters are 32 bits wide"""

_P = ParamSpec("_P")
_R = TypeVar("_R")


def usable() -> bool:
    """Whether the library is there."""
    return cpp_library.library() is not None


def _float32(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Leave to the torch backend what is not float32 on the CPU, and what it was chosen for."""
    name = function.__name__
    other = getattr(torch_backend, name)

    @functools.wraps(function)
    def chosen(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        mine = all(
            each.device.type == "cpu" and each.dtype in (torch.float32, torch.int64)
            for each in tensors
        )
        if not mine or max(each.shape[0] for each in tensors if each.ndim) > _MOST_ENTRIES:
            return other(*args, **kwargs)
        # autocast would turn products to bfloat16
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return (other if operations.by_torch(name) else function)(*args, **kwargs)

    return chosen


@_float32
def topk(
    x: Tensor, W: Tensor, b: Tensor | None, k: int, *, signed: bool = False
) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each row (in magnitude, if signed), by rising index."""
    width = len(W)
    if not 0 <= k <= width:
        raise InputError("k is out of range", where="k", given=k, allowed=f"0 to {width}")
    screened = screen.topk(x, W, b, k, signed=signed) if k else None
    if screened is not None:
        return screened
    index, value = torch.empty(len(x), k, dtype=torch.int64), torch.empty(len(x), k)
    if k == 0:
        return index, value
    groups = max(256, -(-4 * k // 16) * 16)
    groups = groups if 2 * groups <= width else 0  # too few columns a group to spare a pass
    threads = _threads(len(x) * width)
    work = torch.empty(threads, 2 * width + groups, dtype=torch.int64)
    b = None if b is None else _shaped("b", b, width)
    for start, pre in _chunks(x, W):
        block = slice(start, start + len(pre))
        _call(
            "top_of_rows",
            pre,
            b,
            len(pre),
            width,
            k,
            signed,
            groups,
            index[block],
            value[block],
            work,
            threads,
        )
    return index, value


@_float32
def above(
    x: Tensor, W: Tensor, b: Tensor | None, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Pre-activations above their feature's threshold, by chunks of rows."""
    screened = screen.above(x, W, b, threshold)
    if screened is not None:
        return screened
    width, threads = len(W), _threads(len(x) * len(W))
    threshold = _shaped("threshold", threshold, width)
    b = None if b is None else _shaped("b", b, width)
    row_ptr = torch.zeros(len(x) + 1, dtype=torch.int64)
    blocks: list[tuple[Tensor, Tensor]] = []
    for start, pre in _chunks(x, W):
        size = len(pre)
        counts, begins = torch.empty(size, dtype=torch.int64), torch.zeros_like(row_ptr[: size + 1])
        _call("count_above", pre, b, threshold, size, width, counts, threads)
        torch.cumsum(counts, 0, out=begins[1:])
        found = int(begins[-1])
        index, value = torch.empty(found, dtype=torch.int64), torch.empty(found)
        _call("fill_above", pre, b, threshold, size, width, begins, index, value, threads)
        row_ptr[start + 1 : start + size + 1] = row_ptr[start] + begins[1:]
        blocks.append((index, value))
    if len(blocks) == 1:
        return row_ptr, *blocks[0]
    none = [(torch.empty(0, dtype=torch.int64), torch.empty(0))]
    indices, values = zip(*(blocks or none), strict=True)
    return row_ptr, torch.cat(indices), torch.cat(values)


def _chunks(x: Tensor, W: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First row and x W^T of consecutive chunks of rows; a chunk's memory is used for the next."""
    rows = max(1, min(_CHUNK_ROWS, _CHUNK_ELEMENTS // max(1, len(W)), len(x)))
    buffer = torch.empty(rows, len(W))
    for start in range(0, len(x), rows):
        yield start, matmul.rows_by_features(x[start : start + rows], W, buffer)


@_float32
def decode(row_ptr: Tensor, index: Tensor, value: Tensor, W: Tensor) -> Tensor:
    """Sum of value W[index] over each row's entries."""
    (d_sae, d), batch = W.shape, len(row_ptr) - 1
    row_ptr, index, value = _codes(row_ptr, index, d_sae, value)
    W, out = W.contiguous(), torch.empty(batch, d)
    if len(index) < _FEW * d_sae or W.numel() <= _IN_CACHE:
        _call("decode", row_ptr, index, value, W, batch, d, out, _threads(len(index) * d))
    else:
        _segment_sum(_deal(row_ptr, index, value, d_sae, by_row=True), W, out)
    return out


@_float32
def entry_dots(row_ptr: Tensor, index: Tensor, rows: Tensor, W: Tensor) -> Tensor:
    """The dot product of an entry's row and its feature's row of W."""
    (d_sae, d), batch = W.shape, len(row_ptr) - 1
    row_ptr, index, _ = _codes(row_ptr, index, d_sae)
    rows, W, dots = _shaped("rows", rows, batch, d), W.contiguous(), torch.empty(len(index))
    _call("entry_dots", row_ptr, index, rows, W, batch, d, dots, _threads(len(index) * d))
    return dots


@_float32
def decode_error(
    row_ptr: Tensor, index: Tensor, value: Tensor, W: Tensor, b: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The reconstruction's error, its squared norms and its dots with the entries' rows of W."""
    (d_sae, d), batch = W.shape, len(row_ptr) - 1
    row_ptr, index, value = _codes(row_ptr, index, d_sae, value)
    b, target = _shaped("b", b, d), _shaped("target", target, batch, d)
    error, squared, dots = torch.empty(batch, d), torch.empty(batch), torch.empty(len(index))
    _call(
        "decode_error",
        row_ptr,
        index,
        value,
        W.contiguous(),
        b,
        target,
        batch,
        d,
        error,
        squared,
        dots,
        _threads(len(index) * d),
    )
    return error, squared, dots


@_float32
def weight_gradient(
    row_ptr: Tensor, index: Tensor, value: Tensor, rows: Tensor, d_sae: int
) -> Tensor:
    """For each feature the sum of value times its entry's row."""
    batch, d = len(row_ptr) - 1, rows.shape[1]
    row_ptr, index, value = _codes(row_ptr, index, d_sae, value)
    out = gradient_buffers.take(d_sae, d)
    dealt = _deal(row_ptr, index, value, d_sae, by_row=False)
    _segment_sum(dealt, _shaped("rows", rows, batch, d), out)
    return out


@_float32
def feature_sums(index: Tensor, value: Tensor, d_sae: int) -> Tensor:
    """For each feature the sum of its values."""
    row_ptr = torch.tensor([0, len(index)])
    _, index, value = _codes(row_ptr, index, d_sae, value)
    sums = torch.zeros(d_sae)
    _call("feature_sums", index, value, len(index), sums)
    return sums


def _deal(
    row_ptr: Tensor, index: Tensor, value: Tensor, d_sae: int, *, by_row: bool
) -> tuple[Tensor, Tensor]:
    """Entries in the order that `_segment_sum` takes them in, and where its segments start."""
    batch, threads = len(row_ptr) - 1, _threads(16 * len(index))
    segments, sources = (batch, d_sae) if by_row else (d_sae, batch)
    keys = max(1, -(-sources // _call("block"))) * segments
    start, counts = (torch.empty(n, dtype=torch.int32) for n in (keys + 1, threads * keys))
    entries = torch.empty(len(index), dtype=torch.int64)  # an int32 and a float32 each
    _call("deal", row_ptr, index, value, batch, d_sae, by_row, start, entries, counts, threads)
    return start, entries


def _segment_sum(dealt: tuple[Tensor, Tensor], rows: Tensor, out: Tensor) -> None:
    threads = _threads(len(dealt[1]) * rows.shape[1] + out.numel())
    tiles = torch.empty(threads * _call("tile"))
    _call("segment_sum", *dealt, rows, len(out), *rows.shape, tiles, out, threads)


def _threads(work: int) -> int:
    return 1 if work < _SMALL else torch.get_num_threads()


def _codes(
    row_ptr: Tensor, index: Tensor, d_sae: int, value: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The codes, contiguous; InputError where they would have C++ read or write elsewhere."""
    row_ptr, index = row_ptr.contiguous(), index.contiguous()
    batch, entries = len(row_ptr) - 1, len(index)
    value = index if value is None else _shaped("value", value, entries)
    wrong = _call("check_codes", row_ptr, index, batch, entries, d_sae) if batch >= 0 else 1
    if wrong == 1:
        allowed = f"rising, from 0 to {entries}, the number of entries"
        raise InputError("not codes", where="row_ptr", given=row_ptr.tolist()[:9], allowed=allowed)
    if wrong == 2:
        given = (int(index.min()), int(index.max()))
        raise InputError("no such feature", where="index", given=given, allowed=f"0 to {d_sae - 1}")
    return row_ptr, index, value


def _shaped(name: str, tensor: Tensor, *shape: int) -> Tensor:
    """The tensor, contiguous; InputError if it has another shape."""
    if tensor.shape != shape:
        raise InputError("wrong shape", where=name, given=tuple(tensor.shape), allowed=str(shape))
    return tensor.contiguous()


def _call(name: str, *given: Tensor | int | None) -> int:
    """saescope_NAME of the library, which takes pointers and 64-bit integers."""
    library = cpp_library.library()
    assert library is not None, "called without `usable`"
    function = getattr(library, f"saescope_{name}")
    function.restype = ctypes.c_int64
    return function(
        *(ctypes.c_int64(a) if isinstance(a, int) else cpp_library.pointer(a) for a in given)
    )
