"""Passes over a feature's activations in C++; without a compiler NumPy makes them.

Both give the same numbers. What is compiled runs without Python's lock.
"""

import ctypes
import functools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saescope import compiled

Ints = NDArray[np.integer]
_ARGUMENTS = {
    "count_together": "pnppp",
    "rows_in_marked": "pnnpp",
    "count_bins": "pnnpp",
    "mark_documents": "pnpnp",
}
"""of each function: p a pointer, n an integer"""


def count_together(position: Ints, start: Ints, other: Ints, counts: NDArray[np.int64]) -> None:
    """Add to counts [features] at how many positions [n], in order, each feature is active.

    Args: other: the features of all positions in turn, those of position p from start[p] on.
    """
    if found := library():
        found.count_together(*_head(position), _at(start), _at(other, np.int32), _at(counts))
        return
    begins = start[position]
    lengths = start[position + 1] - begins
    ends = np.cumsum(lengths)
    if len(ends):
        index = np.repeat(begins - (ends - lengths), lengths)
        index += np.arange(ends[-1])
        counts += np.bincount(np.take(other, index), minlength=len(counts))


def rows_in_marked(position: Ints, context: int, marked: NDArray[np.int32]) -> NDArray[np.int64]:
    """The rows of positions [n] in marked sequences (marked[sequence] >= 0), in order."""
    if found := library():
        rows = np.empty(len(position), np.int64)
        count = found.rows_in_marked(*_head(position), context, _at(marked, np.int32), _at(rows))
        return rows[:count].copy()
    return np.flatnonzero(marked[position // context] >= 0)


def count_bins(
    position: Ints, context: int, bin_of: NDArray[np.int64], bins: int
) -> NDArray[np.int64]:
    """How many positions [n] lie in each bin, by the bin of each index in a sequence [context]."""
    if found := library():
        counts = np.zeros(bins, np.int64)
        found.count_bins(*_head(position), context, _at(bin_of), _at(counts))
        return counts
    return np.bincount(bin_of[position % context], minlength=bins).astype(np.int64)


def mark_documents(position: Ints, document: Ints, lowest: int, seen: NDArray[np.bool_]) -> None:
    """Set seen[document - lowest] for the document of each of the positions [n]."""
    if found := library():
        found.mark_documents(*_head(position), _at(document, np.int32), lowest, _at(seen, np.bool_))
    else:
        seen[document[position] - lowest] = True


def _head(position: Ints) -> tuple[int, int]:
    return _at(position), len(position)


def _at(array: np.ndarray, dtype: type = np.int64) -> int:
    assert array.dtype == dtype
    assert array.flags.c_contiguous
    return array.ctypes.data


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None, after one line on standard error that says why."""
    found = compiled.load(
        "counting", Path(__file__).parent, what="for counting", instead="NumPy counts, more slowly"
    )
    if found is None:
        return None
    kinds = {"p": ctypes.c_void_p, "n": ctypes.c_int64}
    for name, arguments in _ARGUMENTS.items():
        function = getattr(found, name)
        function.argtypes = tuple(kinds[each] for each in arguments)
        function.restype = ctypes.c_int64 if name == "rows_in_marked" else None
    return found
