"""Rows by their places, as they are stored or in the dtype of batches: one pass over memory.

In C++ each row is read once and written past the caches; without a compiler torch and numpy do it
in two passes. The numbers are the same.
"""

import ctypes
import functools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activations.storage.row_formats import rows_in
from saescope import compiled

_NATIVE = {
    ("uint16", torch.uint16): "take_uint16",
    ("int8", torch.int8): "take_int8",
    ("uint16", torch.bfloat16): "take_uint16",
    ("uint16", torch.float32): "take_bfloat16_as_float32",
    ("int8", torch.float32): "take_int8_as_float32",
    ("int8", torch.bfloat16): "take_int8_as_bfloat16",
}
"""by what is stored and what is wanted"""


class Taker:
    """Takes rows into one batch after another, in `threads` threads; with none, when it is asked.

    A context: where that is left in good order, all has been taken; the threads end with it.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "activation-loader") if threads else None
        self._begun: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=error is not None)

    def begin(
        self, pieces: Sequence[tuple[Sequence[NDArray[Any]], Tensor]], places: NDArray[np.int64]
    ) -> list[Future[None]]:
        """Have `take` put the rows at some places into each piece: what is stored, and `out`.

        Returns what is to be waited for.
        """

        def taken() -> None:
            for arrays, out in pieces:
                take(arrays, places, out)

        if self._pool is None:
            taken()
            return []
        self._begun.append(self._pool.submit(taken))
        return self._begun[-1:]

    def wait(self) -> None:
        """Until nothing is taken any more from the arrays given so far."""
        wait(self._begun)
        self._begun.clear()


def take(arrays: Sequence[NDArray[Any]], places: NDArray[np.int64], out: Tensor) -> None:
    """Put the rows [n, width] at some places of a site's arrays into out [places, width].

    Args: arrays: those of `site_arrays`, or one array whose dtype is that of `out`.
    """
    assert out.shape == (len(places), *arrays[0].shape[1:]), "a row a place"
    name = _NATIVE.get((arrays[0].dtype.name, out.dtype)) if out.ndim == 2 else None
    found = library() if name else None
    if name and found:
        scale = arrays[1].ctypes.data if len(arrays) == 2 else None
        assert all(each.flags.c_contiguous for each in (*arrays, places))
        assert out.is_contiguous()
        assert places.dtype == np.int64
        getattr(found, name)(
            arrays[0].ctypes.data, scale, places.ctypes.data, *out.shape, out.data_ptr()
        )
    elif len(arrays) == 1 and _is_as_stored(arrays[0], out.dtype):
        into = out.view(torch.uint16) if out.dtype == torch.bfloat16 else out
        # without clip it copies `out` first
        np.take(arrays[0], places, axis=0, out=into.numpy(), mode="clip")
    else:
        out.copy_(rows_in([torch.from_numpy(each[places]) for each in arrays], out.dtype))


def _is_as_stored(array: NDArray[Any], dtype: torch.dtype) -> bool:
    bits = array.dtype == np.uint16 and dtype == torch.bfloat16
    return bits or dtype == getattr(torch, array.dtype.name)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None, after one line on standard error that says why."""
    found = compiled.load(_built, "for batches", "numpy makes them")
    if found is None:
        return None
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    for name in set(_NATIVE.values()):
        function = getattr(found, name)
        function.argtypes = (pointer, pointer, pointer, count, count, pointer)
        function.restype = None
    return found


def _built() -> Path:
    return compiled.build("gather", Path(__file__).parent)
