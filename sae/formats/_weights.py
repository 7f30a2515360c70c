"""Tensors of a foreign file, taken one by one: each checked before it is read, none left over.

A file is not believed: shapes and dtypes are read first, data only once its shape is the expected
one and the file is large enough to hold it, and nothing in it is ever executed.
"""

import lzma
import math
import pickle
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saescope.errors import ArtefactError, InputError
from saescope.system import check_readable

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_LARGEST_RATIO = 20
"""of what a compressed archive may unpack to; weights hardly compress"""
_SLACK = 1 << 24
_LARGEST_HEADER = 4096
_LARGEST_PICKLE = 1 << 24


@dataclass(frozen=True)
class Entry:
    """A tensor that is not read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """None for one that is not of numbers as saescope knows them"""
    read: Callable[[], Tensor]


class Weights:
    """The tensors of a file, as float32."""

    def __init__(self, entries: Mapping[str, Entry], where: str) -> None:
        self.left = dict(entries)
        self.where = where

    @classmethod
    def safetensors(cls, path: Path) -> "Weights":
        """Of a safetensors file; ArtefactError if it is missing or damaged."""
        check_readable(path)
        try:
            stored = safe_open(path, framework="pt")
            entries = {}
            for name in stored.keys():  # noqa: SIM118 (it has no other way)
                found = stored.get_slice(name)
                dtype = _SAFETENSORS.get(found.get_dtype())
                read = _reader(stored.get_tensor, name)
                entries[name] = Entry(tuple(found.get_shape()), dtype, read)
        except FileNotFoundError:
            raise ArtefactError("weights are missing", where=str(path)) from None
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(error, path) from error
        return cls(entries, str(path))

    @classmethod
    def npz(cls, path: Path) -> "Weights":
        """Of a NumPy archive; ArtefactError if it is missing or damaged."""
        check_readable(path)
        try:
            archive = zipfile.ZipFile(path)
            total = sum(member.file_size for member in archive.infolist())
            if total > _LARGEST_RATIO * path.stat().st_size + _SLACK:
                raise ArtefactError(
                    "damaged weights: unpacks to far more than weights would",
                    where=str(path),
                    given=f"{path.stat().st_size:,} bytes for {total:,}",
                )
            entries = dict(_npy_entry(archive, member, path) for member in archive.infolist())
        except FileNotFoundError:
            raise ArtefactError("weights are missing", where=str(path)) from None
        except _BROKEN as error:
            raise _damaged(error, path) from error
        return cls(entries, str(path))

    @classmethod
    def state_dict(cls, path: Path) -> "Weights":
        """Of a state dict that torch.save wrote; ArtefactError if it is missing, or more.

        It is mapped, not copied, so that no tensor is larger than the file is.
        """
        check_readable(path)
        try:
            _check_pickle(path)
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except FileNotFoundError:
            raise ArtefactError("weights are missing", where=str(path)) from None
        except (pickle.UnpicklingError, AttributeError, *_BROKEN) as error:
            raise _damaged(error, path, ", or more than weights") from error
        if not isinstance(state, dict) or not all(map(_is_plain, state.values())):
            raise ArtefactError("is not a state dict of tensors", where=str(path))
        size = path.stat().st_size
        entries = {}
        for name, value in state.items():
            if value.numel() * value.element_size() > size:
                raise ArtefactError(
                    f"damaged weights: {name} is larger than the file",
                    where=str(path),
                    given=tuple(value.shape),
                )
            dtype = value.dtype if value.dtype in FLOATS + INTEGERS else None
            entries[str(name)] = Entry(tuple(value.shape), dtype, _reader(state.get, name))
        return cls(entries, str(path))

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def rename(self, names: Mapping[str, str]) -> None:
        """Call tensors otherwise; ArtefactError if two have one name then."""
        for old, new in names.items():
            if new in self.left:
                raise ArtefactError(f"has both {old} and {new}", where=self.where)
            self.left[new] = self.left.pop(old)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; ArtefactError if it is not there."""
        if name not in self.left:
            names = sorted(self.left)
            more = [f"and {len(names) - 20:,} more"] if len(names) > 20 else []
            raise ArtefactError(f"{name} is missing", where=self.where, allowed=names[:20] + more)
        return self.left[name].shape

    def matrix(self, name: str) -> tuple[int, int]:
        """The shape of a matrix; ArtefactError if it is not there, or none, or empty."""
        found = self.shape(name)
        if len(found) != 2 or 0 in found:
            raise ArtefactError(
                f"{name} has the wrong shape", where=self.where, given=found, allowed="[n, m]"
            )
        return found[0], found[1]

    def vector(self, name: str) -> int:
        """The length of a vector; ArtefactError if it is not there, or none, or empty."""
        found = self.shape(name)
        if len(found) != 1 or 0 in found:
            raise ArtefactError(
                f"{name} has the wrong shape", where=self.where, given=found, allowed="[n]"
            )
        return found[0]

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of a known shape.

        Raises ArtefactError if it is not there, of another shape, no floating-point numbers, or
        not finite.
        """
        value = self._read(name, shape, FLOATS)
        if not torch.isfinite(value).all():
            raise ArtefactError(f"{name} is not finite everywhere", where=self.where)
        found = value.detach().to(torch.float32)
        if not torch.isfinite(found).all():
            raise ArtefactError(f"{name} has numbers beyond float32's", where=self.where)
        return found

    def take_count(self, name: str) -> int:
        """A whole number above 0, kept as a tensor of one; ArtefactError for any other."""
        value = self._read(name, (), (*INTEGERS, *FLOATS)).item()
        if not math.isfinite(value) or value != int(value) or value < 1:
            raise ArtefactError(f"{name} is no whole number above 0", where=self.where, given=value)
        return int(value)

    def drop(self, name: str) -> None:
        """Leave out a tensor that does not change the SAE's function, if it is there."""
        self.left.pop(name, None)

    def _read(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
        found = self.shape(name)
        if found != shape:
            turned = len(shape) == 2 and found == shape[::-1]
            raise ArtefactError(
                f"{name} is transposed" if turned else f"{name} has the wrong shape",
                where=self.where,
                given=found,
                allowed=str(shape),
            )
        entry = self.left.pop(name)
        if entry.dtype not in dtypes:
            raise ArtefactError(
                f"{name} is of the wrong dtype",
                where=self.where,
                given=str(entry.dtype),
                allowed=[str(dtype).removeprefix("torch.") for dtype in dtypes],
            )
        try:
            return entry.read()
        except (SafetensorError, *_BROKEN) as error:
            raise _damaged(error, self.where) from error

    def finish(self) -> None:
        """InputError if tensors are left whose meaning is not known."""
        if self.left:
            raise InputError(
                "tensors that this reader does not know, so the SAE would be another",
                where=self.where,
                given=sorted(self.left)[:20],
            )


_BROKEN = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    RuntimeError,  # also of recursion
    MemoryError,
    SyntaxError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    lzma.LZMAError,
)
"""what the readers of archives raise for damaged ones"""
_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def _reader(get: Callable[[str], Any], name: str) -> Callable[[], Tensor]:
    return lambda: get(name)


def _damaged(error: Exception, path: Path | str, more: str = "") -> ArtefactError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ArtefactError(f"damaged weights{more}: {lines[0][:300]}", where=str(path))


def _npy_entry(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> tuple[str, Entry]:
    """The name of an archive's array and what it is; its data is left where it is."""
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise ValueError(f"{member.filename} is of an unknown version, {version}")
        shape, _, dtype = read_header(stream, max_header_size=_LARGEST_HEADER)
        start = stream.tell()
    size = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or start + size != member.file_size:
        raise ArtefactError(
            f"damaged weights: {member.filename} is not an array of its own shape",
            where=str(path),
            given=f"{shape} of {dtype}, {member.file_size:,} bytes",
        )

    def read() -> Tensor:
        with archive.open(member) as stream:
            array = np.lib.format.read_array(
                stream, allow_pickle=False, max_header_size=_LARGEST_HEADER
            )
        return torch.from_numpy(np.ascontiguousarray(array.astype(dtype.newbyteorder("="))))

    known = dtype.kind in "fiu" and dtype.name in _NUMPY
    name = member.filename.removesuffix(".npy")
    return name, Entry(tuple(shape), _NUMPY[dtype.name] if known else None, read)


_NUMPY = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (*FLOATS, *INTEGERS)
    if dtype is not torch.bfloat16
}


def _check_pickle(path: Path) -> None:
    """ValueError unless a file is laid out as torch.save does: stored members, a small pickle."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename[:100]} is compressed, as torch never does")
            if member.filename.endswith("data.pkl") and member.file_size > _LARGEST_PICKLE:
                raise ValueError("its table of tensors is far larger than weights need")


def _is_plain(value: object) -> bool:
    if not isinstance(value, Tensor):
        return False
    return value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
