"""AbsTopK SAE: the k pre-activations of largest magnitude, with their signs (Zhu, Khalili and Zhu
2025, arXiv 2510.00404).

pre = W_enc^T (y - b_dec) + b_enc,   f = pre where |pre| is among the row's k largest, else 0
y_hat = f W_dec + b_dec,   loss = FVU + 1/32 AuxK

One feature stands for a direction and its opposite, so nothing is rectified. AuxK takes the dead
features of largest |pre|, with their signs.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from sae import kernels
from sae.architectures import register
from sae.architectures.topk import TopKFields, TopKSAE
from sae.core.base import SAEConfig
from sae.core.plain import Rule


@dataclass(frozen=True, kw_only=True)
class AbsTopKConfig(TopKFields):
    """Configuration of the AbsTopK architecture."""

    kind: Literal["abstopk"] = "abstopk"
    """Name of the architecture."""


@register
class AbsTopKSAE(TopKSAE):
    """Keeps the k pre-activations of largest magnitude of each token, signs and all."""

    Config: ClassVar[type[SAEConfig]] = AbsTopKConfig
    config: AbsTopKConfig  # type: ignore[assignment]

    plain_rules: ClassVar[tuple[Rule, ...]] = ("abstopk",)
    signed: ClassVar[bool] = True
    signed_auxk: ClassVar[bool] = True

    def top(self, centred: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k features of largest magnitude, signed: (index, value) [batch, k]."""
        return kernels.encode_topk(centred, self.W_enc_T, self.b_enc, k, signed=True)
