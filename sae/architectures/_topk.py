"""Selection of k features a row, shared by the architectures that have it.

f = TopK_k(W_enc^T (y - b_dec) + b_enc) rectified,   y_hat = f W_dec + b_dec
loss = FVU(k) + c_multi FVU(m k) + c_aux AuxK
"""

from dataclasses import dataclass
from typing import cast

from torch import Tensor

from sae import kernels
from sae.architectures._auxk import AuxKConfig, AuxKSAE
from sae.core.base import TrainingOutput, TrainingState
from sae.core.batch import TrainingBatch
from sae.kernels import global_topk
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError, check_range


@dataclass(frozen=True, kw_only=True)
class KConfig(AuxKConfig):
    """The field k, a whole number of features for each row."""

    k: int = 32
    """Features kept a token (L0)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_k("k", self.k)

    def check_k(self, name: str, value: int) -> None:
        """Raise InputError unless `value` features can be chosen from the dictionary."""
        check_range(f"sae.{name}", value, low=1)
        if value > self.d_sae:
            raise InputError(
                f"{name} exceeds the dictionary",
                where=f"sae.{name}",
                given=value,
                allowed=f"1 to {self.d_sae}",
            )


@dataclass(frozen=True, kw_only=True)
class TopKFields(KConfig):
    """What the TopK family has beside k: annealing of k and the Multi-TopK loss."""

    k_start: int | None = None
    """Features kept at the first step, falling linearly to k; k throughout if not given. Steps cost
    in proportion to the features kept."""
    k_anneal_fraction: float = 0.5
    """Part of the run over which k falls from k_start."""
    multi_topk_coefficient: float = 0.0
    """Weight of the Multi-TopK loss (1/8 in Gao et al. 2024); 0 turns it off."""
    multi_topk: int = 4
    """The Multi-TopK loss keeps this many times k features."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k_start is not None:
            check_range("sae.k_start", self.k_start, low=self.k)
            self.check_k("k_start", self.k_start)
        check_range("sae.k_anneal_fraction", self.k_anneal_fraction, low=0, high=1)
        check_range("sae.multi_topk_coefficient", self.multi_topk_coefficient, low=0)
        check_range("sae.multi_topk", self.multi_topk, low=2)


class TopKFamily(AuxKSAE):
    """An SAE that keeps k features of each row; `top` says which."""

    @property
    def _fields(self) -> TopKFields:
        return cast(TopKFields, self.config)

    def top(self, centred: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k features kept of each row and their activations: (index, value) [batch, k]."""
        return kernels.encode_topk(centred, self.W_enc_T, self.b_enc, k)

    def encode_normalised(self, y: Tensor) -> SparseCodes:
        """Codes of y [batch, d_in], 0 where fewer than k pre-activations are positive."""
        k = self._fields.k
        index, value = self.top(self.encoder_input(y), min(k, self.d_sae))
        return global_topk.strongest(index, value, k, self.d_sae)

    def k_at(self, state: TrainingState) -> int:
        """Features kept at this step of the run."""
        config = self._fields
        if config.k_start is None:
            return config.k
        steps = config.k_anneal_fraction * state.total_steps
        left = max(0.0, 1 - state.step / steps) if steps else 0.0
        return config.k + round((config.k_start - config.k) * left)

    def more_loss(
        self, loss: Tensor, terms: dict[str, Tensor], codes: SparseCodes, batch: TrainingBatch
    ) -> Tensor:
        """The loss with an architecture's own term added, which is also put into `terms`."""
        del terms, codes, batch
        return loss

    def training_output(self, batch: TrainingBatch, state: TrainingState) -> TrainingOutput:
        """FVU + coefficient * Multi-TopK + coefficient * AuxK (Gao et al. 2024, sections 2, 6)."""
        config = self._fields
        centred = self.centred(batch)
        k = self.k_at(state)
        wide = min(config.multi_topk * k, config.d_sae) if config.multi_topk_coefficient else k
        index, value = self.top(centred, min(wide, self.d_sae))
        codes = wide_codes = global_topk.strongest(index, value, wide, self.d_sae)
        if wide > k:
            codes = global_topk.strongest(index, value, k, self.d_sae)
        found = self.reconstruct(codes, batch)
        terms = {"fvu": found.loss.detach()}
        loss = self.add_auxk(found.loss, terms, centred, found, state)
        if config.multi_topk_coefficient:
            multi = self.reconstruct(wide_codes, batch).loss
            terms["multi_topk"] = multi.detach()
            loss = loss + config.multi_topk_coefficient * multi
        loss = self.more_loss(loss, terms, codes, batch)
        return TrainingOutput(loss, terms, codes.counts(), found)
