"""Chunks of Zarr arrays as files: values and a trailing crc32c, read and written directly.

Four times as fast as through Zarr, and a chunk that is not there, or that is another one, is found:
Zarr would read the first as fill values, and no checksum inside a file can tell the second.
"""

import os
from collections.abc import Iterable
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any, cast

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from saescope.artefact import DamagedError, write_bytes
from saescope.paths import AnyPath, read_bytes

_PIECE = 256 << 10
"""Bytes read at once: their checksum is taken while they are in the processor's cache."""


def crc32c(values: NDArray[Any] | bytes) -> int:
    """Checksum of an array's bytes, little-endian, or of bytes."""
    if isinstance(values, bytes):
        return int(google_crc32c.value(values))
    return int(google_crc32c.value(cast(bytes, _flat_bytes(values))))


def _flat_bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    ordered = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return ordered.reshape(-1).view(np.uint8)


def chunk_path(group: AnyPath, array: str, chunk: int, ndim: int) -> AnyPath:
    """Where a chunk of whole rows of an array with `ndim` dimensions is."""
    return group.joinpath(array, "c", str(chunk), *["0"] * (ndim - 1))


def write_chunk(path: AnyPath, values: NDArray[Any], *, replaces: bool = False) -> int:
    """Write a chunk and return its crc32c.

    One that replaces another does so at once, flushed to the disk; a new one is for the caller to
    flush before it commits it.
    """
    data = _flat_bytes(values)
    crc = crc32c(data)
    if replaces or not isinstance(path, Path):
        write_bytes(path, data.tobytes() + crc.to_bytes(4, "little"))
        return crc
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb", buffering=0) as stream:
        for part in (memoryview(cast(bytes, data)), memoryview(crc.to_bytes(4, "little"))):
            left = part
            while left:  # a write may be cut short, by a full disk for one
                left = left[os.write(stream.fileno(), left) :]
    return crc


def read_chunk(
    path: AnyPath,
    what: str,
    dtype: Any,
    shape: tuple[int, ...],
    crc: int | None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """A chunk's values, its checksum verified, and that it is the one that was committed.

    `crc` is the checksum that was committed; None where it is not known. They are read into `out`
    if it is given: contiguous, of this shape and dtype. Raises DamagedError.
    """
    values = np.empty(shape, np.dtype(dtype).newbyteorder("<")) if out is None else out
    data = values.reshape(-1).view(np.uint8)
    pieces = (data[at : at + _PIECE] for at in range(0, len(data), _PIECE))
    _read_checked(path, what, pieces, len(data), crc)
    return values


def check_chunk(path: AnyPath, what: str, nbytes: int, crc: int | None) -> None:
    """Read a chunk of so many bytes as `read_chunk` does, but keep none of it. Raises DamagedError.

    Half as much memory is written to, in half the time.
    """
    space = np.empty(_PIECE, np.uint8)
    pieces = (space[: min(_PIECE, nbytes - at)] for at in range(0, nbytes, _PIECE))
    _read_checked(path, what, pieces, nbytes, crc)


def _read_checked(
    path: AnyPath, what: str, pieces: Iterable[NDArray[np.uint8]], nbytes: int, crc: int | None
) -> None:
    """Fill one piece after another from a chunk that should have so many bytes of values."""
    found = 0
    try:
        with _opened(path) as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            for piece in pieces:
                _fill(stream, piece)
                found = int(google_crc32c.extend(found, cast(bytes, piece)))
            last = stream.read(4)
    except OSError as error:
        raise unreadable(what, path, error) from error
    expected = nbytes + 4
    if size != expected:
        kind = "truncated" if size < expected else "damaged"
        raise DamagedError(
            f"{what} is damaged: it has {size:,} bytes and should have {expected:,}",
            where=str(path),
            kind=kind,
        )
    if found != int.from_bytes(last, "little"):
        raise DamagedError(f"{what} is damaged: its checksum does not match", where=str(path))
    if crc is not None and found != crc:
        raise not_the_one(what, path)


def _opened(path: AnyPath) -> FileIO | BytesIO:
    """A file, or the whole content of an object."""
    return path.open("rb", buffering=0) if isinstance(path, Path) else BytesIO(read_bytes(path))


def read_slice(path: AnyPath, what: str, first: int, out: NDArray[Any]) -> None:
    """Put consecutive entries of a chunk from number `first` on into `out`, unchecked.

    Raises DamagedError if they are not there.
    """
    data = out.reshape(-1).view(np.uint8)
    start = first * (out.nbytes // len(out))
    try:
        if isinstance(path, Path):
            with path.open("rb", buffering=0) as stream:
                stream.seek(start)
                missing = _fill(stream, data)
        else:
            content = read_bytes(path, start, start + len(data))
            if not (missing := len(data) - len(content)):
                data[:] = np.frombuffer(content, np.uint8)
    except OSError as error:
        raise unreadable(what, path, error) from error
    if missing:
        raise cut_short(what, path)


def cut_short(what: str, path: AnyPath) -> DamagedError:
    """The error of a file that ends before it should."""
    return DamagedError(f"{what} is damaged: cut short", where=str(path), kind="truncated")


def unreadable(what: str, path: AnyPath, error: OSError) -> DamagedError:
    """The error of a file that the system does not give."""
    if isinstance(error, FileNotFoundError):
        return DamagedError(f"{what} is missing", where=str(path), kind="missing")
    reason = error.strerror or str(error)
    return DamagedError(f"{what} is unreadable: {reason}", where=str(path), kind="unreadable")


def _fill(stream: FileIO | BytesIO, data: NDArray[np.uint8]) -> int:
    """Read until all of it is there, or the file ends; how many bytes are missing."""
    left = memoryview(cast(bytes, data))
    while left and (count := stream.readinto(left)):
        left = left[count:]
    return len(left)


def not_the_one(what: str, path: AnyPath) -> DamagedError:
    """The error of a file that is whole, but in the place of another."""
    message = f"{what} is damaged: it is whole, but not the one that was committed here"
    return DamagedError(message, where=str(path), kind="swapped")
