"""How a layer's attention makes its values of the residual stream, as one linear map a position.

    v[s] = (gain * scale[s] * (x[s] - mean x[s]) + shift) W_V + b_V

with the scale of the norm before attention as it was in the run (the mean and the shift are only
LayerNorm's; a block without a norm before attention has neither gain nor scale).
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from activations.models.attention import TOLERANCE, AttentionRun
from activations.models.language import Model
from activations.sites.normalised import normalised_target
from saescope.errors import InputError


@dataclass(frozen=True)
class ValueMap:
    """That of one layer in one run, float64."""

    weight: Float[Tensor, "d_model d_v"]
    """gain and W_V"""
    constant: Float[Tensor, " d_v"]
    """what does not depend on the stream: shift W_V + b_V"""
    scale: Float[Tensor, " pos"]
    centred: bool

    @staticmethod
    def needed(model: Model, layer: int) -> list[str]:
        """The sites that a run has to keep."""
        block = f"blocks.{layer}."
        norm = [f"{block}ln1.hook_out"] if _norm_of(model, layer) is not None else []
        return [f"{block}hook_resid_pre", *norm, f"{block}attn.hook_v"]

    @classmethod
    def of(cls, model: Model, run: AttentionRun, layer: int) -> Self:
        """That of a run that kept what is `needed`.

        Raises InputError where values are made otherwise.
        """
        block = f"blocks.{layer}."
        x, v = (run.at[block + name] for name in ("hook_resid_pre", "attn.hook_v"))
        weight, bias = _projection(model, layer)
        norm = _norm_of(model, layer)
        centred = isinstance(norm, nn.LayerNorm)
        scale = torch.ones(len(x), dtype=torch.float64)
        if norm is not None:
            gain, shift = _gain_and_shift(norm, f"{block}ln1.hook_out")
            out = run.at[f"{block}ln1.hook_out"]
            direction = gain * (x - x.mean(1, keepdim=True) if centred else x)
            scale = ((out - shift) * direction).sum(1) / direction.square().sum(1)
            weight, bias = gain[:, None] * weight, bias + shift @ weight
        made = cls(weight, bias, scale, centred)
        known = made.linear(x, range(len(x))) + bias
        allowed = TOLERANCE[model.dtype] * (known.norm(dim=1) + v.norm(dim=1))
        if not bool(((known - v).norm(dim=1) <= allowed).all()):
            raise InputError(
                "values are not the residual stream through one norm and one matrix",
                where=f"{model.spec}, layer {layer}",
            )
        return made

    def linear(self, x: Float[Tensor, "n d_model"], positions: Any) -> Float[Tensor, "n d_v"]:
        """What vectors of the stream, each at its position, bring to the values there."""
        x = x - x.mean(1, keepdim=True) if self.centred else x
        return self.scale[list(positions)][:, None] * (x @ self.weight)

    def back(self, direction: Float[Tensor, " d_v"], position: int) -> Float[Tensor, " d_model"]:
        """The direction of the stream that, at a position, is read as one of the values is."""
        found = self.scale[position] * (self.weight @ direction)
        return found - found.mean() if self.centred else found


def _norm_of(model: Model, layer: int) -> nn.Module | None:
    """The norm before attention, None where a block has none there."""
    site = f"blocks.{layer}.ln1.hook_out"
    return model.site_map.target(site).module if site in model.site_map.names else None


def _gain_and_shift(norm: nn.Module, site: str) -> tuple[Tensor, Tensor]:
    """Gain and shift [d_model] of a norm; InputError where they are not known."""
    if isinstance(norm, nn.LayerNorm):
        known = (norm.weight, norm.bias)
        gain, shift = (None if each is None else each.detach().double().cpu() for each in known)
        gain = torch.ones(norm.normalized_shape).double() if gain is None else gain
    else:
        found = normalised_target(site, norm)
        if found is None:
            given = type(norm).__name__
            raise InputError("is no norm whose gain is known", where=site, given=given)
        gain, shift = found.gain.double().cpu(), None
    return gain, torch.zeros_like(gain) if shift is None else shift


def _projection(model: Model, layer: int) -> tuple[Tensor, Tensor]:
    """W_V [d_model, d_v] and b_V, 0 where there is none."""
    target = model.site_map.target(f"blocks.{layer}.attn.hook_v")
    module: Any = target.module
    weight = getattr(module, "weight", None)
    transposed = type(module).__name__ == "Conv1D"  # GPT-2 keeps [in, out], Linear [out, in]
    plain = isinstance(module, nn.Linear) or transposed
    if not plain or target.side != "output" or not isinstance(weight, Tensor):
        raise InputError(
            "values do not come from one plain matrix",
            where=f"{model.spec}, layer {layer}",
            given=type(module).__name__,
        )
    matrix = weight.detach().double().cpu()
    matrix = matrix if transposed else matrix.T
    bias = torch.zeros(matrix.shape[1]) if module.bias is None else module.bias.detach().cpu()
    columns = slice(None) if target.columns is None else target.columns.cpu()
    return matrix[:, columns], bias.double()[columns]
