"""AbsTopK SAE: the k pre-activations of largest magnitude, with their signs (Zhu, Khalili and Zhu
2025, arXiv 2510.00404).

pre = W_enc^T (y - b_dec) + b_enc,   f = pre where |pre| is among the row's k largest, else 0
y_hat = f W_dec + b_dec,   loss = FVU + 1/32 AuxK

One feature stands for a direction and its opposite, so nothing is rectified. AuxK takes the dead
features of largest |pre|, with their signs.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sae import kernels, objectives
from sae.architectures import register
from sae.architectures._topk import TopKFamily, TopKFields
from sae.base import SAEConfig, TrainingState
from sae.batch import TrainingBatch
from sae.kernels.bags import topk_by_groups

_CHUNK_ELEMENTS = 2**23
"""pre-activations held at a time"""


@dataclass(frozen=True, kw_only=True)
class AbsTopKConfig(TopKFields):
    """Configuration of the AbsTopK architecture."""

    kind: Literal["abstopk"] = "abstopk"
    """Name of the architecture."""


def encode_by_magnitude(x: Tensor, W_enc_T: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k pre-activations of largest magnitude in each row, signed: (index, value) [batch, k].

    x [batch, d_in], W_enc_T [d_sae, d_in], b_enc [d_sae]. Differentiable in all three.
    """
    indices, values = [], []
    for chunk in x.split(max(1, _CHUNK_ELEMENTS // len(W_enc_T))):
        pre = kernels.preactivations(chunk, W_enc_T, b_enc)
        index = topk_by_groups(pre.abs(), k)[1]
        row_ptr = torch.arange(0, index.numel() + 1, k, device=x.device)
        value = kernels.encode_selected(chunk, W_enc_T, b_enc, row_ptr, index.reshape(-1), pre)
        indices.append(index)
        values.append(value.view(-1, k))
    return torch.cat(indices), torch.cat(values)


@register
class AbsTopKSAE(TopKFamily):
    """Keeps the k pre-activations of largest magnitude of each token, signs and all."""

    Config: ClassVar[type[SAEConfig]] = AbsTopKConfig
    config: AbsTopKConfig

    signed: ClassVar[bool] = True

    def top(self, centred: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k features of largest magnitude, signed: (index, value) [batch, k]."""
        return encode_by_magnitude(centred, self.W_enc_T, self.b_enc, k)

    def add_auxk(
        self,
        loss: Tensor,
        terms: dict[str, Tensor],
        batch: TrainingBatch,
        centred: Tensor,
        y_hat: Tensor,
        state: TrainingState,
    ) -> Tensor:
        """The loss with AuxK added, whose dead features keep their signs."""
        config = self.config
        if not config.auxk_coefficient:
            return loss
        error = self.left_over(batch, y_hat).detach()
        rows = state.dead.nonzero()[:, 0]
        term = error.new_zeros(())
        if len(rows):
            encoder, bias = self.W_enc_T.index_select(0, rows), self.b_enc.index_select(0, rows)
            k_aux = min(len(rows), self.k_aux)
            index, value = encode_by_magnitude(centred, encoder, bias, k_aux)
            row_ptr = torch.arange(0, index.numel() + 1, k_aux, device=index.device)
            decoder = self.W_dec.index_select(0, rows)
            e_hat = kernels.decode(row_ptr, index.reshape(-1), value.reshape(-1), decoder)
            term = objectives.unpredicted(error, e_hat)
        terms["auxk"] = term.detach()
        return loss + config.auxk_coefficient * term
