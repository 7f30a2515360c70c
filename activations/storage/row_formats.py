"""How a site's rows are stored: bits of bfloat16, float32, int8 with a scale a row, or not at all.

int8 is absmax quantisation by rows (Dettmers et al. 2022, section 2.1), rounded to the nearest:

    scale = max_i |x_i| / 127        q_i = round(x_i / scale)        x̂_i = scale q_i

so that no value is off by more than half a scale. What is stored is what counts: statistics are of
the values read back. Nothing is turned to float32 before a batch is (`floats`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32
from numpy.typing import NDArray
from torch import Tensor

from saescope.errors import InputError

StorageKind = Literal["bfloat16", "float32", "int8", "none"]
SCALE = ".scale"
"""Ends the name of the array that has the scales of a site's rows."""
NAN_BITS = 0x7FC0
FILLS: Mapping[str, Any] = {"uint16": NAN_BITS, "int8": -128, "float32": float("nan"), "int64": -1}
"""What stands where an array of rows has no value, by its dtype; no stored value is equal."""
_LARGEST = 127


class RowArray(NamedTuple):
    """An array with an entry a row."""

    dtype: str
    tail: tuple[int, ...]
    """shape of an entry"""
    site: str | None = None
    """whose rows it holds, or helps to hold"""

    @property
    def nbytes(self) -> int:
        """Bytes of an entry."""
        return int(np.prod(self.tail, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def site_arrays(site: str, width: int, storage: StorageKind) -> dict[str, RowArray]:
    """The arrays, by name, that have a site's rows; `floats` takes them in this order."""
    if storage == "none":
        return {}
    if storage == "float32":
        return {site: RowArray("float32", (width,), site)}
    if storage == "int8":
        scale = RowArray("float32", (), site)
        return {site: RowArray("int8", (width,), site), site + SCALE: scale}
    return {site: RowArray("uint16", (width,), site)}


def stored(x: Float[Tensor, "rows d_in"], storage: StorageKind) -> list[Tensor]:
    """Rows as they are stored, the arrays of `site_arrays`, on the device of x.

    For none they are as they would be in bfloat16.
    """
    if storage == "float32":
        return [x.float()]
    if storage != "int8":
        return [x.to(torch.bfloat16).view(torch.uint16)]
    x = x.float()
    scale = x.abs().amax(1) / _LARGEST
    # a row of zeros has no scale; one with values below 1e-36 has none that float32 holds exactly,
    # and becomes zeros
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, scale)
    q = (x / torch.where(scale == 0, torch.inf, scale)[:, None]).round_()
    return [q.to(torch.int8), scale]


def floats(arrays: list[Tensor]) -> Float32[Tensor, "rows d_in"]:
    """Rows in float32, wherever the arrays are, from the arrays of `site_arrays`."""
    if len(arrays) == 1:
        bits = arrays[0]
        if bits.dtype == torch.float32:
            return bits
        if bits.device.type != "cpu":
            return bits.view(torch.bfloat16).float()
        # in this thread alone: torch's would wait for cores on which others read the next rows
        x = torch.empty(bits.shape)
        np.left_shift(bits.numpy(), 16, out=x.numpy().view(np.uint32), dtype=np.uint32)
        return x
    q, scale = arrays
    return q.float().mul_(scale[:, None])


def rows_in(arrays: list[Tensor], dtype: torch.dtype) -> Float[Tensor, "rows d_in"]:
    """Rows in float32 or bfloat16; in the latter the very memory of rows that are stored so."""
    if dtype == torch.bfloat16 and arrays[0].dtype == torch.uint16:
        return arrays[0].view(torch.bfloat16)
    return floats(arrays).to(dtype)


@dataclass(frozen=True)
class SiteSums:
    """Sums over rows of one site, in float64."""

    count: int
    total: NDArray[np.float64]
    """[d_in]"""
    square: float


class SiteRows:
    """The rows of one site in one window, as they are stored, and their sums.

    >>> rows = SiteRows("blocks.0.hook_resid_post", rows=2, d_in=3)
    >>> rows.append(torch.tensor([[1.0, 2.0, 3.0]]))
    >>> rows.append(torch.tensor([[0.0, 0.0, 4.0]]))
    >>> rows.sums().total.tolist(), rows.sums().square
    ([1.0, 2.0, 7.0], 30.0)
    """

    def __init__(self, site: str, rows: int, d_in: int, storage: StorageKind = "bfloat16") -> None:
        self._site = site
        self._storage: StorageKind = storage
        self._filled = 0
        self._total = torch.zeros(d_in, dtype=torch.float64)
        self._square = 0.0
        described = site_arrays(site, d_in, storage)
        self.arrays: dict[str, NDArray[Any]] = {
            name: np.empty((rows, *each.tail), each.dtype) for name, each in described.items()
        }

    def append(self, x: Float[Tensor, "n d_in"]) -> None:
        """Add rows; the sums are of what is stored, after rounding.

        Raises InputError if a value is not finite.
        """
        parts = stored(x, self._storage)
        rounded = floats(parts)
        total = rounded.sum(0, dtype=torch.float64).cpu()
        square = float(rounded.flatten().square().sum(dtype=torch.float64))
        if not np.isfinite(square):
            raise InputError(
                "activations are not finite; try another model.dtype",
                where=self._site,
                given=str(x.dtype).removeprefix("torch."),
            )
        self._total += total
        self._square += square
        last = self._filled + len(x)
        if self._storage != "none":
            for array, part in zip(self.arrays.values(), parts, strict=True):
                array[self._filled : last] = part.cpu().numpy()
        self._filled = last

    def sums(self) -> SiteSums:
        """Of the rows so far."""
        return SiteSums(self._filled, self._total.numpy(), self._square)
