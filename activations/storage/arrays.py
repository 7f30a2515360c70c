"""Rows of activations to import, in memory or in a file: read in blocks, and checked."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from numpy.typing import NDArray
from torch import Tensor

from saescope.errors import InputError

DTYPES = ("float32", "float16", "bfloat16")
"""of rows that can be brought; others would lose digits without a word"""
_BLOCK_BYTES = 64 << 20


class Rows(ABC):
    """Rows [n, d_in] that are read by parts; `check` says whether they can be used as they are."""

    where: str
    """names them in errors"""
    dtype: str
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.shape[1]

    @abstractmethod
    def read(self, start: int, stop: int) -> Tensor:
        """Rows from number `start` up to `stop`, in their own dtype."""

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Parts of moderate size: (start, stop) of each."""
        each = max(1, _BLOCK_BYTES // (4 * self.d_in))
        for start in range(0, len(self), each):
            yield start, min(start + each, len(self))

    def check(self) -> None:
        """Raise InputError for another shape, for a dtype that would be cast, or without rows."""
        if len(self.shape) != 2 or 0 in self.shape:
            raise InputError(
                "is not rows of activations",
                where=self.where,
                given=f"shape {self.shape}",
                allowed="[rows, d_in], with one row or more",
            )
        if self.dtype not in DTYPES:
            raise InputError(
                f"would lose digits: cast it yourself, as {self.cast}",
                where=self.where,
                given=self.dtype,
                allowed=DTYPES,
            )

    cast = 'x.astype("float32")'
    """how to make float32 of them"""

    def facts(self) -> dict[str, Any]:
        """Number, width, dtype and the sha256 of the values: the same for equal rows anywhere.

        Raises InputError for rows that are not finite, naming the first.
        """
        sha256 = self.sha256(finite=True)
        return {"rows": len(self), "d_in": self.d_in, "dtype": self.dtype, "sha256": sha256}

    def sha256(self, *, finite: bool = False) -> str:
        """Of the values, shape and dtype. Raises InputError as `facts` does, if they are to be
        finite."""
        digest = hashlib.sha256(f"{self.dtype} {len(self)} {self.d_in}\n".encode())
        for start, stop in self.blocks():
            x = self.read(start, stop).cpu().contiguous()
            if finite:
                _check_finite(x, start, where=self.where)
            digest.update(x.view(torch.uint8).numpy().data)
        return digest.hexdigest()


class RowsInMemory(Rows):
    """Rows of a NumPy array (which may be mapped from a file) or of a tensor."""

    def __init__(self, values: Tensor | NDArray[Any], *, where: str) -> None:
        self._values, self.where = values, where
        self.shape = tuple(values.shape)
        self.dtype = str(values.dtype).removeprefix("torch.")
        if isinstance(values, Tensor):
            self.cast = "x.float()"

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._values.device if isinstance(self._values, Tensor) else torch.device("cpu")

    def read(self, start: int, stop: int) -> Tensor:
        """Rows from number `start` up to `stop`, in their own dtype."""
        part = self._values[start:stop]
        if isinstance(part, Tensor):
            return part.detach()
        # a copy: torch takes no memory that is read-only or runs backwards
        return torch.from_numpy(np.array(part, order="C"))

    def take(self, numbers: NDArray[np.int64]) -> Float32[Tensor, "rows d_in"]:
        """Rows by their numbers, copied."""
        if isinstance(self._values, Tensor):
            index = torch.from_numpy(numbers).to(self.device)
            return self._values.detach().index_select(0, index).float()
        return torch.from_numpy(np.ascontiguousarray(self._values[numbers], np.float32))


def as_rows(values: Any, *, where: str) -> RowsInMemory:
    """Rows [n, d_in] that somebody gave, if they can be used as they are.

    Raises InputError for another shape, or a dtype that would be cast (float64, integers).

    >>> as_rows(np.zeros((3, 2)), where="x")
    Traceback (most recent call last):
    ...
    saescope.errors.InputError: x: would lose digits: cast it yourself, as x.astype("float32") ...
    """
    if not isinstance(values, Tensor | np.ndarray):
        raise InputError(
            "is no array",
            where=where,
            given=type(values).__name__,
            allowed="a NumPy array or a tensor [rows, d_in]",
        )
    rows = RowsInMemory(values, where=where)
    rows.check()
    return rows


def as_column(values: Any, *, where: str) -> NDArray[Any]:
    """Numbers, names or truth values that somebody gave beside rows, as a NumPy array."""
    found = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if found.dtype.kind not in "biuU":
        raise InputError(
            "is neither whole numbers, names nor truth values",
            where=where,
            given=str(found.dtype),
        )
    return found


def _check_finite(x: Tensor, start: int, *, where: str) -> None:
    whole = torch.isfinite(x).all(1)
    if not bool(whole.all()):
        first = int((~whole).nonzero()[0, 0])
        raise InputError(
            "a row is not finite",
            where=where,
            given=f"row {start + first}",
            allowed="finite numbers",
        )
