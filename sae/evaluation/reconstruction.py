"""Reconstruction on activations: L0, FVU, cosine, dead features, shrinkage.

FVU = sum ||x - x_hat||^2 / sum ||x - mu||^2 with mu the mean over all rows evaluated: the identity
gives 0, predicting the mean gives 1. Two passes, float64 sums, so neither batch size nor a large
mean matters.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sae.codes import SparseCodes
from saescope.errors import InputError

_ROWS = 4096


class Reconstructor(Protocol):
    """What can be measured: an SAE, or a stand-in such as the identity."""

    d_sae: int

    def encode_sparse(self, x: Tensor) -> SparseCodes: ...
    def decode(self, codes: SparseCodes) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Measured over `rows` activations; an interval is half of a 95% one, rows as independent."""

    rows: int
    """number of activation rows"""
    l0: float
    """mean number of non-zero features a row"""
    fvu: float
    """fraction of variance unexplained"""
    fvu_interval: float
    """half width of the 95% interval of fvu (ratio estimator, linearised)"""
    cosine: float
    """mean cosine of x and x_hat over rows with a non-zero norm of both"""
    norm_ratio: float
    """sum ||x_hat|| / sum ||x||; below 1 is shrinkage"""
    dead_fraction: float
    """features that fire on none of the rows, over d_sae"""
    density: Tensor
    """float64 [d_sae], part of the rows each feature fires on"""


@torch.no_grad()
def measure_reconstruction(
    sae: Reconstructor, rows: Callable[[], Iterable[Tensor]]
) -> Reconstruction:
    """Measure an SAE on activations [rows, d_in], given as fresh iterators of them (read twice).

    Raises InputError if there are no rows, or if they are all equal.
    """
    count, total = 0, torch.zeros((), dtype=torch.float64)
    for x in rows():
        count += len(x)
        total = total + x.sum(0, dtype=torch.float64)
    if count == 0:
        raise InputError("no activations to evaluate on", where="measure_reconstruction", given=0)
    sums = _Sums(sae.d_sae, total / count)
    for x in rows():
        for part in x.split(_ROWS):
            sums.add(sae, part)
    return sums.result()


class _Sums:
    """Float64 sums over rows."""

    def __init__(self, d_sae: int, mean: Tensor) -> None:
        self.mean = mean
        self.fired = torch.zeros(d_sae, dtype=torch.int64, device=mean.device)
        self.rows = 0
        self.errors: list[Tensor] = []
        self.variances: list[Tensor] = []
        self.cosine = self.in_norm = self.out_norm = 0.0
        self.directed = 0

    def add(self, sae: Reconstructor, x: Tensor) -> None:
        codes = sae.encode_sparse(x).compact()
        x_hat = sae.decode(codes).double()
        exact = x.double()
        self.rows += len(x)
        self.fired += torch.bincount(codes.index, minlength=len(self.fired))
        # one float64 of each a row: what the interval needs, 16 bytes a row
        self.errors.append((exact - x_hat).square().sum(1))
        self.variances.append((exact - self.mean).square().sum(1))
        norm_in, norm_out = exact.norm(dim=1), x_hat.norm(dim=1)
        self.in_norm += float(norm_in.sum())
        self.out_norm += float(norm_out.sum())
        directed = (norm_in > 0) & (norm_out > 0)
        cosine = (exact * x_hat).sum(1)[directed] / (norm_in * norm_out)[directed]
        self.cosine += float(cosine.sum())
        self.directed += int(directed.sum())

    def result(self) -> Reconstruction:
        error, variance = torch.cat(self.errors), torch.cat(self.variances)
        total = float(variance.sum())
        if total <= 0:
            raise InputError("all activations are equal, so FVU is undefined", where="evaluation")
        fvu = float(error.sum()) / total
        spread = float((error - fvu * variance).square().sum()) ** 0.5
        return Reconstruction(
            rows=self.rows,
            l0=float(self.fired.sum()) / self.rows,
            fvu=fvu,
            fvu_interval=1.96 * spread / total,
            cosine=self.cosine / self.directed if self.directed else 0.0,
            norm_ratio=self.out_norm / self.in_norm if self.in_norm else 0.0,
            dead_fraction=float((self.fired == 0).double().mean()),
            density=self.fired.double() / self.rows,
        )
