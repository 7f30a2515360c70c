"""The order of an epoch: groups of chunk slices whose rows are shuffled together.

Rows of a window are dealt over its chunks, so any slice of a chunk is a fair sample of its window.
How near batches are to independent draws depends on how many windows a group has slices of:

    spread    (default) groups of 32 times `mix_chunks` slices, each from another stretch of the
              split; a chunk is checked whole before the first of its slices is read
    chunks    as many rows a group, in whole chunks drawn at random; every chunk read is checked
    windows   windows in a random order, each one's chunks one after another: a window that has to
              be computed is computed once an epoch
"""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from activations.storage.mmap_rows import MappedRows
from activations.storage.reader import ActivationStore
from activations.storage.row_formats import RowArray
from saescope.errors import InputError

Order = Literal["spread", "chunks", "windows"]
_SLICES = 32
"""of a chunk, where it is spread over groups: 512 rows, which disks still read in one go"""
_GROUPS = 2
"""in memory: the one that batches are made of, and the next"""
_GOLDEN = (5**0.5 - 1) / 2


class ChunkSlice(NamedTuple):
    """Some rows of a chunk, one after another."""

    chunk: int
    start: int
    rows: int


class ReadingOrder:
    """The groups of each epoch; they depend on the store's windows, the seed and the settings.

    Raises InputError for an order that there is not, or that the store cannot be read in.
    """

    def __init__(
        self, store: ActivationStore, split: str, order: Order | None, *, mix_chunks: int, seed: int
    ) -> None:
        self.order = _checked(store, order)
        self._seed = seed
        chunks = store.chunks(split)
        chunk_rows = int(store.manifest["chunk_rows"])
        slices = _SLICES if self.order == "spread" else 1
        size = -(-chunk_rows // slices)
        cut = [
            [(c.index, at, min(size, c.rows - at)) for at in range(0, c.rows, size)] for c in chunks
        ]
        self._slices = np.array([piece for each in cut for piece in each], np.int64).reshape(-1, 3)
        self.slice_rows = size
        """rows of a slice, but for the last of a chunk that is not full"""
        self._group = mix_chunks * slices
        if self.order == "spread" and 0 < len(chunks) < self._group:
            self._group -= self._group % len(chunks)  # as many of each chunk
        self.longest = min(mix_chunks, len(chunks)) * slices * size
        """rows that a group has at most, each of its slices taken as whole"""
        counts = np.array([len(each) for each in cut], np.int64)
        self._table = _numbered(counts)
        lengths = [len(w.chunks(chunk_rows)) for w in store.windows if w.split == split]
        self.window_chunks = max(lengths, default=0)
        """chunks of the window that has most"""
        self._windows = _numbered(np.array(lengths, np.int64))

    def groups(self, epoch: int) -> Iterator[list[ChunkSlice]]:
        """The groups of an epoch, each slice of the split in one of them."""
        random = np.random.default_rng((self._seed, epoch))
        if self.order == "chunks":
            order = random.permutation(len(self._slices))
        elif self.order == "windows":
            order = _present(random.permutation(self._windows))
        else:
            order = self._spread(random)
        for start in range(0, len(order), self._group):
            yield [
                ChunkSlice(*map(int, self._slices[n])) for n in order[start : start + self._group]
            ]

    def _spread(self, random: np.random.Generator) -> NDArray[np.int64]:
        """Slice numbers, so that any that follow each other are from evenly all over the split.

        Each chunk's slices are as far from each other as can be, and where in their round a chunk's
        turn is goes by the golden ratio: chunks whose turns are close are then evenly spaced.
        """
        table = random.permuted(self._table, axis=1)
        turn = (random.random() + _GOLDEN * np.arange(len(table))) % 1
        when = np.arange(table.shape[1]) + turn[:, None]
        return _present(table.reshape(-1)[when.reshape(-1).argsort(kind="stable")])


class SliceReader:
    """Reads slices of chunks; each chunk is checked whole the first time."""

    def __init__(self, store: ActivationStore, slice_rows: int) -> None:
        self._store, self._slice_rows = store, slice_rows
        self._checked: set[tuple[str, int]] = set()
        self._mapped: dict[str, MappedRows] = {}
        self._shown: deque[list[ChunkSlice]] = deque()

    def room(self, arrays: Mapping[str, RowArray], rows: int, whole: bool) -> dict[str, NDArray]:
        """Space for `read`, for so many rows of each array; or all rows, where they are mapped."""
        if not whole and self._map(arrays):
            return {name: self._mapped[name].array for name in arrays}
        return {name: np.empty((rows, *each.tail), each.dtype) for name, each in arrays.items()}

    def read(
        self, group: list[ChunkSlice], whole: bool, space: Mapping[str, NDArray[Any]]
    ) -> NDArray[np.int64]:
        """Put the rows of slices into each array of `space`, a slice every `slice_rows`.

        Returns where each of their rows is. Rows that are mapped are only looked for.

        Args: whole: whether slices are whole chunks, that are read and checked each time.

        Raises DamagedError if a chunk is missing, damaged, or not the one that was committed.
        """
        for name in () if whole else space:
            for chunk in dict.fromkeys(piece.chunk for piece in group):
                self._check(name, chunk)
        starts = [number * self._slice_rows for number in range(len(group))]
        if not all(array.flags.writeable for array in space.values()):
            for name in space:
                starts = self._mapped[name].show(group)
            self._forget(group)
        else:
            for piece, first in zip(group, starts, strict=True):
                for name, array in space.items():
                    if whole:
                        out = array[first : first + self._slice_rows]
                        self._store.read_rows(name, piece.chunk, out)
                    else:
                        out = array[first : first + piece.rows]
                        self._store.read_slice(name, piece.chunk, piece.start, out)
        return np.concatenate(
            [
                np.arange(first, first + piece.rows)
                for piece, first in zip(group, starts, strict=True)
            ]
        )

    def _map(self, arrays: Mapping[str, RowArray]) -> bool:
        if not self._mapped:
            found = {name: self._store.map_rows(name) for name in arrays}
            self._mapped = {name: each for name, each in found.items() if each is not None}
        return self._mapped.keys() == arrays.keys()

    def _check(self, name: str, chunk: int) -> None:
        if (name, chunk) not in self._checked:
            self._store.check_rows(name, chunk)
            self._checked.add((name, chunk))

    def _forget(self, group: list[ChunkSlice]) -> None:
        """Let go of what was shown before the last group, and take note of this one."""
        self._shown.append(group)
        if len(self._shown) > _GROUPS:
            for piece in self._shown.popleft():
                for rows in self._mapped.values():
                    rows.forget(*piece)


def _numbered(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Running numbers, so many a row; -1 where a row has fewer than another."""
    inside = np.arange(counts.max(initial=0)) < counts[:, None]
    found = np.full(inside.shape, -1, np.int64)
    found[inside] = np.arange(counts.sum())
    return found


def _present(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those that are there, row by row."""
    flat = numbers.reshape(-1)
    return flat[flat >= 0]


def _checked(store: ActivationStore, order: Order | None) -> Order:
    computed = store.storage == "none"
    allowed: tuple[Order, ...] = ("windows",) if computed else get_args(Order)
    if order is not None and order not in allowed:
        why = "activations are computed by windows here" if computed else "no such order"
        raise InputError(why, where="order", given=order, allowed=allowed)
    return order or allowed[0]
