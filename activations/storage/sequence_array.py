"""The arrays [sequence, position] of a store, as numpy arrays that are read when indexed."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_KEPT_BYTES = 512 << 20


class SequenceArray:
    """An array [sequence, position] of a store's committed sequences, read when indexed.

    Index it as numpy: a number, a slice, numbers, or a mask over sequences; `np.asarray` reads all.
    """

    def __init__(
        self,
        read: Callable[[int], NDArray[Any]],
        first_sequences: Sequence[int],
        shape: tuple[int, int],
        dtype: str,
        *,
        keep: bool,
    ) -> None:
        """Args: read gives a window's sequences by its number; first_sequences are the numbers of
        each window's first; keep: what was read is kept in memory, up to 512 MiB.
        """
        self._read_window = read
        self._kept: dict[int, NDArray[Any]] = {}
        self._room = _KEPT_BYTES if keep else 0
        self._first = np.array(first_sequences, np.int64)
        self.shape = shape
        self.dtype = np.dtype(dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | slice | Sequence[int] | NDArray) -> NDArray[Any]:
        wanted = np.arange(len(self))[key]
        found = self._read(wanted.reshape(-1))
        return found[0] if wanted.ndim == 0 else found

    def _read(self, wanted: NDArray[np.int64]) -> NDArray[Any]:
        """Sequences by number; each window is read once."""
        found = np.empty((len(wanted), self.shape[1]), self.dtype)
        window = np.searchsorted(self._first, wanted, side="right") - 1
        order = np.argsort(window, kind="stable")
        borders = np.flatnonzero(np.diff(window[order]))
        for index in np.split(order, borders + 1) if len(order) else []:
            number = int(window[index[0]])
            part = self._window(number)
            found[index] = part[wanted[index] - self._first[number]]
        return found

    def _window(self, number: int) -> NDArray[Any]:
        part = self._kept.pop(number, None)
        if part is None:
            part = self._read_window(number)
            self._room -= part.nbytes
            while self._room < 0 and self._kept:
                self._room += self._kept.pop(next(iter(self._kept))).nbytes
        if self._room >= 0:
            self._kept[number] = part  # the last one that was asked for is the last to go
        else:
            self._room += part.nbytes
        return part

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        del copy
        return np.asarray(self[:], dtype=dtype)
