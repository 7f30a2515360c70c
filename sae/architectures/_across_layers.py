"""Several dictionaries, one a layer: their configuration, codes and outputs, put together."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sae.architectures._auxk import AuxKConfig
from sae.architectures._jumping import JumpingConfig
from sae.core import losses
from sae.core.config import ADDED
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError, check_choice, check_range

Activation = Literal["jumprelu", "relu", "topk"]
_NEW = {ADDED: True}
"""configurations from before there was TopK have none of these"""


@dataclass(frozen=True, kw_only=True)
class AcrossLayersConfig(AuxKConfig, JumpingConfig):
    """Fields of an SAE of several layers; k and AuxK are for activation topk."""

    activation: Activation = "jumprelu"
    """Which features fire: jumprelu (all above learnt thresholds), relu (all above 0), or topk (the
    k largest of each layer)."""
    k: int = field(default=32, metadata=_NEW)
    """topk: features kept a token in each layer."""
    auxk_coefficient: float = field(default=1 / 32, metadata=_NEW)
    """topk: weight of the AuxK loss, a mean over layers; 0 turns it off."""
    k_aux: int | None = field(default=None, metadata=_NEW)
    """topk: dead features of a layer used by AuxK a token; half of the width that a layer reads if
    not given."""
    layers: int | None = None
    """Layers, which share the d_sae features out equally; as many as sites are read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("no such activation", "sae.activation", self.activation, get_args(Activation))
        if self.activation == "relu" and self.penalty == "step":
            raise InputError(
                "without thresholds nothing has a gradient of the number of active features",
                where="sae.penalty",
                given="step",
                allowed="tanh",
            )
        check_range("sae.k", self.k, low=1)
        if self.layers is not None:
            check_range("sae.layers", self.layers, low=1)
            if self.d_sae % self.layers:
                raise InputError(
                    "features are shared out equally among the layers",
                    where="sae.d_sae",
                    given=self.d_sae,
                    allowed=f"a multiple of {self.layers}",
                )
            if self.activation == "topk":
                check_range("sae.k", self.k, low=1, high=self.d_sae // self.layers)

    @property
    def has_k(self) -> bool:
        """Whether k says how many features fire."""
        return self.activation == "topk"

    @property
    def penalty_warmup(self) -> float:
        """Of the sparsity penalty."""
        return self.l0_warmup_fraction

    def with_target_l0(self, target: float) -> Self:
        """The same with thresholds, or k, brought to a mean L0 of `target` over all layers.

        Raises InputError for an L0 that k cannot share out equally among the layers.
        """
        if self.activation == "topk":
            if target % (self.layers or 1):
                raise InputError(
                    "k is the same in each layer",
                    where="target_l0",
                    given=target,
                    allowed=f"a multiple of {self.layers}",
                )
            return super().with_target_l0(target / (self.layers or 1))
        return replace(self, calibrated_l0=target) if self.activation == "jumprelu" else self

    def for_sites(self, number: int) -> Self:
        """The same with a layer a site; InputError if `layers` says otherwise."""
        if self.layers is not None and self.layers != number:
            raise InputError(
                "a cross-layer transcoder has a layer a site",
                where="sae.layers",
                given=self.layers,
                allowed=str(number),
            )
        return replace(self, layers=number)


class SumOfTails(Function):
    """Sum of matrices [batch, w], each counted as the last w columns of [batch, d_out]."""

    @staticmethod
    def forward(ctx: Any, d_out: int, *parts: Tensor) -> Tensor:
        ctx.starts = [d_out - part.shape[1] for part in parts]
        whole = parts[0].new_zeros(len(parts[0]), d_out)
        for start, part in zip(ctx.starts, parts, strict=True):
            whole[:, start:] += part
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = gradients
        return None, *(gradient[:, start:].contiguous() for start in ctx.starts)


def joined(by_layer: list[SparseCodes]) -> SparseCodes:
    """Codes of several dictionaries on the same rows as those of one, in their order."""
    counts = torch.stack([codes.row_ptr.diff() for codes in by_layer])
    row_ptr = torch.zeros_like(by_layer[0].row_ptr)
    torch.cumsum(counts.sum(0), 0, out=row_ptr[1:])
    first = row_ptr[:-1] + counts.cumsum(0) - counts  # of each layer's entries of each row
    at = torch.cat(
        [
            torch.arange(len(codes.index), device=row_ptr.device)
            + (start - codes.row_ptr[:-1])[codes.rows()]
            for codes, start in zip(by_layer, first, strict=True)
        ]
    )
    order = torch.empty_like(at)
    order[at] = torch.arange(len(at), device=at.device)
    width = by_layer[0].d_sae
    index = torch.cat([codes.index + n * width for n, codes in enumerate(by_layer)])
    value = torch.cat([codes.value for codes in by_layer])
    return SparseCodes(row_ptr, index[order], value[order], width * len(by_layer))


def auxk_of_layers(
    found: losses.Reconstruction,
    shares: Sequence[tuple[Tensor, Tensor, Tensor]],
    decoders: Sequence[Tensor],
    dead: Sequence[Tensor],
    k_aux: int,
) -> Tensor:
    """AuxK of each layer's dead features at the sites that they write to, a mean over layers.

    Args, by layer: shares have its input [batch, width], encoder rows and bias; decoders
    [features, last columns of what is written]; dead [features].
    """
    left, target = found.left_over(), found.batch.target
    every = []
    for (y, W, b), decoder, gone in zip(shares, decoders, dead, strict=True):
        own = slice(left.shape[1] - decoder.shape[1], None)
        term = losses.auxk(left[:, own], y, W, b, decoder, gone, k_aux, size=target[:, own])
        every.append(term)
    return torch.stack(every).mean()
