"""A module whose weights are at the scale of its normalisers, and the same in the model's units.

Inside, an SAE sees y = (x - m) s. With a positively homogeneous activation function an equal SAE
without m and s exists, its weights in the model's own units: `fold` makes it, `unfold` undoes it.
"""

import copy
from typing import Any, ClassVar, Self

import torch
from torch import nn

from sae.core.normaliser import Normaliser
from saescope.errors import InputError

_INPUT, _OUTPUT = "", "output"
"""names of the normalisers that belong to no site"""


class ScaledModule(nn.Module):
    """Weights W_enc_T, b_enc, W_dec, b_dec at a normaliser's scale; the base of every SAE."""

    d_in: int
    d_out: int
    W_enc_T: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    pre_bias: ClassVar[bool] = True
    """the encoder sees y - b_dec; otherwise y"""
    feature_units: ClassVar[tuple[str, ...]] = ("b_enc",)
    """parameters and buffers that are in the units of activations"""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        self.normaliser = Normaliser.identity(d_in)
        self.output_normaliser: Normaliser | None = None
        self.site_normalisers: dict[str, Normaliser] = {}
        self.metadata: dict[str, Any] = {}

    @property
    def normaliser_out(self) -> Normaliser:
        """The normaliser of what is reconstructed."""
        return self.normaliser if self.output_normaliser is None else self.output_normaliser

    @property
    def normalisers(self) -> dict[str, Normaliser]:
        """All normalisers by name: "" is the input's, "output" the output's, others a site's."""
        found = {_INPUT: self.normaliser, **self.site_normalisers}
        return (
            found if self.output_normaliser is None else {**found, _OUTPUT: self.output_normaliser}
        )

    @normalisers.setter
    def normalisers(self, named: dict[str, Normaliser]) -> None:
        sites = dict(named)
        self.normaliser = sites.pop(_INPUT)
        self.output_normaliser = sites.pop(_OUTPUT, None)
        self.site_normalisers = sites

    def clone(self) -> Self:
        """An independent SAE with the same weights, normaliser and metadata."""
        return copy.deepcopy(self)

    @torch.no_grad()
    def fold(self) -> Self:
        """An equal SAE whose weights are in the model's units: no mean and no scale is left.

        Same features and reconstructions, up to rounding. Only a per-vector scale
        ("standardised") cannot be folded, and stays. With y = (x - m) s, features divided by s_f:
        W_enc' = s W_enc / s_f, W_dec' = W_dec s_f / s, b_enc' = b_enc / s_f, b_dec' = m + b_dec / s
        (Gemma Scope, Lieberum et al. 2024, section 3, with a mean and a scale a site added).
        """
        folded = self.clone()
        inside, outside = self.normaliser, self.normaliser_out
        if inside.kind == "standardised" or self.site_normalisers:
            return folded  # of several sites each has its own scale: see `at`
        unit = inside.feature_scale
        for name in self.feature_units:
            if hasattr(folded, name):
                getattr(folded, name).div_(unit)
        folded.fold_encoder(inside, unit)
        folded.fold_decoder(outside, unit)
        folded.b_dec.copy_(outside.invert(self.b_dec))
        folded.fold_parameters(unit)
        variance = outside.variance / float(outside.scale.square().mean())
        folded.normaliser = Normaliser.identity(self.d_in, variance)
        folded.output_normaliser = None
        if self.output_normaliser is not None:
            folded.output_normaliser = Normaliser.identity(self.d_out, variance)
        return folded

    def fold_encoder(self, inside: Normaliser, unit: float) -> None:
        """What folding does to W_enc_T and, without a pre-encoder bias, b_enc."""
        if "W_enc_T" in self._parameters:
            self.W_enc_T.mul_(inside.scale / unit)
            if not self.pre_bias:
                self.b_enc.sub_(self.W_enc_T @ inside.mean)

    def fold_decoder(self, outside: Normaliser, unit: float) -> None:
        """What folding does to W_dec."""
        self.W_dec.mul_(unit / outside.scale)

    def fold_parameters(self, feature_scale: float) -> None:
        """What folding has to do beyond dividing `feature_units` (called on the folded copy)."""
        del feature_scale

    def unfold(self, inside: Normaliser, outside: Normaliser | None = None) -> Self:
        """The inverse of `fold`: an equal SAE that works at the scale of the given normalisers.

        Raises InputError for an SAE that is not folded.
        """
        if not self.normaliser.is_identity or self.site_normalisers:
            raise InputError("is not folded", where="sae.unfold", given=self.normaliser.kind)
        if inside.kind == "standardised":
            raise InputError("has no scale to unfold to", where="sae.unfold", given=inside.kind)
        ready = self.clone()
        # x = (y - m') s' with s' = 1 / s, m' = -m s: seen from y, the model's units are a scale
        ready.normaliser = _inverse(inside)
        if self.output_normaliser is not None and outside is not None:
            ready.output_normaliser = _inverse(outside)
        ready = ready.fold()
        ready.normaliser, ready.output_normaliser = inside, outside
        return ready

    def at(self, site: str) -> Self:
        """This SAE for one site, folded; several-layer SAEs have a normaliser for each.

        Raises InputError for a site it was not trained on.
        """
        if not self.site_normalisers:
            if site != self.metadata.get("site", site):
                raise InputError(
                    "this SAE is of another site",
                    where="sae.at",
                    given=site,
                    allowed=str(self.metadata["site"]),
                )
            return self
        if site not in self.site_normalisers:
            raise InputError(
                "not a site of this SAE", where="sae.at", given=site, allowed=self.site_normalisers
            )
        own = self.clone()
        own.normaliser, own.site_normalisers = self.site_normalisers[site], {}
        own.output_normaliser = None
        own.metadata["site"] = site
        return own.fold()


def _inverse(normaliser: Normaliser) -> Normaliser:
    mean, scale = -normaliser.mean * normaliser.scale, 1 / normaliser.scale
    return Normaliser("centred", mean, scale, normaliser.variance)
