"""Temporal SAE (Bhalla, Oesterling, Mayrink Verdun, Lakkaraju, Calmon 2025, arXiv 2511.05541).

A Matryoshka SAE of two levels on BatchTopK, whose first features (the high level, a fifth) are to
be alike on neighbouring tokens, and so to be of what a text is about; the rest are free to follow
each token.

    loss = 1/2 FVU(high level alone) + 1/2 FVU(all features) + 1/32 AuxK + alpha L_contr
    L_contr = -1/N sum_i [log(exp(s_ii) / sum_j exp(s_ij)) + log(exp(s_ii) / sum_j exp(s_ji))]
    s_ij = cos(z_i, z'_j) / T

z_i are the high-level codes of the first token of pair i, z'_i those of the token after it, N the
pairs of the batch. The paper has T = 1 and cosines. Its code has inner products of the codes as
they are (unit_codes = false), half of L_contr, and reconstructs one token of a pair; here all are.

The paper's alpha is 1 (0.1 in its code) beside a sum of squared errors in the model's units; here
it stands beside an FVU, so it is no more than the same number.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from sae.architectures import register
from sae.architectures.csr import codes_of_all, contrastive_loss, similarities
from sae.architectures.matryoshka import MatryoshkaConfig, MatryoshkaSAE
from sae.core.base import SAEConfig, TrainingState
from sae.core.batch import TrainingBatch
from sae.core.losses import Reconstruction
from sae.distributed import ROWS
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError, check_range


@dataclass(frozen=True, kw_only=True)
class TemporalConfig(MatryoshkaConfig):
    """Configuration of the temporal architecture."""

    kind: Literal["temporal"] = "temporal"  # type: ignore[assignment]
    """Name of the architecture."""
    group_fractions: tuple[float, ...] = (0.2, 0.8)
    """Fractions of the dictionary that each level adds; the first is the high level, whose codes
    are compared between neighbouring tokens."""
    include_empty: bool = False
    """The bias alone is a prefix too."""
    temporal_coefficient: float = 1.0
    """alpha, the weight of the contrastive term; 0 turns it off."""
    temperature: float = 1.0
    """T, what similarities are divided by."""
    unit_codes: bool = True
    """Similarities are of codes scaled to unit length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("sae.temporal_coefficient", self.temporal_coefficient, low=0)
        check_range("sae.temperature", self.temperature, above=0)

    @property
    def needs_neighbours(self) -> bool:
        """The contrast is between neighbouring tokens."""
        return bool(self.temporal_coefficient)


@register
class TemporalSAE(MatryoshkaSAE):
    """Matryoshka whose first features are drawn together on neighbouring tokens."""

    Config: ClassVar[type[SAEConfig]] = TemporalConfig
    config: TemporalConfig  # type: ignore[assignment]

    def selection_loss(
        self, batch: TrainingBatch, centred: Tensor, codes: SparseCodes, state: TrainingState
    ) -> tuple[Tensor, dict[str, Tensor], Reconstruction]:
        """Matryoshka's loss + alpha * contrast; "paired" is the fraction of tokens with a next."""
        loss, terms, found = super().selection_loss(batch, centred, codes, state)
        if not self.config.temporal_coefficient:
            return loss, terms, found
        first = first_of_pairs(batch)
        high = codes.select(codes.index < self.config.widths()[0])
        gram = similarities(codes_of_all(high), unit=self.config.unit_codes)
        logits = gram[first][:, first + 1] / self.config.temperature
        term = contrastive_loss(logits, None) + contrastive_loss(logits.T, None)
        terms["contrastive"] = term.detach()
        terms["paired"] = loss.new_tensor(len(first) / batch.total)
        return loss + self.config.temporal_coefficient * term, terms, found


def first_of_pairs(batch: TrainingBatch) -> Tensor:
    """Rows of the whole batch that the next token's row follows, int64 [pairs].

    Raises InputError where tokens are not known, of several layers, or without any pair.
    """
    if batch.labels is None or batch.group is not None:
        raise InputError(
            "needs neighbouring tokens side by side, of one site's rows",
            where="sae.temporal_coefficient",
            given="rows of several layers" if batch.group is not None else "rows of no known token",
            allowed='0, or a stream with labels = "neighbours"',
        )
    first = (ROWS.gather(batch.labels).diff() == 1).nonzero()[:, 0]
    if not len(first):
        raise InputError(
            "no neighbouring tokens side by side in a batch",
            where="sae.temporal_coefficient",
            given=f"{batch.total} rows",
            allowed="a harvest that keeps neighbouring tokens, and a trainer.batch_size above 1",
        )
    return first
