"""Feature Choice SAE (Ayonrinde 2024): every feature keeps its own m_j strongest tokens of a batch.

max sum S_ij pi_ij over masks S with sum_i S_ij <= m_j;   m_j ~ 1 / (rank_j + beta)^alpha,
sum_j m_j = k B. Phase one trains Mutual Choice; then the law is fitted to the features' densities
and the quotas m_j hold to the end. Only positive pre-activations are taken, so a quota may stay
unfilled. Inference: f_j = pi_j where pi_j > threshold_j, the running average of the smallest value
that feature j kept. A quota makes nearly every feature fire in training: whether one is dead has to
be measured with the thresholds, on held-out rows.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sae import kernels
from sae.architectures import register
from sae.architectures._batch_selection import BatchSelectionConfig, BatchSelectionSAE
from sae.architectures._thresholds import running_mean_, smallest_of
from sae.architectures._zipf import zipf_densities
from sae.core.base import SAEConfig, TrainingState
from sae.distributed import ROWS
from sae.kernels.codes import SparseCodes
from saescope.errors import check_range

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, kw_only=True)
class FeatureChoiceConfig(BatchSelectionConfig):
    """Configuration of the Feature Choice architecture."""

    kind: Literal["feature_choice"] = "feature_choice"
    """Name of the architecture."""
    auxiliary: Literal["auxk", "zipf"] = "zipf"
    """Which features predict the residual: dead ones, or all under-used ones (aux_zipf)."""
    phase_one: float = 0.7
    """Fraction of the run trained as Mutual Choice, before quotas are fitted; 1 for all of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("sae.phase_one", self.phase_one, above=0, high=1)


@register
class FeatureChoiceSAE(BatchSelectionSAE):
    """Features choose tokens, as many as a Zipf law grants each."""

    Config: ClassVar[type[SAEConfig]] = FeatureChoiceConfig
    config: FeatureChoiceConfig  # type: ignore[assignment]

    full_precision: ClassVar[tuple[str, ...]] = ("threshold", "density", "share")
    share: Tensor
    """float32 [d_sae], each feature's share of the budget by the fitted law; 0 before phase two"""

    def make_parameters(self) -> None:
        """Also the shares of the budget."""
        super().make_parameters()
        self.register_buffer("share", torch.zeros(self.d_sae))

    def threshold_shape(self) -> tuple[int, ...]:
        """One threshold a feature."""
        return (self.d_sae,)

    def threshold_profile(self) -> Tensor:
        """The thresholds as learnt; a feature without one takes the mean of the others."""
        learnt = self.threshold > 0
        if not learnt.any():
            return torch.ones_like(self.threshold)
        return torch.where(learnt, self.threshold, self.threshold[learnt].mean())

    def in_phase_two(self, state: TrainingState) -> bool:
        """Whether features choose at this step; decided by the step alone."""
        return state.step >= round(self.config.phase_one * state.total_steps)

    def select(self, centred: Tensor, state: TrainingState) -> SparseCodes:
        """Phase one: the k B largest of the batch. Phase two: the m_j largest of each column."""
        if not self.in_phase_two(state):
            return self.largest(centred)
        share = self.share
        if not share.any():  # the first batch of phase two
            share = zipf_densities(self.density)
            share = share / share.sum()
            if self.training:
                self.share.copy_(share)
                # each feature's next pick replaces phase one's common threshold
                self.threshold_updates.zero_()
        rows = ROWS.total(len(centred))
        quota = quotas(share, self.config.budget(rows), rows, state.step)
        csr = kernels.encode_top_of_features(
            centred, self.W_enc_T, self.b_enc, quota, self.threshold
        )
        return SparseCodes(*csr, self.d_sae)

    def observe_threshold(self, codes: SparseCodes, state: TrainingState) -> None:
        """Move each feature's threshold towards the smallest value it kept, if it kept any."""
        decay = self.config.ema_decay
        value = codes.value.detach().to(self.threshold.dtype)
        if not self.in_phase_two(state):
            least = smallest_of(value)
            if least.isfinite():
                running_mean_(self.threshold, least, self.threshold_updates, decay)
            return
        smallest = torch.full_like(self.threshold, torch.inf)
        smallest.scatter_reduce_(0, codes.index, value, "amin")
        smallest = ROWS.min(smallest)
        picked = smallest.isfinite().nonzero()[:, 0]
        mean, updates = self.threshold[picked], self.threshold_updates[picked]
        running_mean_(mean, smallest[picked], updates, decay)
        self.threshold[picked], self.threshold_updates[picked] = mean, updates


def quotas(share: Tensor, budget: int, rows: int, step: int) -> Tensor:
    """Whole quotas m_j that sum to the budget exactly, int64 [d_sae].

    Proportional to share [d_sae], at most `rows`. With a budget of at least one for each feature
    none has less than 1, and remainders go to the largest (ties to the first). With a smaller one
    some must have 0 in a batch: which ones turns with the step, so that over steps each has its
    share.

    >>> quotas(torch.tensor([0.7, 0.2, 0.1]), 8, 100, step=0).tolist()
    [5, 2, 1]
    """
    features = len(share)
    exact = _bounded(share.to(torch.float64), budget, float(budget >= features), rows)
    if budget >= features:
        whole = exact.floor()
        order = (exact - whole).argsort(descending=True, stable=True)
        whole[order[: budget - int(whole.sum())]] += 1
        return whole.to(torch.int64)
    # systematic rounding: neighbours' quotas meet at edges that a turning offset shifts
    edges = exact.cumsum(0)
    edges[-1] = budget
    edges = (edges + step * _GOLDEN % 1).floor().to(torch.int64)
    return edges.diff(prepend=edges.new_zeros(1))


def _bounded(share: Tensor, total: int, low: float, high: float) -> Tensor:
    """clamp(c share, low, high) with the c that makes the sum right, by bisection if need be."""
    plain = total / share.sum() * share
    if low <= float(plain.min()) and float(plain.max()) <= high:
        return plain
    share = share.clamp_min(torch.finfo(torch.float32).tiny)
    below, above = 0.0, high / float(share.min())
    while below < (middle := (below + above) / 2) < above:  # until they are neighbours
        if float((middle * share).clamp(low, high).sum()) < total:
            below = middle
        else:
            above = middle
    return (above * share).clamp(low, high)
