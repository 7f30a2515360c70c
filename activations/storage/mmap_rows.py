"""Memory-mapped rows: the chunk files of an array, mapped one behind the other.

Nothing is copied, so a batch is made of rows by one copy, and what has been read once is there for
good. An array that would take more than half of the machine's memory is let go of slice by slice.
"""

import ctypes
import errno
import functools
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from activations.storage.chunk_files import cut_short, unreadable
from saescope.memory import physical_memory
from saescope.paths import AnyPath


class MappedRows:
    """Rows [chunks * chunk_rows, ...] of chunk files; those that `show` has been called for.

    Args:
        chunks: how many there may be; what is not mapped takes no memory.
        tail: shape of an entry.
        path_of: a chunk's file.

    >>> rows = MappedRows("site", 2, 16384, (768,), "uint16", path_of)  # doctest: +SKIP
    >>> at = rows.show([(1, 0, 512)])  # doctest: +SKIP
    >>> rows.array[at[0] : at[0] + 512]  # doctest: +SKIP
    """

    def __init__(
        self,
        name: str,
        chunks: int,
        chunk_rows: int,
        tail: tuple[int, ...],
        dtype: Any,
        path_of: Callable[[int], AnyPath],
    ) -> None:
        self._name, self._chunk_rows, self._path_of = name, chunk_rows, path_of
        self._row = int(np.prod(tail, dtype=np.int64)) * np.dtype(dtype).itemsize
        self._chunk_bytes = chunk_rows * self._row
        # not to be written to, so that it takes no memory however long it is
        region = mmap.mmap(
            -1,
            max(1, chunks * self._chunk_bytes),
            prot=mmap.PROT_READ,
            flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
        )
        entries = chunks * chunk_rows * int(np.prod(tail, dtype=np.int64))
        self.array = np.frombuffer(region, dtype, entries).reshape(chunks * chunk_rows, *tail)
        self._stays = chunks * self._chunk_bytes <= physical_memory() // 2
        self._files: dict[int, int] = {}
        """which file a mapped chunk is, by its inode"""

    def show(self, slices: Sequence[tuple[int, int, int]]) -> list[int]:
        """Have some rows in memory; where the first of each slice is in `array`. Not checked.

        Args: slices: a chunk, its first row, and how many.

        Raises DamagedError if they are not there.
        """
        wanted: dict[int, list[tuple[int, int]]] = {}
        for chunk, first, count in slices:
            wanted.setdefault(chunk, []).append((first, count))
        for chunk, ranges in wanted.items():
            path, what = self._path_of(chunk), f"chunk {chunk} of {self._name}"
            assert isinstance(path, Path), "only files are mapped"
            try:
                if chunk not in self._files:
                    self._map(chunk, path, what)
                elif not self._whole(chunk, path):  # touching what was cut off kills the process
                    raise cut_short(what, path)
                for first, count in () if self._stays else ranges:
                    _bring(self._address(chunk, first), count * self._row)
            except OSError as error:
                raise unreadable(what, path, error) from error
        return [chunk * self._chunk_rows + first for chunk, first, _ in slices]

    def forget(self, chunk: int, first: int, count: int) -> None:
        """Let go of the memory of some rows, which come back if they are looked at."""
        if not self._stays:
            _advise(self._address(chunk, first), count * self._row, mmap.MADV_DONTNEED)

    def _address(self, chunk: int, first: int) -> int:
        return self.array.ctypes.data + chunk * self._chunk_bytes + first * self._row

    def _whole(self, chunk: int, path: Path) -> bool:
        """Whether a mapped file is; one that was taken away since is still there for us."""
        try:
            found = path.stat()
        except FileNotFoundError:
            return True
        return found.st_ino != self._files[chunk] or found.st_size >= self._chunk_bytes

    def _map(self, chunk: int, path: Path, what: str) -> None:
        with path.open("rb", buffering=0) as stream:
            found = os.fstat(stream.fileno())
            if found.st_size < self._chunk_bytes:
                raise cut_short(what, path)
            flags = mmap.MAP_SHARED | _MAP_FIXED | (mmap.MAP_POPULATE if self._stays else 0)
            at = self._address(chunk, 0)
            got = _libc().mmap(at, self._chunk_bytes, mmap.PROT_READ, flags, stream.fileno(), 0)
            if got != at:
                raise _error()
        self._files[chunk] = found.st_ino


def mappable(path: AnyPath, nbytes: int) -> bool:
    """Whether files like this one, of so many bytes, can be mapped one behind the other."""
    if sys.platform != "linux" or not isinstance(path, Path) or nbytes % mmap.PAGESIZE:
        return False
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 1, prot=mmap.PROT_READ):
            return True
    except (OSError, ValueError):  # a file system that cannot, or a file that is not there
        return False


_MAP_FIXED, _MADV_POPULATE_READ = 0x10, 22
"""of Linux; Python's module does not have them"""


def _bring(address: int, nbytes: int) -> None:
    """Read pages from the disk that are not in memory; OSError if they cannot be."""
    if _advise(address, nbytes, _MADV_POPULATE_READ):
        return
    if ctypes.get_errno() != errno.EINVAL:
        raise _error()
    # a kernel before 5.14 does not know that: look at each page
    pages = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
    pages[:: mmap.PAGESIZE].max(initial=0)


def _advise(address: int, nbytes: int, advice: int) -> bool:
    first = address // mmap.PAGESIZE * mmap.PAGESIZE
    return _libc().madvise(first, address + nbytes - first, advice) == 0


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


@functools.cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t),
        *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64),
    ]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library
