"""The scale an SAE is trained at: fitted once on a harvest, folded into the weights at release.

Training sees y = (x - mean) * scale. Activations, reconstructions and decoder rows that leave an
SAE are in the model's own units, so nothing outside this package needs to know the scale.
"""

from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from saescope.errors import InputError, check_choice

NormaliserKind = Literal["none", "unit_mean_square", "sqrt_d", "centred", "standardised"]
_EPS = 1e-5
"""added to a vector's deviation before it divides (Lawson et al. 2024)"""
ROUNDING = (8 * 2.0**-23) ** 2
"""float32 makes equal activations vary by so much of their mean square"""


@dataclass(frozen=True)
class Normaliser:
    """y = (x - mean) * scale, with the variance that y then has.

    "standardised" instead takes each vector's own mean and deviation over its coordinates:
    y = (x - mean_i x_i) / (std_i x_i + 1e-5) (Lawson et al. 2024, section 3).

    >>> fit = Normaliser.fit("unit_mean_square", mean=torch.tensor([3.0, 0.0]), mean_square=25.0)
    >>> round(float(fit.scale), 4), round(fit.variance, 4)
    (0.2, 0.64)
    """

    kind: NormaliserKind
    mean: Tensor
    """[d_in] float32, zeros unless the kind is "centred\""""
    scale: Tensor
    """float32, [] or [d_in] (several sites side by side, each with its own); 1 for "none\""""
    variance: float
    """E||y - E y||^2, the unit in which reconstruction losses are counted"""

    @classmethod
    def fit(
        cls,
        kind: NormaliserKind,
        *,
        mean: Tensor,
        mean_square: float,
        mean_norm: float | None = None,
        sample: Tensor | None = None,
    ) -> Self:
        """From moments over the training rows.

        Args:
            mean: E x [d_in].
            mean_square: E||x||^2.
            mean_norm: E||x||, needed by "sqrt_d".
            sample: rows [n, d_in], needed by "standardised" for the variance it then has, and by
                "sqrt_d" if mean_norm is not given.

        Raises InputError for an unknown kind, for data that does not vary but for rounding, or if
        what the kind needs is not given.
        """
        check_choice("no such normaliser", "normaliser", kind, get_args(NormaliserKind))
        mean = mean.to(torch.float64)
        variance = mean_square - float(mean.square().sum())
        _check_varies(variance, mean_square)
        if kind == "standardised":
            if sample is None:
                raise InputError("needs a sample of rows", where="Normaliser.fit", given=kind)
            y = _standardise(sample.double())
            spread = float((y - y.mean(0)).square().sum(1).mean())
            _check_varies(spread, float(y.square().sum(1).mean()))
            return cls(kind, torch.zeros_like(mean).float(), torch.ones(()), spread)
        if kind == "sqrt_d" and mean_norm is None:
            if sample is None:
                raise InputError("needs mean_norm or a sample", where="Normaliser.fit", given=kind)
            mean_norm = float(sample.double().norm(dim=1).mean())
        scale = {
            "none": 1.0,
            "unit_mean_square": mean_square**-0.5,
            "centred": variance**-0.5,
            "sqrt_d": len(mean) ** 0.5 / (mean_norm or 1.0),
        }[kind]
        kept = mean if kind == "centred" else torch.zeros_like(mean)
        return cls(
            kind, kept.float(), torch.tensor(scale, dtype=torch.float32), variance * scale**2
        )

    @classmethod
    def identity(cls, d_in: int, variance: float = 1.0) -> Self:
        """No change; the variance is taken as given."""
        return cls("none", torch.zeros(d_in), torch.ones(()), variance)

    @classmethod
    def side_by_side(cls, normalisers: list[Self]) -> Self:
        """One normaliser for sites concatenated on the last axis; each keeps its own scale.

        Raises InputError for "standardised" ones, whose scale is a row's.
        """
        kinds = {each.kind for each in normalisers}
        if len(kinds) != 1 or "standardised" in kinds:
            raise InputError(
                "cannot be put side by side", where="Normaliser.side_by_side", given=sorted(kinds)
            )
        mean = torch.cat([each.mean for each in normalisers])
        scale = torch.cat([each.scale.expand(len(each.mean)) for each in normalisers])
        return cls(normalisers[0].kind, mean, scale, sum(each.variance for each in normalisers))

    @property
    def is_identity(self) -> bool:
        """True if nothing is changed."""
        return self.kind == "none"

    @property
    def feature_scale(self) -> float:
        """What feature activations are divided by to be in the model's units.

        The scale; of several, their geometric mean; 1 for "standardised" (see `row_scale`).
        """
        return float(self.scale if self.scale.ndim == 0 else self.scale.log().mean().exp())

    def row_scale(self, x: Tensor) -> Tensor | float:
        """What turns activations at this scale into the model's units: a number, or [rows, 1]."""
        if self.kind == "standardised":
            return x.std(-1, correction=0, keepdim=True) + _EPS
        return 1 / self.feature_scale

    def apply(self, x: Tensor) -> Tensor:
        """x in the model's units [..., d_in] to training units."""
        if self.kind == "none":
            return x
        if self.kind == "standardised":
            return _standardise(x)
        moved = x - self.mean.to(x) if self.kind == "centred" else x
        return moved * self.scale.to(x)

    def invert(self, y: Tensor, like: Tensor | None = None) -> Tensor:
        """Training units [..., d_in] back to the model's.

        Args: like is the x that y came from, or goes with; only "standardised" needs it, and
        raises InputError without it.
        """
        if self.kind == "none":
            return y
        if self.kind == "standardised":
            if like is None:
                raise InputError(
                    "a per-vector normaliser needs the activations that the codes came from",
                    where="decode(codes, like=x)",
                )
            return y * self.row_scale(like) + like.mean(-1, keepdim=True)
        x = y / self.scale.to(y)
        return x + self.mean.to(y) if self.kind == "centred" else x

    def to(self, device: torch.device | str) -> "Normaliser":
        """The same on another device."""
        return Normaliser(self.kind, self.mean.to(device), self.scale.to(device), self.variance)


def _check_varies(variance: float, mean_square: float) -> None:
    if not variance > ROUNDING * mean_square:
        raise InputError(
            "the activations do not vary, but for rounding",
            where="normaliser",
            given=f"variance {variance:.3g} at a mean square of {mean_square:.3g}",
        )


def _standardise(x: Tensor) -> Tensor:
    deviation = x.std(-1, correction=0, keepdim=True) + _EPS
    return (x - x.mean(-1, keepdim=True)) / deviation
