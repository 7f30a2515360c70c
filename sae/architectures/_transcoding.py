"""What transcoders share: the features of one site predict another.

    f = act(W_enc^T y + b_enc),   t_hat = f W_dec + b_dec

y is the activation of the input site, t that of the output site, each at its own normaliser's
scale; act is TopK (Paulo et al. 2025, section 2), ReLU under an L1 penalty (Dunefsky et al. 2024,
section 3.1), or JumpReLU (Lieberum et al. 2024, section 3.1; its penalties are in `_jumping`).
    TopK:      loss = FVU of t + 1/32 AuxK
    ReLU:      loss = FVU of t + lambda(t) * mean sum_i f_i ||W_dec,i||
    JumpReLU:  loss = FVU of t + lambda(t) * S + mu * pre-activation loss of dead features
The weighting by the decoder's norm, which is left free, makes the second, and the third under its
tanh penalty, the same whatever the scale that a feature takes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn

from sae import kernels
from sae.architectures._auxk import AuxKConfig, AuxKSAE
from sae.architectures._jumping import (
    JumpingConfig,
    calibrated,
    jump,
    penalty_of,
    shortfall,
)
from sae.architectures._l1 import L1WeightConfig
from sae.core import losses
from sae.core.base import TrainingOutput, TrainingState
from sae.core.batch import TrainingBatch
from sae.core.plain import Rule
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError, check_choice, check_range

Activation = Literal["topk", "relu", "jumprelu"]


@dataclass(frozen=True, kw_only=True)
class TranscodingConfig(AuxKConfig, L1WeightConfig, JumpingConfig):
    """The fields of transcoders; those of AuxK are for activation topk, those of the L1 penalty
    for relu, those of thresholds and of what they are penalised by for jumprelu."""

    activation: Activation = "topk"
    """Which features fire: topk (the k largest), relu (all above 0, kept few by an L1 penalty), or
    jumprelu (all above learnt thresholds, kept few by `penalty`)."""
    k: int = 32
    """Features kept a token (L0), with activation topk."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("no such activation", "sae.activation", self.activation, get_args(Activation))
        check_range("sae.k", self.k, low=1)
        if self.activation == "topk":
            check_range("sae.k", self.k, low=1, high=self.d_sae)

    @property
    def penalty_warmup(self) -> float:
        """Of the penalty that the activation has."""
        return self.l0_warmup_fraction if self.activation == "jumprelu" else self.l1_warmup_fraction

    def with_target_l0(self, target: float) -> Self:
        """The same with k, or the L0 that thresholds are brought to, at `target`.

        Unchanged where the penalty alone sets the L0.
        """
        if self.activation == "jumprelu":
            return replace(self, calibrated_l0=target)
        return super().with_target_l0(target) if self.activation == "topk" else self


class Transcoding(AuxKSAE):
    """Reads one site, predicts another; subclasses may add what else predicts it."""

    transcodes: ClassVar[bool] = True
    pre_bias: ClassVar[bool] = False
    unit_decoder: ClassVar[bool] = False
    feature_units: ClassVar[tuple[str, ...]] = ("b_enc", "threshold")
    full_precision: ClassVar[tuple[str, ...]] = ("threshold",)
    plain_rules: ClassVar[tuple[Rule, ...]] = ("topk", "relu", "jumprelu")

    @property
    def rule(self) -> TranscodingConfig:
        """The configuration, by the fields that all transcoders have."""
        return cast(TranscodingConfig, self.config)

    @property
    def penalised(self) -> bool:  # type: ignore[override]
        """With ReLU and JumpReLU, sparsity comes from a penalty."""
        return self.rule.activation != "topk"

    def make_parameters(self) -> None:
        """W_enc_T, b_enc, W_dec, b_dec, and the thresholds of JumpReLU, float32 [d_sae]."""
        super().make_parameters()
        if self.rule.activation == "jumprelu":
            self.threshold = nn.Parameter(torch.zeros(self.d_sae))

    @property
    def theta(self) -> Tensor:
        """JumpReLU's thresholds [d_sae], at least float32, not negative; differentiable."""
        return self.threshold.clamp_min(0)

    def _unit_in(self) -> float:
        """The deviation of one coordinate of the input, at its normaliser's scale."""
        return (self.normaliser.variance / self.d_in) ** 0.5

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Encoder rows uniform on the unit sphere; W_dec 0 (Paulo et al. 2025), biases 0.

        Thresholds are for an input of unit variance, until `start` knows better.

        Nothing relates the output's space to the encoder's at first, so no start but the mean of
        the output is better than chance.
        """
        nn.init.normal_(self.W_enc_T)
        self.W_enc_T.div_(self.W_enc_T.norm(dim=1, keepdim=True))
        for zero in (self.b_enc, self.W_dec, self.b_dec):
            nn.init.zeros_(zero)
        if self.rule.activation == "jumprelu":
            self.threshold.fill_(self.rule.initial_threshold * self.d_in**-0.5)

    @torch.no_grad()
    def start(self, batch: TrainingBatch) -> None:
        """b_dec at the mean of the target (Paulo et al. 2025); pre-activations of mean 0; first
        thresholds.

        Without a pre-encoder bias the mean of the input would choose the same few features on every
        row; b_enc takes it away. Raises InputError for a normaliser that transcoders cannot have.
        """
        if self.normaliser.kind == "standardised":
            raise InputError(
                "an input's own deviation says nothing of the output's",
                where="normaliser",
                given="standardised",
                allowed="none, unit_mean_square, sqrt_d, centred",
            )
        self.b_dec.copy_(batch.target.mean(0))
        self.b_enc.copy_(-(self.W_enc_T * batch.y.mean(0)).sum(1))
        if self.rule.activation == "jumprelu":
            self.threshold.fill_(self.rule.initial_threshold * self._unit_in())

    @torch.no_grad()
    def constrain(self) -> None:
        """Thresholds do not go below 0."""
        if self.rule.activation == "jumprelu":
            self.threshold.clamp_(min=0)

    @torch.no_grad()
    def calibrate(self, rows: Callable[[], Iterable[Tensor]]) -> None:
        """Bring JumpReLU's thresholds by one factor to the L0 of `calibrated_l0`, if given."""
        target = self.rule.calibrated_l0
        if self.rule.activation == "jumprelu" and target is not None:
            self.threshold.copy_(calibrated(self, self.theta, rows, target))

    def _codes(self, y: Tensor) -> SparseCodes:
        if self.rule.activation == "topk":
            index, value = kernels.encode_topk(y, self.W_enc_T, self.b_enc, self.rule.k)
            return SparseCodes.from_fixed(index, value, self.d_sae)
        bar = self.theta.detach() if self.rule.activation == "jumprelu" else 0.0
        return SparseCodes(*kernels.encode_above(y, self.W_enc_T, self.b_enc, bar), self.d_sae)

    def encode_normalised(self, y: Tensor) -> SparseCodes:
        """Codes of the input site's y [batch, d_in]."""
        return self._codes(y)

    def plain_parts(self) -> dict[str, Any]:
        """The rule of its activation, of a transcoder."""
        rule = self.rule.activation
        fields: dict[str, Any] = {"activation": rule, "transcoder": True, "b_enc": self.b_enc}
        if rule == "topk":
            fields["k"] = self.rule.k
        if rule == "jumprelu":
            fields["threshold"] = self.theta
        return fields

    def training_output(self, batch: TrainingBatch, state: TrainingState) -> TrainingOutput:
        """FVU of the target, with AuxK, with the L1 penalty, or with JumpReLU's."""
        config = self.rule
        if config.activation == "jumprelu":
            return self._jumping_output(batch, state)
        codes = self._codes(batch.y)
        found = self.reconstruct(codes, batch)
        loss, terms = found.loss, {"fvu": found.loss.detach()}
        if config.activation == "topk":
            loss = self.add_auxk(loss, terms, batch.y, found, state)
        else:
            weighted = codes.value * losses.row_norms(self.W_dec).index_select(0, codes.index)
            penalty = batch.mean(weighted) / batch.variance**0.5
            loss = loss + config.l1_weight(state) * penalty
            terms["l1"] = penalty.detach()
        return TrainingOutput(loss, terms, codes.counts(), found)

    def _jumping_output(self, batch: TrainingBatch, state: TrainingState) -> TrainingOutput:
        config, y, theta = self.rule, batch.y, self.theta
        eps = config.bandwidth * self._unit_in()
        jumped = jump(y, self.W_enc_T, self.b_enc, theta, eps)
        found = self.reconstruct(jumped.codes, batch, jumped.silent)
        norms = losses.row_norms(self.W_dec)
        penalty = penalty_of(jumped, config, batch, norms, self.d_in)
        loss = found.loss + config.l0_weight(state) * penalty
        terms = {"fvu": found.loss.detach(), "sparsity": penalty.detach()}
        if config.pre_act_coefficient:
            short = shortfall(y, self.W_enc_T, self.b_enc, theta, jumped.excess, state.dead)
            unit_out = (batch.variance / self.d_out) ** 0.5
            lifted = batch.mean(short * norms[state.dead]) / (unit_out * self.d_in)
            loss = loss + config.pre_act_coefficient * lifted
            terms["pre_act"] = lifted.detach()
        return TrainingOutput(loss, terms, jumped.codes.counts(), found)
