"""Codes of keys and values in a KV cache: sparse codes in a dictionary, and quantised numbers.

All are functions of vectors [batch, head, position, d_head] and the position of the first, as
`activations.models.coded_cache.CodedCache` calls them, and count the bits of what they keep.

    Sparse     k atoms of a dictionary by orthogonal matching pursuit: an index of log2(atoms) bits
               and an 8-bit value each (CSR, Zhang et al. 2025; Lexico, Kim et al. 2025)
    Grouped    uniform levels between the least and the largest of each group of numbers, which are
               kept in 16 bits each; keys in groups of one channel and values in groups of one token
               are KIVI (Liu et al. 2024)
    Calibrated uniform levels about each channel's mean on training text: no bits but the levels'
    Principal  coordinates along a head's leading principal components, 8 or fewer bits each
"""

from dataclasses import dataclass
from math import ceil, log2

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from activations.models.coded_cache import Coded
from sae.architectures.matching_pursuit import orthogonal_pursuit
from saescope.errors import InputError

Rows = Float[Tensor, "row head d_head"]
"""keys or values of training text"""

_SCALE_BITS = 16
_VALUE_BITS = 8
_FLOAT8 = torch.float8_e4m3fn
_LARGEST = 224.0
"""half of the largest float8 number: the largest value of training text becomes this"""
_STEPS = {1: 1.5958, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
"""By bits: the uniform step that quantises a standard normal variable best (Max 1960)."""


def float8(x: Tensor, scale: Tensor) -> Tensor:
    """x as 8-bit floating-point numbers (e4m3) in units of `scale`, and back."""
    limit = torch.finfo(_FLOAT8).max
    return (x / scale).clamp(-limit, limit).to(_FLOAT8).to(x.dtype) * scale


def uniform(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """x to the nearest of 2^bits levels that lie evenly about 0, halves of a step beside it."""
    half = 2 ** (bits - 1)
    return ((x / step).floor().clamp(-half, half - 1) + 0.5) * step


@dataclass(frozen=True)
class Sparse:
    """k atoms a vector, in a dictionary that all heads of a layer share."""

    atoms: Float[Tensor, "atom d_head"]
    """of unit length"""
    mean: Float[Tensor, " d_head"]
    scale: Tensor
    """unit of the values; one number"""
    k: int

    @classmethod
    def fit(cls, rows: Rows, atoms: Tensor, mean: Tensor, k: int) -> "Sparse":
        """With the values' unit from training text."""
        sample = rearrange(rows, "row head d -> (row head) d")[:1024] - mean
        largest = orthogonal_pursuit(sample, atoms, max(k, 1))[1].abs().max()
        return cls(atoms, mean, largest.clamp_min(1e-12) / _LARGEST, k)

    @property
    def vector_bits(self) -> int:
        """Bits of a vector's code: indices and values."""
        return self.k * (ceil(log2(len(self.atoms))) + _VALUE_BITS)

    @property
    def constant_bits(self) -> int:
        """Bits of what is kept once for all texts: dictionary, mean and unit, in 16 bits."""
        return _SCALE_BITS * (self.atoms.numel() + self.mean.numel() + 1)

    def __call__(self, x: Tensor, first: int) -> Coded:
        rows = rearrange(x.float(), "batch head position d -> (batch head position) d") - self.mean
        index, value = orthogonal_pursuit(rows, self.atoms, self.k)
        value = float8(value, self.scale)
        read = torch.bmm(value[:, None], self.atoms[index])[:, 0] + self.mean
        return Coded(read.view(x.shape).to(x.dtype), len(rows) * self.vector_bits)


@dataclass(frozen=True)
class Grouped:
    """Levels between the least and the largest of each group: asymmetric min-max quantisation.

    along: whether a group is a channel of several tokens ("channel"), or some of a token's channels
    ("token"). size: how many numbers a group has; tokens that are coded together are a multiple.
    """

    bits: int
    along: str
    size: int
    constant_bits: int = 0

    def __call__(self, x: Tensor, first: int) -> Coded:
        within = x.shape[2 if self.along == "channel" else 3]
        if within % self.size:
            raise InputError(
                "groups do not fit", where="size", given=self.size, allowed=f"divisors of {within}"
            )
        by = "b h (g s) d -> b h g d s" if self.along == "channel" else "b h p (g s) -> b h p g s"
        groups = rearrange(x.float(), by, s=self.size)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        low, step = low.half().float(), ((high - low) / (2**self.bits - 1)).half().float()
        level = ((groups - low) / step.clamp_min(1e-12)).round().clamp(0, 2**self.bits - 1)
        read = rearrange(low + level * step, " -> ".join(reversed(by.split(" -> "))))
        overhead = 2 * _SCALE_BITS * low.numel()
        return Coded(read.to(x.dtype), self.bits * x.numel() + overhead)


@dataclass(frozen=True)
class Calibrated:
    """Levels about each channel's mean, by its deviation, both of training text."""

    bits: int
    mean: Float[Tensor, "head d_head"]
    deviation: Float[Tensor, "head d_head"]

    @classmethod
    def fit(cls, rows: Rows, bits: int) -> "Calibrated":
        """Mean and deviation of each channel."""
        return cls(bits, rows.mean(0), rows.std(0).clamp_min(1e-12))

    @property
    def constant_bits(self) -> int:
        """Of means and deviations, in 16 bits."""
        return 2 * _SCALE_BITS * self.mean.numel()

    def __call__(self, x: Tensor, first: int) -> Coded:
        mean, step = self.mean[:, None], _STEPS[self.bits] * self.deviation[:, None]
        read = uniform(x.float() - mean, step, self.bits) + mean
        return Coded(read.to(x.dtype), self.bits * x.numel())


@dataclass(frozen=True)
class Principal:
    """Coordinates along each head's leading principal components; none are the mean alone."""

    bits: int
    mean: Float[Tensor, "head d_head"]
    directions: Float[Tensor, "head d_head component"]
    deviation: Float[Tensor, "head component"]
    """of the coordinates on training text"""

    @classmethod
    def fit(cls, rows: Rows, components: int, bits: int) -> "Principal":
        """So many components of each head, by bits each."""
        mean = rows.mean(0)
        by_head = rearrange(rows - mean, "row head d -> head row d")
        _, spread, directions = torch.linalg.svd(by_head, full_matrices=False)
        deviation = spread[:, :components] / max(len(rows) - 1, 1) ** 0.5
        return cls(bits, mean, directions.mT[..., :components], deviation.clamp_min(1e-12))

    @property
    def constant_bits(self) -> int:
        """Of directions, means and deviations, in 16 bits."""
        return _SCALE_BITS * sum(
            each.numel() for each in (self.mean, self.directions, self.deviation)
        )

    def __call__(self, x: Tensor, first: int) -> Coded:
        mean = self.mean[:, None]
        along = (x.float() - mean) @ self.directions
        read = uniform(along, _STEPS[self.bits] * self.deviation[:, None], self.bits)
        return Coded((read @ self.directions.mT + mean).to(x.dtype), self.bits * along.numel())
