"""TopK SAE with AuxK (Gao et al. 2024, "Scaling and evaluating sparse autoencoders").

f = ReLU(TopK_k(W_enc^T (y - b_dec) + b_enc)),   y_hat = f W_dec + b_dec
loss = FVU + 1/32 AuxK
as options + 1/8 FVU at 4k (Multi-TopK, section 6.3 there), and k falling from k_start.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from sae.architectures import register
from sae.architectures._topk import TopKFamily, TopKFields
from sae.core.base import SAEConfig


@dataclass(frozen=True, kw_only=True)
class TopKConfig(TopKFields):
    """Configuration of the TopK architecture."""

    kind: Literal["topk"] = "topk"
    """Name of the architecture."""


@register
class TopKSAE(TopKFamily):
    """Keeps the k largest pre-activations of each token."""

    Config: ClassVar[type[SAEConfig]] = TopKConfig
    config: TopKConfig
    by_feature: ClassVar[tuple[str, ...]] = ("W_enc_T", "b_enc", "W_dec")
