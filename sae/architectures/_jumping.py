"""JumpReLU with learnt thresholds: what the architectures share that can be trained with it.

    f_i = z_i where z_i > theta_i, else 0

    tanh   S = mean_batch sum_i tanh(c f_i ||W_dec,i|| / s_out) / d_in      Ameisen et al. 2025
    step   S = mean_batch sum_i H(z_i - theta_i) / d_in             Rajamanoharan et al. 2024

and, for dead features, mean_batch sum_dead ReLU(theta_i - z_i) ||W_dec,i|| / (s_out d_in).

Units. s_in = sqrt(variance of the input / d_in) is the deviation of one coordinate of what is read,
and of the pre-activations of a random direction: bandwidths and first thresholds count in it. s_out
is that of what is written: a contribution f_i W_dec,i counts in it, so that neither the scale of a
site, nor that of a feature against its decoder row, changes what a coefficient means.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sae import kernels
from sae.architectures._ste import jump_relu, step
from sae.architectures._thresholds import calibrated_threshold
from sae.core import losses
from sae.core.base import SAEConfig, SparseAutoencoder, TrainingState
from sae.core.batch import TrainingBatch
from sae.core.config import ADDED
from sae.distributed import FEATURES
from sae.kernels.codes import SparseCodes
from saescope.errors import check_choice, check_range

Penalty = Literal["tanh", "step"]


_NEW = {ADDED: True}
"""configurations from before transcoders could be trained so have none of these"""


@dataclass(frozen=True, kw_only=True)
class JumpingConfig(SAEConfig):
    """The fields of JumpReLU, of architectures that have other activations too."""

    penalty: Penalty = field(default="tanh", metadata=_NEW)
    """jumprelu: what is penalised: tanh (a smooth stand-in for the number of active features that
    also moves the encoder and counts decoder norms) or step (that number)."""
    l0_coefficient: float = field(default=0.3, metadata=_NEW)
    """jumprelu: weight of the penalty, the FVU that d_in active features must be worth."""
    l0_warmup_fraction: float = field(default=0.1, metadata=_NEW)
    """jumprelu: fraction of training over which the penalty grows from 0 to its weight."""
    tanh_scale: float = field(default=4.0, metadata=_NEW)
    """jumprelu: c of the tanh penalty, per deviation of one coordinate of what is written."""
    initial_threshold: float = field(default=1.0, metadata=_NEW)
    """jumprelu: first threshold, in deviations of one coordinate of what is read."""
    bandwidth: float = field(default=2.0, metadata=_NEW)
    """jumprelu: width about a threshold in which activations move it, in deviations of one
    coordinate of what is read."""
    calibrated_l0: float | None = field(default=None, metadata=_NEW)
    """jumprelu: mean L0 that all thresholds are brought to by one factor, on held-out rows at the
    end of training; trainer.target_l0 sets it."""
    pre_act_coefficient: float = field(default=3e-6, metadata=_NEW)
    """jumprelu: weight of the penalty that lifts the pre-activations of dead features; 0 turns it
    off. The published 3e-6 is for long runs; in short ones 3e-3 leaves fewer features dead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("no such penalty", "sae.penalty", self.penalty, get_args(Penalty))
        for name in ("l0_coefficient", "pre_act_coefficient"):
            check_range(f"sae.{name}", getattr(self, name), low=0)
        for name in ("tanh_scale", "initial_threshold", "bandwidth"):
            check_range(f"sae.{name}", getattr(self, name), above=0)
        check_range("sae.l0_warmup_fraction", self.l0_warmup_fraction, low=0, high=1)
        if self.calibrated_l0 is not None:
            check_range("sae.calibrated_l0", self.calibrated_l0, above=0, high=self.d_sae)

    def l0_weight(self, state: TrainingState) -> float:
        """lambda at this step: warmed up, and moved by the trainer's controller."""
        return self.l0_coefficient * state.ramp(self.l0_warmup_fraction) * state.penalty


class Jumped(NamedTuple):
    """What JumpReLU makes of a batch, with the gradients of thresholds."""

    codes: SparseCodes
    """entries above their thresholds"""
    silent: SparseCodes
    """entries just below, with values of 0 that only thresholds have a gradient of"""
    active: Tensor
    """H(z - theta) of the entries of codes, then of silent: 1 and 0"""
    excess: SparseCodes
    """z - theta of the entries of codes"""

    @property
    def features(self) -> Tensor:
        """Feature of each of `active`."""
        return torch.cat([self.codes.index, self.silent.index])

    def strengths(self, weight: Tensor) -> Tensor:
        """Values times their feature's weight [d_sae], of the entries of codes, then of silent."""
        pair = (self.codes, self.silent)
        return torch.cat([each.value * weight.index_select(0, each.index) for each in pair])


def jump(y: Tensor, W_enc_T: Tensor, b_enc: Tensor, theta: Tensor, eps: float) -> Jumped:
    """JumpReLU of rows y [batch, d_in] at thresholds theta [d_sae], with band width eps."""
    both = near(y, W_enc_T, b_enc, theta.detach(), eps)
    owns = [theta.index_select(0, each.index) for each in both]
    codes, silent = (
        replace(each, value=jump_relu(each.value, own, eps))
        for each, own in zip(both, owns, strict=True)
    )
    active = torch.cat([step(e.value, own, eps) for e, own in zip(both, owns, strict=True)])
    above, own = both[0], owns[0]
    return Jumped(codes, silent, active, replace(above, value=above.value - own))


def near(
    y: Tensor, W_enc_T: Tensor, b_enc: Tensor, theta: Tensor, eps: float
) -> tuple[SparseCodes, SparseCodes]:
    """Pre-activations above their thresholds; those just below, which thresholds feel too.

    The latter are often many more; their activations are 0, so they have no gradient in z.
    """
    d_sae = len(W_enc_T)
    with torch.no_grad():
        reach = kernels.encode_above(y, W_enc_T, b_enc, theta - eps / 2)
        found = SparseCodes(*reach, d_sae)
        active = found.value > theta.index_select(0, found.index)
        above, below = found.select(active), found.select(~active)
    z = kernels.encode_selected(y, W_enc_T, b_enc, above.row_ptr, above.index, known=above.value)
    return replace(above, value=z), below


def penalty_of(
    jumped: Jumped, config: JumpingConfig, batch: TrainingBatch, norms: Tensor, d_in: int
) -> Tensor:
    """S, with ||W_dec,i|| [d_sae] at the scale of the target; d_in of what is read."""
    if config.penalty == "step":
        return batch.mean(jumped.active) / d_in
    unit = (batch.variance / batch.target.shape[1]) ** 0.5
    return batch.mean(torch.tanh(jumped.strengths(config.tanh_scale / unit * norms))) / d_in


def shortfall(
    y: Tensor, W_enc_T: Tensor, b_enc: Tensor, theta: Tensor, excess: SparseCodes, dead: Tensor
) -> Tensor:
    """Sum over rows y [batch, d_in] of ReLU(theta - z), of each feature of a mask, [dead].

    excess has z - theta where it is positive. As ReLU(u) = u + ReLU(-u), the sum over the batch is
    that of theta - z, which the batch's sum of inputs gives, and of what is above.
    """
    rows = dead.nonzero()[:, 0]
    encoder, n = losses.rows_of(W_enc_T, rows), len(y)
    sum_z = (encoder * y.sum(0)).sum(1) + n * b_enc.index_select(0, rows)
    beyond = torch.zeros_like(theta).index_add(0, excess.index, excess.value)
    return (n * theta + beyond).index_select(0, rows) - sum_z


@torch.no_grad()
def calibrated(
    sae: SparseAutoencoder, theta: Tensor, rows: Callable[[], Iterable[Tensor]], target: float
) -> Tensor:
    """Thresholds [d_sae] brought by one factor to where the mean L0 over rows y is `target`.

    Where fewer pre-activations than that are positive the factor is 0, which comes nearest.
    """
    theta = theta.clamp_min(1e-6 * float(FEATURES.mean(theta)) + 1e-30)
    return theta * calibrated_threshold(sae, rows, 1 / theta, target)
