"""The scale an SAE is trained at: fitted once on a harvest, saved with the SAE, folded in one
place.

Training sees y = (x - mean) * scale. Activations, reconstructions and decoder rows that leave an
SAE are in the model's own units, so nothing outside this package needs to know the scale.
"""

from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from saescope.errors import InputError

NormaliserKind = Literal["none", "unit_mean_square", "centred"]


@dataclass(frozen=True)
class Normaliser:
    """y = (x - mean) * scale, with the variance that y then has.

    >>> fit = Normaliser.fit("unit_mean_square", mean=torch.tensor([3.0, 0.0]), mean_square=25.0)
    >>> fit.scale, round(fit.variance, 4)
    (0.2, 0.64)
    """

    kind: NormaliserKind
    mean: Tensor
    """[d_in] float32, zeros unless the kind is "centred\""""
    scale: float
    """1 / sqrt(E||x||^2), or over the centred x; 1 for "none\""""
    variance: float
    """E||y - E y||^2, the unit in which reconstruction losses are counted"""

    @classmethod
    def fit(cls, kind: NormaliserKind, *, mean: Tensor, mean_square: float) -> Self:
        """From E x [d_in] and E||x||^2, both over the training rows.

        Raises InputError for an unknown kind or for data that does not vary.
        """
        if kind not in get_args(NormaliserKind):
            raise InputError(
                "no such normaliser",
                where="normaliser",
                given=kind,
                allowed=get_args(NormaliserKind),
            )
        mean = mean.to(torch.float64)
        variance = mean_square - float(mean.square().sum())
        if not variance > 0:
            raise InputError("the activations do not vary", where="normaliser", given=variance)
        if kind == "none":
            scale = 1.0
        else:
            scale = (variance if kind == "centred" else mean_square) ** -0.5
        kept = mean if kind == "centred" else torch.zeros_like(mean)
        return cls(kind, kept.to(torch.float32), scale, variance * scale**2)

    @classmethod
    def identity(cls, d_in: int) -> Self:
        """No change; the variance is taken as 1."""
        return cls("none", torch.zeros(d_in), 1.0, 1.0)

    def apply(self, x: Tensor) -> Tensor:
        """x in the model's units [..., d_in] to training units."""
        return (x - self.mean.to(x)) * self.scale if self.kind == "centred" else x * self.scale

    def invert(self, y: Tensor) -> Tensor:
        """Training units [..., d_in] back to the model's."""
        return y / self.scale + self.mean.to(y) if self.kind == "centred" else y / self.scale

    def to(self, device: torch.device | str) -> "Normaliser":
        """The same on another device."""
        return Normaliser(self.kind, self.mean.to(device), self.scale, self.variance)
