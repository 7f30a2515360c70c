"""Rows of activations that somebody brings: arrays in memory, checked once and for all."""

import hashlib
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


class RowsInMemory:
    """Rows [n, d_in] of a NumPy array (which may be mapped from a file) or a tensor.

    Made by `as_rows`, which looks at every number.
    """

    def __init__(self, values: Tensor | NDArray[Any]) -> None:
        self._values = values
        self.d_in = int(values.shape[1])

    def __len__(self) -> int:
        return len(self._values)

    @property
    def dtype(self) -> str:
        """Its name: float32, float16 or bfloat16."""
        return str(self._values.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._values.device if isinstance(self._values, Tensor) else torch.device("cpu")

    def read(self, start: int, stop: int) -> Tensor:
        """Rows from number `start` up to `stop`, in their own dtype and their own memory."""
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

    def blocks(self) -> "list[tuple[int, int]]":
        """Where to cut the rows so that a part is of moderate size: (start, stop) of each."""
        each = max(1, _BLOCK_BYTES // (4 * self.d_in))
        return [(start, min(start + each, len(self))) for start in range(0, len(self), each)]

    def sha256(self) -> str:
        """Of the values, dtype and shape; the same for equal arrays wherever they are."""
        digest = hashlib.sha256(f"{self.dtype} {len(self)} {self.d_in}\n".encode())
        for start, stop in self.blocks():
            part = self.read(start, stop).cpu().contiguous()
            digest.update(part.view(torch.uint8).numpy().data)
        return digest.hexdigest()


def as_rows(values: Any, *, where: str) -> RowsInMemory:
    """Rows [n, d_in] that somebody gave, if they can be used as they are.

    Raises InputError for another shape, for a dtype that would be cast (float64, integers), and for
    rows that are not finite, naming the first.

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
    if values.ndim != 2 or 0 in values.shape:
        raise InputError(
            "is not rows of activations",
            where=where,
            given=f"shape {tuple(values.shape)}",
            allowed="[rows, d_in], with one row or more",
        )
    rows = RowsInMemory(values)
    if rows.dtype not in DTYPES:
        cast = 'x.astype("float32")' if isinstance(values, np.ndarray) else "x.float()"
        raise InputError(
            f"would lose digits: cast it yourself, as {cast}",
            where=where,
            given=rows.dtype,
            allowed=DTYPES,
        )
    for start, stop in rows.blocks():
        check_finite(rows.read(start, stop), start, where=where)
    return rows


def check_finite(x: Tensor, start: int, *, where: str) -> None:
    """Raise InputError if one of rows [n, d_in], counted from `start`, is not finite."""
    whole = torch.isfinite(x).all(1)
    if not bool(whole.all()):
        first = int((~whole).nonzero()[0, 0])
        raise InputError(
            "a row is not finite",
            where=where,
            given=f"row {start + first}",
            allowed="finite numbers",
        )
