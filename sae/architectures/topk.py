"""TopK SAE with AuxK (Gao et al. 2024, "Scaling and evaluating sparse autoencoders").

f = ReLU(TopK(W_enc^T (y - b_dec) + b_enc)),   y_hat = f W_dec + b_dec
loss = FVU + 1/32 AuxK
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sae import kernels, objectives
from sae.architectures import register
from sae.base import SAEConfig, SparseAutoencoder, TrainingOutput, TrainingState
from sae.codes import SparseCodes
from saescope.errors import InputError, check_range


@dataclass(frozen=True, kw_only=True)
class TopKConfig(SAEConfig):
    """Configuration of the TopK architecture."""

    kind: Literal["topk"] = "topk"
    """Name of the architecture."""
    k: int = 32
    """Features kept a token (L0)."""
    auxk_coefficient: float = 1 / 32
    """Weight of the AuxK loss; 0 turns it off."""
    k_aux: int | None = None
    """Dead features used by AuxK a token; half of d_in if not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("sae.k", self.k, low=1)
        if self.k > self.d_sae:
            raise InputError(
                "k exceeds the dictionary",
                where="sae.k",
                given=self.k,
                allowed=f"1 to {self.d_sae}",
            )
        check_range("sae.auxk_coefficient", self.auxk_coefficient, low=0)
        if self.k_aux is not None:
            check_range("sae.k_aux", self.k_aux, low=1)


@register
class TopKSAE(SparseAutoencoder):
    """Keeps the k largest pre-activations of each token."""

    Config: ClassVar[type[SAEConfig]] = TopKConfig
    config: TopKConfig

    def encode_normalised(self, y: Tensor) -> SparseCodes:
        """Codes of y [batch, d_in], 0 where fewer than k pre-activations are positive."""
        index, value = kernels.encode_topk(y - self.b_dec, self.W_enc_T, self.b_enc, self.config.k)
        return SparseCodes.from_fixed(index, value, self.d_sae)

    def training_output(self, y: Tensor, state: TrainingState) -> TrainingOutput:
        """FVU + coefficient * AuxK."""
        centred = y - self.b_dec
        index, value = kernels.encode_topk(centred, self.W_enc_T, self.b_enc, self.config.k)
        codes = SparseCodes.from_fixed(index, value, self.d_sae)
        y_hat = kernels.decode(codes.row_ptr, codes.index, codes.value, self.W_dec) + self.b_dec
        fvu = objectives.reconstruction(y, y_hat, self.normaliser.variance)
        terms, loss = {"fvu": fvu.detach()}, fvu
        if self.config.auxk_coefficient:
            auxk = objectives.auxk(
                y - y_hat,
                centred,
                self.W_enc_T,
                self.b_enc,
                self.W_dec,
                state.dead,
                self.config.k_aux or max(1, self.d_in // 2),
            )
            terms["auxk"] = auxk.detach()
            loss = fvu + self.config.auxk_coefficient * auxk
        fired = torch.zeros(self.d_sae, dtype=torch.bool, device=y.device)
        fired[codes.index[codes.value > 0]] = True
        return TrainingOutput(loss, terms, fired)

    @torch.no_grad()
    def start(self, y: Tensor) -> None:
        """b_dec at the geometric median of the data."""
        self.b_dec.copy_(objectives.geometric_median(y))

    def before_step(self) -> None:
        """Only directions count: the decoder's rows keep unit norm."""
        self.project_decoder_gradient()

    def after_step(self) -> None:
        """Undo the norm that a finite step adds."""
        self.normalise_decoder()
