"""ReLU SAE with an L1 penalty, or an Lp penalty whose p is annealed.

f = ReLU(W_enc^T (y - b_dec) + b_enc),   y_hat = f W_dec + b_dec
loss = FVU + lambda(t) * mean sum_i f_i / sigma                  plain, ||W_dec,i|| = 1
loss = FVU + lambda(t) * mean sum_i f_i ||W_dec,i|| / sigma      norm-weighted

with sigma^2 the data's variance. Bricken et al. 2023, "Towards Monosemanticity" (plain L1,
resampling); Anthropic, "Circuits Updates - April 2024" (norm-weighted); Karvonen et al. 2024,
"Measuring Progress in Dictionary Learning", section 3.2 (p-annealing).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from sae import kernels
from sae.architectures import register
from sae.architectures._l1 import L1SAE, L1Config
from sae.core.base import SAEConfig, TrainingOutput, TrainingState
from sae.core.batch import TrainingBatch
from sae.core.plain import Rule
from sae.distributed import ALL, FEATURES
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError, check_range

_SMOOTH = 1e-3
"""(w + this)^p has a bounded derivative at w = 0, in units of the data's standard deviation"""
_RESAMPLED_NORM = 0.2
"""norm of a resampled encoder row, over the mean of the living (Bricken et al. 2023)"""


@dataclass(frozen=True, kw_only=True)
class ReLUConfig(L1Config):
    """Configuration of the ReLU architecture."""

    kind: Literal["relu"] = "relu"
    """Name of the architecture."""
    decoder_norm_weighted: bool = True
    """Weight activations by their decoder norm and leave the norm free (April 2024 update); if
    false, the plain L1 with decoder rows held at unit norm."""
    p_start: float = 1.0
    """Exponent of the penalty sum_i f_i^p at first; 1 is L1."""
    p_end: float = 1.0
    """Exponent at the end; below p_start it is lowered in steps, and at each the coefficient is
    rescaled so that the penalty does not jump."""
    p_levels: int = 10
    """Steps in which the exponent is lowered."""
    p_from: float = 0.3
    """Fraction of the run after which the exponent is first lowered."""
    p_until: float = 1.0
    """Fraction of the run by which the exponent's last step is over."""
    resample_at: tuple[float, ...] = ()
    """Fractions of the run (0.25 0.5, say) after which dead features are started anew from badly
    reconstructed rows; dead are those that have not fired for the trainer's dead_after_tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("sae.p_start", self.p_start, above=0)
        check_range("sae.p_end", self.p_end, above=0, high=self.p_start)
        check_range("sae.p_levels", self.p_levels, low=1)
        check_range("sae.p_from", self.p_from, low=0, below=1)
        check_range("sae.p_until", self.p_until, above=self.p_from, high=1)
        for fraction in self.resample_at:
            check_range("sae.resample_at", fraction, above=0, below=1)

    @property
    def anneals(self) -> bool:
        """Whether the exponent changes."""
        return self.p_end < self.p_start

    def level(self, state: TrainingState) -> int:
        """How often the exponent has been lowered at a step, 0 to p_levels."""
        if not self.anneals:
            return 0
        width = (self.p_until - self.p_from) / self.p_levels
        fractions = (self.p_from + width * number for number in range(self.p_levels))
        return sum(state.step >= round(fraction * state.total_steps) for fraction in fractions)

    def exponent(self, level: int) -> float:
        """p after it has been lowered `level` times."""
        return self.p_start + (self.p_end - self.p_start) * level / self.p_levels


@register
class ReLUSAE(L1SAE):
    """Rectified pre-activations, kept sparse by a penalty on their sum."""

    Config: ClassVar[type[SAEConfig]] = ReLUConfig
    config: ReLUConfig
    by_feature: ClassVar[tuple[str, ...]] = ("W_enc_T", "b_enc", "W_dec")
    plain_rules: ClassVar[tuple[Rule, ...]] = ("relu",)
    anneal: Tensor

    def make_parameters(self) -> None:
        """Besides the parameters, where p is annealed: (the coefficient's factor, the level)."""
        super().make_parameters()
        if FEATURES.size > 1 and self.config.resample_at:
            raise InputError(
                "features cannot be started anew where processes share them out",
                where="sae.resample_at",
                given=self.config.resample_at,
                allowed="(), or ranks rows",
            )
        if self.config.anneals:
            self.register_buffer("anneal", torch.tensor([1.0, 0.0]))

    def _codes(self, centred: Tensor) -> SparseCodes:
        return SparseCodes(
            *kernels.encode_above(centred, self.W_enc_T, self.b_enc, 0.0), self.d_sae
        )

    def encode_normalised(self, y: Tensor) -> SparseCodes:
        """Codes of y [batch, d_in]: every positive pre-activation."""
        return self._codes(self.encoder_input(y))

    def training_output(self, batch: TrainingBatch, state: TrainingState) -> TrainingOutput:
        """FVU + lambda(t) * L1 (or Lp)."""
        codes = self._codes(self.centred(batch))
        found = self.reconstruct(codes, batch)
        weight = self.weighed(codes, batch)
        level = self.config.level(state)
        penalty = batch.mean(_power(weight, self.config.exponent(level)))
        if self.config.anneals:
            penalty = penalty * self._rescaled(weight.detach(), level)
        loss = found.loss + self.config.l1_weight(state) * penalty
        terms = {"fvu": found.loss.detach(), "l1": batch.mean(weight.detach())}
        if self.config.anneals:
            terms["lp"] = penalty.detach()
        return TrainingOutput(loss, terms, codes.counts(), found)

    def plain_parts(self) -> dict[str, Any]:
        """ReLU's rule, as other libraries know it."""
        return {"activation": "relu", "b_enc": self.b_enc}

    @torch.no_grad()
    def _rescaled(self, weight: Tensor, level: int) -> float:
        """The coefficient's factor; at a new level, such that this batch's penalty stays."""
        factor, last = self.anneal.tolist()
        if level > last:
            before = float(ALL.sum(_power(weight, self.config.exponent(int(last))).sum()))
            after = float(ALL.sum(_power(weight, self.config.exponent(level)).sum()))
            factor *= before / after if after > 0 else 1.0
            self.anneal.copy_(torch.tensor([factor, float(level)]))
        return float(self.anneal[0])

    def resamples(self, state: TrainingState) -> bool:
        """At the steps that `resample_at` names, if a feature is dead."""
        due = {max(1, round(fraction * state.total_steps)) for fraction in self.config.resample_at}
        return state.step + 1 in due and bool(state.dead.any())

    @torch.no_grad()
    def resample(self, batch: TrainingBatch, state: TrainingState) -> Tensor | None:
        """At the steps that `resample_at` names, start dead features anew (Bricken et al. 2023).

        Each takes one row, drawn without replacement with probability proportional to its squared
        loss: the decoder row is the row less b_dec at unit norm (where norms are free, at the
        living rows' mean norm), the encoder row points there at 0.2 of the living rows' mean norm,
        the bias is 0. Dead features beyond the rows that have a loss wait. Raises InputError
        without the run's generator.
        """
        if not self.resamples(state):
            return None
        if state.generator is None:
            raise InputError("needs the run's generator", where="TrainingState.generator")
        codes = self._codes(self.centred(batch))
        loss = batch.per_row(self.decode_normalised(codes, batch.y)).square()
        features = state.dead.nonzero()[: int((loss > 0).sum()), 0]
        if not len(features):
            return None
        drawn = torch.multinomial(loss.cpu(), len(features), generator=state.generator)
        drawn = drawn.to(loss.device)
        living = ~state.dead if not state.dead.all() else state.dead
        towards = functional.normalize(self.centred(batch)[drawn], dim=1)
        written = functional.normalize(batch.target[drawn] - self.b_dec, dim=1)
        if not self.unit_decoder:
            written = written * self.W_dec[living].norm(dim=1).mean()
        norm = self.W_enc_T.norm(dim=1)[living].mean()
        self.W_enc_T[features] = _RESAMPLED_NORM * norm * towards
        self.W_dec[features] = written
        self.b_enc[features] = 0
        return features


def _power(weight: Tensor, p: float) -> Tensor:
    """weight^p, smoothed at 0 unless p is 1; weight >= 0."""
    return weight if p == 1 else (weight + _SMOOTH).pow(p) - _SMOOTH**p
