"""A ReLU SAE whose penalty is a logarithm, which is easier on strong activations than L1.

f = ReLU(W_enc^T (y - b_dec) + b_enc),   y_hat = f W_dec + b_dec
loss = FVU(f) + coefficient * mean over rows of sum_i log(1 + f_i / scale)

The decoder's rows have length 1, as they have in every SAE unless `unit_decoder` is False.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from sae import kernels
from sae.architectures import register
from sae.core.base import SAEConfig, SparseAutoencoder, TrainingOutput, TrainingState
from sae.core.batch import TrainingBatch
from sae.core.plain import Rule
from sae.kernels.codes import SparseCodes
from saescope.errors import check_range


@dataclass(frozen=True, kw_only=True)
class LogReLUConfig(SAEConfig):
    """Configuration: each field is an option, and its docstring is the option's help."""

    kind: Literal["log_relu"] = "log_relu"
    """Name of the architecture."""
    coefficient: float = 0.003
    """Weight of the penalty."""
    scale: float = 1.0
    """Activations much larger than this are penalised hardly more than this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("sae.coefficient", self.coefficient, low=0)
        check_range("sae.scale", self.scale, above=0)


@register
class LogReLU(SparseAutoencoder):
    """Every positive pre-activation is kept; the penalty makes them few."""

    Config: ClassVar[type[SAEConfig]] = LogReLUConfig
    config: LogReLUConfig
    penalised: ClassVar[bool] = True  # trainer.target_l0 moves the penalty's weight
    plain_rules: ClassVar[tuple[Rule, ...]] = ("relu",)

    def _codes(self, centred: Tensor) -> SparseCodes:
        above = kernels.encode_above(centred, self.W_enc_T, self.b_enc, 0.0)
        return SparseCodes(*above, self.d_sae)

    def encode_normalised(self, y: Tensor) -> SparseCodes:
        """Codes of y [batch, d_in]."""
        return self._codes(self.encoder_input(y))

    def training_output(self, batch: TrainingBatch, state: TrainingState) -> TrainingOutput:
        """The loss of a batch, and what is logged."""
        codes = self._codes(self.centred(batch))
        found = self.reconstruct(codes, batch)
        penalty = batch.mean((1 + codes.value / self.config.scale).log())
        loss = found.loss + self.config.coefficient * state.penalty * penalty
        terms = {"fvu": found.loss.detach(), "log": penalty.detach()}
        return TrainingOutput(loss, terms, codes.counts(), found)

    def plain_parts(self) -> dict[str, Any]:
        """How other libraries' formats can hold it: at inference it is a ReLU SAE."""
        return {"activation": "relu", "b_enc": self.b_enc}
