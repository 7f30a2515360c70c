"""ReLU SAE with an L1 penalty (Bricken et al. 2023; Anthropic's April 2024 update).

f = ReLU(W_enc^T (y - b_dec) + b_enc),   y_hat = f W_dec + b_dec
loss = FVU + lambda(t) * mean sum_i f_i ||W_dec,i||
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from sae import objectives
from sae.architectures import register
from sae.base import SAEConfig, SparseAutoencoder, TrainingOutput, TrainingState
from sae.codes import SparseCodes
from saescope.errors import check_range

_CHUNK_ELEMENTS = 2**23


@dataclass(frozen=True, kw_only=True)
class ReLUConfig(SAEConfig):
    """Configuration of the ReLU architecture."""

    kind: Literal["relu"] = "relu"
    """Name of the architecture."""
    l1_coefficient: float = 0.1
    """Weight of the L1 penalty, beside an FVU of at most about 1."""
    l1_warmup_fraction: float = 0.05
    """Part of training over which the penalty grows from 0 to its weight."""
    decoder_norm_weighted: bool = True
    """Weight activations by their decoder norm and leave the norm free (April 2024 update); if
    false, the plain L1 with decoder rows held at unit norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("sae.l1_coefficient", self.l1_coefficient, low=0)
        check_range("sae.l1_warmup_fraction", self.l1_warmup_fraction, low=0, high=1)


@register
class ReLUSAE(SparseAutoencoder):
    """Rectified pre-activations, kept sparse by a penalty on their sum."""

    Config: ClassVar[type[SAEConfig]] = ReLUConfig
    config: ReLUConfig

    def _activations(self, y: Tensor) -> Tensor:
        return torch.relu(functional.linear(y - self.b_dec, self.W_enc_T, self.b_enc))

    def encode_normalised(self, y: Tensor) -> SparseCodes:
        """Codes of y [batch, d_in], by chunks, so that [batch, d_sae] never exists whole."""
        rows = max(1, _CHUNK_ELEMENTS // self.d_sae)
        parts = [SparseCodes.from_dense(self._activations(chunk)) for chunk in y.split(rows)]
        return SparseCodes.concatenate(parts)

    def training_output(self, y: Tensor, state: TrainingState) -> TrainingOutput:
        """FVU + lambda(t) * L1; dense, because most features fire early in training."""
        activations = self._activations(y)
        y_hat = activations @ self.W_dec + self.b_dec
        fvu = objectives.reconstruction(y, y_hat, self.normaliser.variance)
        norm = self.W_dec.norm(dim=1) if self.config.decoder_norm_weighted else None
        penalty = objectives.l1(activations, norm) / self.normaliser.variance**0.5
        warmup = self.config.l1_warmup_fraction * state.total_steps
        ramp = min(1.0, (state.step + 1) / warmup) if warmup else 1.0
        loss = fvu + ramp * self.config.l1_coefficient * penalty
        fired = (activations.detach() > 0).any(0)
        return TrainingOutput(loss, {"fvu": fvu.detach(), "l1": penalty.detach()}, fired)

    @torch.no_grad()
    def start(self, y: Tensor) -> None:
        """b_dec at the geometric median of the data."""
        self.b_dec.copy_(objectives.geometric_median(y))

    def before_step(self) -> None:
        """With the plain L1 the decoder's rows keep unit norm."""
        if not self.config.decoder_norm_weighted:
            self.project_decoder_gradient()

    def after_step(self) -> None:
        """Undo the norm that a finite step adds, under the plain L1."""
        if not self.config.decoder_norm_weighted:
            self.normalise_decoder()
