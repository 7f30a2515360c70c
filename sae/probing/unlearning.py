"""Unlearning by clamping: features of a subject are set to a negative value where they fire.

The features are those that fire most often on texts to be forgotten, of those that fire on less
than a share `sparse` of the tokens of texts to be retained. Where one of them is active it is set
to -m times its mean activation, and the SAE's error is kept (Farrell et al. 2024, arXiv 2410.19278;
SAEBench, where the clamp is -m itself, which has another meaning for each SAE):

    x' = x + sum over clamped i with f_i != 0 of (-m a_i - f_i) W_dec_i

The control is as many features of nearly equal firing rate, drawn at random.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.core.base import SparseAutoencoder
from sae.probing.divisions import Indices
from sae.probing.logistic import Matrix

VERSION = 1
NEAREST = 10
"""features of nearest firing rate that a random one is drawn from"""
_ROWS = 4096
"""rows encoded at a time"""


class Firing(NamedTuple):
    """How features fire on some rows."""

    rows: int
    fired: Matrix
    """[d_sae], rows on which each fires"""
    total: Matrix
    """[d_sae], sum of its activations"""

    @property
    def rate(self) -> Matrix:
        """Share of rows on which each fires [d_sae]."""
        return self.fired / max(1, self.rows)

    @property
    def mean(self) -> Matrix:
        """Mean activation of each where it fires [d_sae], 0 where it never does."""
        return self.total / np.maximum(1, self.fired)

    def plus(self, other: "Firing") -> "Firing":
        """On both."""
        return Firing(self.rows + other.rows, self.fired + other.fired, self.total + other.total)


@torch.no_grad()
def firing(sae: SparseAutoencoder, x: Tensor) -> Firing:
    """How features fire on activations x [rows, d_in]."""
    fired, total = np.zeros(sae.d_sae), np.zeros(sae.d_sae)
    for start in range(0, len(x), _ROWS):
        codes = sae.encode_sparse(x[start : start + _ROWS].float()).compact()
        index = codes.index.cpu().numpy()
        fired += np.bincount(index, minlength=sae.d_sae)
        total += np.bincount(index, codes.value.double().cpu().numpy(), sae.d_sae)
    return Firing(len(x), fired, total)


def of_subject(forget: Firing, retain: Firing, sparse: float) -> Indices:
    """The features that fire most on what is to be forgotten and hardly on the rest, in order.

    >>> forget = Firing(10, np.array([5.0, 9.0, 0.0, 8.0]), np.zeros(4))
    >>> retain = Firing(10, np.array([0.0, 3.0, 0.0, 0.0]), np.zeros(4))
    >>> of_subject(forget, retain, 0.2).tolist()
    [3, 0]
    """
    able = (retain.rate < sparse) & (forget.fired > 0)
    order = np.argsort(-forget.rate, kind="stable")
    return order[able[order]]


def alike(chosen: Indices, both: Firing, seed: int) -> Indices:
    """For each chosen feature another of nearly equal firing rate, none twice, drawn by `seed`.

    Each is one of the ten of nearest rate that are left; fewer where too few features fire.
    """
    draw = np.random.default_rng(seed)
    left = np.setdiff1d(np.flatnonzero(both.fired), chosen)
    found = []
    for each in chosen[: len(left)]:
        distance = np.abs(np.log(both.fired[left]) - np.log(both.fired[each]))
        nearest = np.argsort(distance, kind="stable")[:NEAREST]
        pick = nearest[draw.integers(len(nearest))]
        found.append(left[pick])
        left = np.delete(left, pick)
    return np.array(found, np.int64)


def clamp_values(chosen: Iterable[int], mean: Matrix, strength: float) -> Tensor:
    """What each feature is set to where it fires [d_sae]; NaN for those that are left alone."""
    values = torch.full((len(mean),), torch.nan)
    for each in chosen:
        values[each] = -strength * float(mean[each])
    return values


@torch.no_grad()
def clamped(sae: SparseAutoencoder, x: Tensor, values: Tensor) -> Tensor:
    """Activations x [rows, d_in] with features clamped where they fire, the error kept.

    Args: values [d_sae] are those of `clamp_values`. Rows on which none of them fires are x, bit
    for bit.
    """
    codes = sae.encode_sparse(x).compact()
    target = values.to(codes.value)[codes.index]
    touched = ~target.isnan()
    change = (target - codes.value)[touched, None] * sae.W_dec[codes.index[touched]]
    return x.index_add(0, codes.rows()[touched], change)
