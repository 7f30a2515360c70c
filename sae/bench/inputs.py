"""Synthetic rows with the structure of a model's activations, and SAE weights that fit them.

Synthetic rows are a sum of a few strong directions of many (planted features, by a Zipf law), a
background of low rank with a falling spectrum, and noise; coordinates differ in scale. They are
centred, with E||x||^2 = d_in, so that a coordinate's deviation is 1. Features of the weights are
planted directions, half learnt.

How many pre-activations count decides what a sparse step costs, so they are brought to what SAEs of
L0 32 had after a run on SmolLM2-135M: TopK 3.3 times as many positive ones as k; JumpReLU four
times as many as are active above the lower edge of the band in which its thresholds are estimated.
"""

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from saescope.errors import ArtefactError, InputError, check_range

BATCHES = 3
"""different batches, taken in turn"""
_SHARES = {"features": 0.5, "background": 0.45, "noise": 0.05}
"""of the variance"""
_ACTIVE, _RANK = 48, 64
_ZIPF_SHIFT = 20.0
_COORDINATES = 0.5
"""deviation of the logarithm of a coordinate's scale"""
_LEARNT = 0.5
"""size of the error of a weight's row beside its planted direction"""
_SAMPLE_ROWS = 512
_POSITIVE = 3.3
"""positive pre-activations of a row over k, where k are chosen"""
_SHORT = 0.01
"""fraction of the rows, at most, that may have fewer than k"""
_REACH = 4.0
"""pre-activations that JumpReLU's estimator looks at over the active ones"""
_THRESHOLD, _BAND = 1.0, 1.0
"""JumpReLU's threshold, and half its bandwidth (our default, and SAELens' recipe)"""
_QUIET = 0.02
"""norm of a dead feature's encoder row: positive on half of the rows, never chosen"""


@dataclass(frozen=True)
class Shape:
    """Sizes of a step.

    >>> Shape.parse("2048x768x8192x32")
    Shape(batch=2048, d_in=768, d_sae=8192, k=32)
    """

    batch: int
    d_in: int
    d_sae: int
    k: int
    """features a row: k, or the mean L0 wanted"""

    def __post_init__(self) -> None:
        for each in fields(self):
            check_range(f"shape.{each.name}", getattr(self, each.name), low=1)
        check_range("shape.k", self.k, high=self.d_sae)

    @classmethod
    def parse(cls, text: str) -> Self:
        """A shape written BATCHxD_INxD_SAExK; InputError if it is not written so."""
        if not re.fullmatch(r"\d+(x\d+){3}", text):
            raise InputError(
                "not a shape",
                where="shapes",
                given=text,
                allowed="BATCHxD_INxD_SAExK, such as 2048x768x8192x32",
            )
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        return f"{self.batch}x{self.d_in}x{self.d_sae}x{self.k}"


@dataclass(frozen=True)
class Weights:
    """Weights of an SAE without b_dec."""

    W_enc_T: Tensor
    """[d_sae, d_in]"""
    W_dec: Tensor
    """[d_sae, d_in], rows of unit norm"""
    b_enc: Tensor
    """[d_sae]"""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The tensors that every library trains on; b_dec is 0 and decoder rows have unit norm."""

    x: Tensor
    """[batches, batch, d_in]"""
    W_enc_T: Tensor
    """[d_sae, d_in]"""
    W_dec: Tensor
    """[d_sae, d_in]"""
    b_enc: Tensor
    """[d_sae]"""
    threshold: Tensor
    """[d_sae], JumpReLU's"""
    dead: Tensor
    """bool [d_sae], features that count as dead in every step"""

    @property
    def variance(self) -> float:
        """E||x - E x||^2."""
        rows = rearrange(self.x, "batch row d_in -> (batch row) d_in")
        return float((rows - rows.mean(0)).square().sum(1).mean())

    def to(self, device: str) -> "Inputs":
        """The same on another device."""
        return Inputs(**{name: value.to(device) for name, value in vars(self).items()})

    def save(self, folder: Path) -> None:
        """Write one .npy file a tensor, which other environments can read."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in vars(self).items():
            np.save(folder / f"{name}.npy", value.numpy())

    @classmethod
    def load(cls, folder: Path) -> Self:
        """What `save` wrote; ArtefactError if something is missing."""
        try:
            return cls(
                **{
                    each.name: torch.from_numpy(np.load(folder / f"{each.name}.npy"))
                    for each in fields(cls)
                }
            )
        except (FileNotFoundError, ValueError) as error:
            raise ArtefactError(f"no inputs here: {error}", where=str(folder)) from None


def planted(shape: Shape, *, seed: int = 0, batches: int = BATCHES) -> tuple[Tensor, Weights]:
    """Synthetic rows x [batches, batch, d_in] and weights for them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    rows, d_in, d_sae = batches * shape.batch, shape.d_in, shape.d_sae
    scale = (_COORDINATES * normal(d_in)).exp()
    directions = functional.normalize(normal(d_sae, d_in) * scale, dim=1)
    weight = 1 / (torch.randperm(d_sae, generator=generator) + _ZIPF_SHIFT)
    ends = torch.cumsum(weight / weight.sum(), 0)
    drawn = torch.rand(rows, _ACTIVE, generator=generator)
    index = torch.searchsorted(ends, drawn).clamp_max(d_sae - 1)
    strength = torch.empty(rows, _ACTIVE).exponential_(generator=generator) + 0.5
    rank = min(_RANK, d_in)
    spectrum = torch.arange(1, rank + 1).float().rsqrt()
    components = {
        "features": functional.embedding_bag(
            index, directions, per_sample_weights=strength, mode="sum"
        ),
        "background": (normal(rows, rank) * spectrum) @ (normal(rank, d_in) * scale),
        "noise": normal(rows, d_in),
    }
    x = torch.zeros(rows, d_in)
    for name, component in components.items():
        x += component * (_SHARES[name] / component.var(0).sum()).sqrt()
    learnt = directions + _LEARNT * d_in**-0.5 * normal(d_sae, d_in)
    W = functional.normalize(learnt, dim=1)
    x = rearrange(standardised(x), "(batch row) d_in -> batch row d_in", batch=batches)
    return x, Weights(W, W, torch.zeros(d_sae))


def standardised(x: Tensor) -> Tensor:
    """Rows [n, d_in] centred and scaled to E||x||^2 = d_in."""
    centred = x - x.mean(0)
    return centred * (x.shape[1] / centred.square().sum(1).mean()).sqrt()


def prepare(
    x: Tensor, weights: Weights, kind: str, l0: float, *, dead: int = 0, seed: int = 0
) -> Inputs:
    """Inputs for an architecture at a mean L0.

    Args: x [batches, batch, d_in]; dead: number of features made dead: they hardly answer.

    Raises InputError if more are dead than the dictionary has beside the l0 that fire.
    """
    d_sae = len(weights.W_dec)
    check_range("dead", dead, low=0, high=d_sae - l0)
    order = torch.randperm(d_sae, generator=torch.Generator().manual_seed(seed))
    is_dead = torch.zeros(d_sae, dtype=torch.bool)
    is_dead[order[:dead]] = True
    W = torch.where(is_dead[:, None], _QUIET * weights.W_enc_T, weights.W_enc_T)
    b = torch.where(is_dead, 0.0, weights.b_enc)
    rows = rearrange(x, "batch row d_in -> (batch row) d_in")
    sample = rows[:: max(1, len(rows) // _SAMPLE_ROWS)]
    by_row = (sample @ W.T + b).masked_fill_(is_dead, -torch.inf)
    pre = by_row.view(-1)

    def passed_by(count: float) -> float:
        """The value that this many of a row's pre-activations exceed on average."""
        total = min(len(pre) - dead * len(sample), max(1, round(count * len(sample))))
        return float(pre.topk(total, sorted=False).values.min())

    threshold = 0.0
    if kind == "jumprelu":
        threshold = _THRESHOLD
        upper, lower = passed_by(l0), passed_by(_REACH * l0)
        size = _BAND / (upper - lower) if upper > lower else 1.0
        W, b = W * size, (b - upper) * size + threshold
    elif kind == "relu":
        b = b - passed_by(l0)
    else:
        least = by_row.topk(math.ceil(l0), dim=1, sorted=False).values.min(1).values
        b = b - min(passed_by(_POSITIVE * l0), float(least.quantile(_SHORT)))
    return Inputs(
        x=x,
        W_enc_T=W,
        W_dec=weights.W_dec,
        b_enc=torch.where(is_dead, 0.0, b),
        threshold=torch.full((d_sae,), threshold),
        dead=is_dead,
    )
