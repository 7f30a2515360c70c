"""Gather rows by index into a batch, converted to its dtype in the same pass over memory.

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
    ("uint16", torch.uint16): "gather_uint16",
    ("int8", torch.int8): "gather_int8",
    ("uint16", torch.bfloat16): "gather_uint16",
    ("uint16", torch.float32): "gather_bfloat16_as_float32",
    ("int8", torch.float32): "gather_int8_as_float32",
    ("int8", torch.bfloat16): "gather_int8_as_bfloat16",
}
"""by what is stored and what is wanted"""


class Gatherer:
    """Gathers rows into one batch after another, in `threads` threads; with none, when it is asked.

    A context: where that is left in good order, all has been gathered; the threads end with it.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "activation-loader") if threads else None
        self._running: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=error is not None)

    def start(
        self, pieces: Sequence[tuple[Sequence[NDArray[Any]], Tensor]], index: NDArray[np.int64]
    ) -> list[Future[None]]:
        """Have `gather` put the rows at some indices into each piece: what is stored, and `out`.

        Returns what is to be waited for.
        """

        def run() -> None:
            for arrays, out in pieces:
                gather(arrays, index, out)

        if self._pool is None:
            run()
            return []
        self._running.append(self._pool.submit(run))
        return self._running[-1:]

    def wait(self) -> None:
        """Until nothing is gathered any more from the arrays given so far."""
        wait(self._running)
        self._running.clear()


def gather(arrays: Sequence[NDArray[Any]], index: NDArray[np.int64], out: Tensor) -> None:
    """Put the rows [n, width] at some indices of a site's arrays into out [indices, width].

    Args: arrays: those of `site_arrays`, or one array whose dtype is that of `out`.
    """
    assert out.shape == (len(index), *arrays[0].shape[1:]), "a row for each index"
    name = _NATIVE.get((arrays[0].dtype.name, out.dtype)) if out.ndim == 2 else None
    found = library() if name else None
    if name and found:
        scale = arrays[1].ctypes.data if len(arrays) == 2 else None
        assert all(each.flags.c_contiguous for each in (*arrays, index))
        assert out.is_contiguous()
        assert index.dtype == np.int64
        getattr(found, name)(
            arrays[0].ctypes.data, scale, index.ctypes.data, *out.shape, out.data_ptr()
        )
    elif len(arrays) == 1 and _is_as_stored(arrays[0], out.dtype):
        into = out.view(torch.uint16) if out.dtype == torch.bfloat16 else out
        # without clip it copies `out` first
        np.take(arrays[0], index, axis=0, out=into.numpy(), mode="clip")
    else:
        out.copy_(rows_in([torch.from_numpy(each[index]) for each in arrays], out.dtype))


def _is_as_stored(array: NDArray[Any], dtype: torch.dtype) -> bool:
    bits = array.dtype == np.uint16 and dtype == torch.bfloat16
    return bits or dtype == getattr(torch, array.dtype.name)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None, after one line on standard error that says why."""
    found = compiled.load(
        "gather", Path(__file__).parent, what="for batches", instead="numpy makes them"
    )
    if found is None:
        return None
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    for name in set(_NATIVE.values()):
        function = getattr(found, name)
        function.argtypes = (pointer, pointer, pointer, count, count, pointer)
        function.restype = None
    return found
