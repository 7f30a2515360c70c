"""The L1 penalty, shared by the architectures that have it."""

from dataclasses import dataclass
from typing import cast

from torch import Tensor

from sae.core import losses
from sae.core.base import SAEConfig, SparseAutoencoder, TrainingState
from sae.core.batch import TrainingBatch
from sae.kernels.codes import SparseCodes
from saescope.errors import check_range


@dataclass(frozen=True, kw_only=True)
class L1WeightConfig(SAEConfig):
    """How much an L1 penalty weighs."""

    l1_coefficient: float = 0.1
    """Weight of the L1 penalty, beside an FVU of at most about 1. Activations count in units of the
    data's standard deviation, sqrt(variance), so it means the same at every normaliser: a lambda
    beside a squared error is it times sqrt(variance), which is about 1 for data of unit mean
    square and sqrt(d_in) for data of mean norm sqrt(d_in) (Anthropic's 5 is 0.2 at d_in 576)."""
    l1_warmup_fraction: float = 0.05
    """Fraction of training over which the penalty grows from 0 to its weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("sae.l1_coefficient", self.l1_coefficient, low=0)
        check_range("sae.l1_warmup_fraction", self.l1_warmup_fraction, low=0, high=1)

    @property
    def penalty_warmup(self) -> float:
        """Of the L1 penalty."""
        return self.l1_warmup_fraction

    def l1_weight(self, state: TrainingState) -> float:
        """lambda at this step: warmed up, and moved by the trainer's controller."""
        return self.l1_coefficient * state.ramp(self.l1_warmup_fraction) * state.penalty


@dataclass(frozen=True, kw_only=True)
class L1Config(L1WeightConfig):
    """The fields of the L1 penalty."""

    decoder_norm_weighted: bool = False
    """Weight activations by their decoder norm and leave the norm free (Anthropic, April 2024); if
    false, the plain L1 with decoder rows held at unit norm."""


class L1SAE(SparseAutoencoder):
    """An SAE kept sparse by a penalty on the sum of its activations."""

    penalised = True

    @property
    def unit_decoder(self) -> bool:  # type: ignore[override]
        """Under the plain L1 the decoder's rows keep unit norm."""
        return not cast(L1Config, self.config).decoder_norm_weighted

    def weighed(self, codes: SparseCodes, batch: TrainingBatch) -> Tensor:
        """What the penalty counts, [entries]: values, by decoder norm if so asked, over
        sqrt(variance).
        """
        value = codes.value / batch.variance**0.5
        if self.unit_decoder:
            return value
        return value * losses.row_norms(self.W_dec).index_select(0, codes.index)
