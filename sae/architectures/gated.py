"""Gated SAE (Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated SAEs").

One set of encoder weights, scaled by exp(r_mag), serves two purposes: whether a feature fires, and
how strongly. Only the first is penalised, so magnitudes do not shrink.

pi_gate = W_enc^T (y - b_dec) + b_gate,   pi_mag = exp(r_mag) W_enc^T (y - b_dec) + b_mag
f = H(pi_gate) ReLU(pi_mag),   y_hat = f W_dec + b_dec
loss = FVU + lambda(t) * mean sum_i ReLU(pi_gate,i) / sigma
     + FVU of the frozen decoder's ReLU(pi_gate) sg(W_dec) + sg(b_dec)

(section 3.2, eq. 8; sg stops gradients, sigma^2 is the data's variance). H gives no gradient: the
gate learns from the last two terms. b_dec still learns from both through the encoder's input.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sae import kernels
from sae.architectures import register
from sae.architectures._l1 import L1SAE, L1Config
from sae.core import losses
from sae.core.base import SAEConfig, TrainingOutput, TrainingState
from sae.core.batch import TrainingBatch
from sae.core.plain import Rule
from sae.distributed import normal_rows_
from sae.kernels.codes import SparseCodes


@dataclass(frozen=True, kw_only=True)
class GatedConfig(L1Config):
    """Configuration of the gated architecture."""

    kind: Literal["gated"] = "gated"
    """Name of the architecture."""
    l1_coefficient: float = 0.3
    """Weight of the L1 penalty on the gates, beside two FVU terms; in the same units as relu's,
    but magnitudes do not shrink under it, so it may be larger."""


@register
class GatedSAE(L1SAE):
    """Features that fire where their gate opens, as strongly as their magnitude says."""

    Config: ClassVar[type[SAEConfig]] = GatedConfig
    config: GatedConfig
    by_feature: ClassVar[tuple[str, ...]] = ("W_enc_T", "W_dec", "b_gate", "b_mag", "r_mag")
    feature_units: ClassVar[tuple[str, ...]] = ("b_gate", "b_mag")
    plain_rules: ClassVar[tuple[Rule, ...]] = ("gated",)

    def make_parameters(self) -> None:
        """W_enc_T, W_dec, b_dec, and b_gate, b_mag, r_mag [d_sae]; there is no b_enc."""
        self.W_enc_T = nn.Parameter(torch.empty(self.d_sae, self.d_in))
        self.b_gate = nn.Parameter(torch.zeros(self.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(self.d_sae))
        self.r_mag = nn.Parameter(torch.zeros(self.d_sae))
        self.W_dec = nn.Parameter(torch.empty(self.d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))

    def encoder_bias(self) -> None:
        """None: gates and magnitudes have a bias each."""

    def plain_parts(self) -> dict[str, Any]:
        """The gated rule, as other libraries know it."""
        biases = {"b_gate": self.b_gate, "b_mag": self.b_mag, "r_mag": self.r_mag}
        return {"activation": "gated", **biases}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Decoder rows uniform on the unit sphere, W_enc = W_dec^T, biases and r_mag 0."""
        normal_rows_(self.W_dec, self.config.d_sae)
        self.normalise_decoder()
        self.W_enc_T.copy_(self.W_dec)
        for each in (self.b_gate, self.b_mag, self.r_mag, self.b_dec):
            nn.init.zeros_(each)

    def _open(self, centred: Tensor) -> SparseCodes:
        """W_enc^T (y - b_dec) where the gate is open; f may still be 0 there."""
        # pi_gate > 0 by comparison alone: the product, without a bias, serves the magnitudes too
        opened = kernels.encode_above(centred, self.W_enc_T, None, -self.b_gate.detach())
        return SparseCodes(*opened, self.d_sae)

    def _magnitudes(self, opened: SparseCodes) -> SparseCodes:
        index = opened.index
        scale, bias = self.r_mag.exp().index_select(0, index), self.b_mag.index_select(0, index)
        value = torch.relu(scale * opened.value + bias)
        return SparseCodes(opened.row_ptr, index, value, self.d_sae)

    def encode_normalised(self, y: Tensor) -> SparseCodes:
        """Codes of y [batch, d_in], 0 where a gate is open but the magnitude is not positive."""
        return self._magnitudes(self._open(self.encoder_input(y)))

    def training_output(self, batch: TrainingBatch, state: TrainingState) -> TrainingOutput:
        """FVU + lambda(t) * L1 of the gates + FVU of the gates through the frozen decoder."""
        opened = self._open(self.centred(batch))
        codes = self._magnitudes(opened)
        found = self.reconstruct(codes, batch)
        gate = opened.value + self.b_gate.index_select(0, opened.index)
        gates = SparseCodes(opened.row_ptr, opened.index, gate, self.d_sae)
        penalty = batch.mean(self.weighed(gates, batch))
        frozen = self.W_dec.detach(), self.b_dec.detach()
        auxiliary = losses.reconstruct(gates, batch, *frozen).loss
        loss = found.loss + self.config.l1_weight(state) * penalty + auxiliary
        terms = {
            "fvu": found.loss.detach(),
            "l1": penalty.detach(),
            "auxiliary": auxiliary.detach(),
        }
        return TrainingOutput(loss, terms, codes.counts(), found)
