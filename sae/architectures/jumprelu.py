"""JumpReLU SAE (Rajamanoharan et al. 2024, "Jumping Ahead"; Gemma Scope, Lieberum et al. 2024).

z = W_enc^T (y - b_dec) + b_enc,   f_i = z_i where z_i > theta_i, else 0,   y_hat = f W_dec + b_dec

loss = FVU + lambda(t) * S, with one of
    step        S = mean_batch sum_i H(z_i - theta_i) / d_in                    Jumping Ahead, eq. 9
    tanh        S = mean_batch sum_i tanh(c f_i ||W_dec,i|| / s) / d_in         Anthropic, Jan. 2025
    quadratic   S = (L0 / L0_target - 1)^2, L0 = mean_batch sum_i H(z_i - theta_i)
to which frequency_scale adds sum_i f_i^2 / (f_0 d_in), f_i = mean_batch H(z_i - theta_i), against
features that fire often. With "step" that is the quadratic-frequency penalty of Rajamanoharan et
al. (2025; see _frequency.py). With "quadratic" it is a second penalty beside that on L0, as Gemma
Scope 2 has one (section 2.3), whose exact form that paper does not print.
And, for dead features, mu * mean_batch sum_dead ReLU(theta_i - z_i) ||W_dec,i|| / (s d_in)

Units. s = sqrt(variance / d_in) is the deviation of one coordinate of the data, and of the
pre-activations of a random direction. Bandwidth, first threshold and c count in it, so that they
mean the same at every normaliser; it is 1 for data of mean norm sqrt(d_in), where all constants
are those of SAELens and Anthropic. A published lambda beside the squared error of data of unit mean
square (Gemma Scope: 6e-4 for L0 about 50) is l0_coefficient * variance / d_in.

Decoder rows keep unit norm. That loses nothing: scale moved between f and its row, theta moving
with it, changes none of these losses.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from sae import kernels
from sae.architectures import register
from sae.architectures._frequency import squared_frequencies
from sae.architectures._jumping import calibrated, jump, shortfall
from sae.core import losses
from sae.core.base import SAEConfig, SparseAutoencoder, TrainingOutput, TrainingState
from sae.core.batch import TrainingBatch
from sae.core.plain import Rule
from sae.kernels.codes import SparseCodes
from saescope.errors import check_range


@dataclass(frozen=True, kw_only=True)
class JumpReLUConfig(SAEConfig):
    """Configuration of the JumpReLU architecture."""

    kind: Literal["jumprelu"] = "jumprelu"
    """Name of the architecture."""
    penalty: Literal["step", "tanh", "quadratic"] = "step"
    """What is penalised: the number of active features, a smooth stand-in for it that also moves
    the encoder, or that number's distance from l0_target."""
    l0_coefficient: float = 0.3
    """Weight of the penalty, beside an FVU of at most about 1. step and tanh: the FVU that d_in
    active features must be worth; quadratic: what no active feature costs."""
    l0_warmup_fraction: float = 0.1
    """Fraction of training over which the penalty grows from 0 to its weight."""
    l0_target: float = 32.0
    """quadratic: the mean number of active features to reach."""
    frequency_scale: float | None = None
    """f_0, the fraction of rows from which on a feature costs more for firing more often than L0
    alone says, such as 0.1; smaller presses harder. None: no feature does. Frequencies are of a
    batch (with trainer.accumulate, of each part), which has to be many times 1 / f_0 rows."""
    tanh_scale: float = 4.0
    """tanh: c, per deviation of one coordinate."""
    parametrisation: Literal["theta", "log"] = "theta"
    """What the optimiser moves: the thresholds, or their logarithms (as the paper does; slow to
    rise in a short run)."""
    initial_threshold: float = 1.0
    """First threshold, in deviations of one coordinate, sqrt(variance / d_in). From half the
    bandwidth on, the bands begin above 0."""
    bandwidth: float = 2.0
    """Width about a threshold in which activations move it, in deviations of one coordinate. Too
    small, few do and thresholds wander; too large, they settle in the wrong place."""
    calibrated_l0: float | None = None
    """Mean L0 that all thresholds are brought to by one factor, on held-out rows at the end of
    training; trainer.target_l0 sets it."""
    pre_act_coefficient: float = 3e-6
    """Weight of the penalty that lifts the pre-activations of dead features; 0 turns it off. The
    published 3e-6 is for long runs: in one of 341 steps at L0 16 on the default harvest 41% of the
    features were dead at the end, with 3e-3 2%, for 1% more FVU (docs/reports/pareto.md)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("l0_coefficient", "pre_act_coefficient"):
            check_range(f"sae.{name}", getattr(self, name), low=0)
        for name in ("l0_target", "tanh_scale", "initial_threshold", "bandwidth"):
            check_range(f"sae.{name}", getattr(self, name), above=0)
        check_range("sae.l0_warmup_fraction", self.l0_warmup_fraction, low=0, high=1)
        if self.frequency_scale is not None:
            check_range("sae.frequency_scale", self.frequency_scale, above=0)
        if self.calibrated_l0 is not None:
            check_range("sae.calibrated_l0", self.calibrated_l0, above=0, high=self.d_sae)

    @property
    def penalty_warmup(self) -> float:
        """Of the L0 penalty."""
        return self.l0_warmup_fraction

    def with_target_l0(self, target: float) -> Self:
        """The same configuration for a mean L0 of `target`; the quadratic penalty aims at it."""
        aimed = target if self.penalty == "quadratic" else self.l0_target
        return replace(self, l0_target=aimed, calibrated_l0=target)


@register
class JumpReLUSAE(SparseAutoencoder):
    """Pre-activations above their feature's learnt threshold.

    The thresholds are never held in less than float32, whatever the other weights are.
    """

    Config: ClassVar[type[SAEConfig]] = JumpReLUConfig
    config: JumpReLUConfig
    by_feature: ClassVar[tuple[str, ...]] = (
        "W_enc_T",
        "b_enc",
        "W_dec",
        "threshold",
        "log_threshold",
    )
    penalised: ClassVar[bool] = True
    feature_units: ClassVar[tuple[str, ...]] = ("b_enc", "threshold")
    full_precision: ClassVar[tuple[str, ...]] = ("threshold", "log_threshold")
    plain_rules: ClassVar[tuple[Rule, ...]] = ("jumprelu",)
    threshold: nn.Parameter
    log_threshold: nn.Parameter

    def make_parameters(self) -> None:
        """Besides the usual ones: threshold [d_sae], or log_threshold [d_sae]."""
        super().make_parameters()
        setattr(self, self._stored, nn.Parameter(torch.empty(self.d_sae)))

    @property
    def _stored(self) -> str:
        return "log_threshold" if self.config.parametrisation == "log" else "threshold"

    @property
    def theta(self) -> Tensor:
        """Thresholds [d_sae], at least float32, not negative; differentiable in what is stored."""
        stored = getattr(self, self._stored)
        return stored.exp() if self.config.parametrisation == "log" else stored.clamp_min(0)

    def reset_parameters(self) -> None:
        """As every SAE; thresholds for data of unit variance, until `start` knows better."""
        super().reset_parameters()
        self._set_thresholds(variance=1.0)

    def start(self, batch: TrainingBatch) -> None:
        """b_dec at the median, thresholds by the data's variance."""
        super().start(batch)
        self._set_thresholds(batch.variance)

    @torch.no_grad()
    def _set_thresholds(self, variance: float) -> None:
        theta = self.config.initial_threshold * self._unit(variance)
        value = math.log(theta) if self.config.parametrisation == "log" else theta
        getattr(self, self._stored).fill_(value)

    def _unit(self, variance: float) -> float:
        """s, the deviation of one coordinate of the data."""
        return (variance / self.d_in) ** 0.5

    @torch.no_grad()
    def constrain(self) -> None:
        """Thresholds do not go below 0."""
        if self.config.parametrisation == "theta":
            self.threshold.clamp_(min=0)

    def plain_parts(self) -> dict[str, Any]:
        """JumpReLU's rule, as other libraries know it."""
        return {"activation": "jumprelu", "threshold": self.theta, "b_enc": self.b_enc}

    def fold_parameters(self, feature_scale: float) -> None:
        """A threshold divided is its logarithm shifted."""
        if self.config.parametrisation == "log":
            self.log_threshold.sub_(math.log(feature_scale))

    @torch.no_grad()
    def calibrate(self, rows: Callable[[], Iterable[Tensor]]) -> None:
        """Bring all thresholds by one factor to where the mean L0 is `calibrated_l0`, if given.

        Where fewer pre-activations than that are positive the factor is 0, which comes nearest.
        """
        if self.config.calibrated_l0 is None:
            return
        scaled = calibrated(self, self.theta, rows, self.config.calibrated_l0)
        if self.config.parametrisation == "log":
            self.log_threshold.copy_(scaled.clamp_min(torch.finfo(scaled.dtype).tiny).log())
        else:
            self.threshold.copy_(scaled)

    def encode_normalised(self, y: Tensor) -> SparseCodes:
        """Codes of y [batch, d_in]: the pre-activations above their thresholds."""
        above = kernels.encode_above(
            self.encoder_input(y), self.W_enc_T, self.b_enc, self.theta.detach()
        )
        return SparseCodes(*above, self.d_sae)

    def training_output(self, batch: TrainingBatch, state: TrainingState) -> TrainingOutput:
        """FVU + lambda(t) * sparsity penalty + pre-activation loss of dead features."""
        config = self.config
        unit = self._unit(batch.variance)
        eps = config.bandwidth * unit
        centred, theta = self.centred(batch), self.theta
        jumped = jump(centred, self.W_enc_T, self.b_enc, theta, eps)
        codes, active = jumped.codes, jumped.active
        found = self.reconstruct(codes, batch, jumped.silent)
        if config.penalty == "tanh":
            scale = config.tanh_scale / unit * losses.row_norms(self.W_dec)
            counted = batch.mean(torch.tanh(jumped.strengths(scale)))
        else:
            counted = batch.mean(active)
        if config.penalty == "quadratic":
            penalty = (counted / config.l0_target - 1).square()
        else:
            penalty = counted / self.d_in
        weight = config.l0_coefficient * state.ramp(config.l0_warmup_fraction) * state.penalty
        loss = found.loss + weight * penalty
        terms = {"fvu": found.loss.detach(), "sparsity": penalty.detach()}
        if config.frequency_scale is not None:
            squared = squared_frequencies(active, jumped.features, self.d_sae, batch.total)
            frequent = squared / (config.frequency_scale * self.d_in)
            loss = loss + weight * frequent
            terms["frequency"] = frequent.detach()
        if config.pre_act_coefficient:
            short = shortfall(centred, self.W_enc_T, self.b_enc, theta, jumped.excess, state.dead)
            norms = losses.rows_of(self.W_dec, state.dead.nonzero()[:, 0]).norm(dim=1)
            short = batch.mean(short * norms) / (unit * self.d_in)
            loss = loss + config.pre_act_coefficient * short
            terms["pre_act"] = short.detach()
        return TrainingOutput(loss, terms, codes.counts(), found)
