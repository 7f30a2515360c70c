"""Matryoshka SAE on BatchTopK (Bussmann, Nabeshima, Karvonen, Nanda 2025, arXiv 2503.17547).

The k B largest pre-activations of a batch are chosen over all features first; then every prefix of
the dictionary, of widths m_1 < ... < m_n = d_sae, has to reconstruct alone:
loss = sum_i w_i FVU(y, sum_{j < m_i} f_j W_dec,j + b_dec) + 1/32 AuxK,   sum_i w_i = 1
With the paper's code the prefix of no feature at all (b_dec alone) is one of them.

Options, which compose: a falling k and a LISTA step (as of BatchTopK); prefixes of the most
frequent features, whichever they are at the time (sort_by_frequency); and prefixes whose losses
teach only the features that they add (detach_prefixes).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sae.architectures import register
from sae.architectures._batch_selection import BatchSelectionConfig, BatchSelectionSAE
from sae.architectures._falling_k import FallingKConfig
from sae.architectures._lista import ListaConfig, refuse_lista
from sae.architectures._nested import nested
from sae.architectures.batchtopk import BatchTopKConfig, BatchTopKSAE
from sae.core.base import SAEConfig, TrainingState
from sae.core.batch import TrainingBatch
from sae.core.config import ADDED
from sae.core.losses import Reconstruction
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError, check_range
from saescope.integers import as_index


@dataclass(frozen=True, kw_only=True)
class MatryoshkaConfig(BatchSelectionConfig, FallingKConfig, ListaConfig):
    """Configuration of the Matryoshka architecture."""

    kind: Literal["matryoshka"] = "matryoshka"
    """Name of the architecture."""
    group_fractions: tuple[float, ...] = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
    """Fractions of the dictionary that each level adds; they sum to 1. In a small dictionary levels
    that would add no feature are left out."""
    prefix_widths: tuple[int, ...] | None = None
    """Widths of the prefixes, increasing, the last d_sae; in place of group_fractions."""
    prefix_weights: tuple[float, ...] | None = None
    """Weight of each prefix's loss (first that of no feature, with include_empty), scaled to sum
    to 1; equal if not given."""
    include_empty: bool = True
    """The bias alone is a prefix too."""
    aux_per_level: bool = False
    """Each prefix's own features predict its own residual; if false, once on the full residual."""
    detach_prefixes: bool = field(default=False, metadata={ADDED: True})
    """A prefix's loss does not reach the features of smaller ones; the whole dictionary's reaches
    all."""
    sort_by_frequency: bool = field(default=False, metadata={ADDED: True})
    """A prefix is of the features that fire most often, by running averages, at each step. They are
    put in this order when training ends."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for fraction in self.group_fractions:
            check_range("sae.group_fractions", fraction, above=0)
        if abs(sum(self.group_fractions) - 1) > 1e-6:
            raise InputError(
                "the fractions must sum to 1",
                where="sae.group_fractions",
                given=self.group_fractions,
            )
        widths = (0, *(self.prefix_widths or (self.d_sae,)))
        if widths[-1] != self.d_sae or any(low >= high for low, high in pairwise(widths)):
            raise InputError(
                "not increasing widths of prefixes",
                where="sae.prefix_widths",
                given=self.prefix_widths,
                allowed=f"increasing, the last {self.d_sae}",
            )
        self.weights()

    def widths(self) -> list[int]:
        """The width of each prefix, increasing; the last is d_sae."""
        if self.prefix_widths is not None:
            return list(self.prefix_widths)
        ends = torch.tensor(self.group_fractions, dtype=torch.float64).cumsum(0)
        rounded = [*(round(float(end) * self.d_sae) for end in ends[:-1]), self.d_sae]
        return sorted({width for width in rounded if width})

    def weights(self) -> list[float]:
        """The weight of each prefix's loss, summing to 1; the empty prefix first, if it counts."""
        number = len(self.widths()) + self.include_empty
        given = self.prefix_weights if self.prefix_weights is not None else (1.0,) * number
        if len(given) != number or min(given) < 0 or not sum(given):
            raise InputError(
                "not a weight for each prefix",
                where="sae.prefix_weights",
                given=given,
                allowed=f"{number} numbers, none negative, not all 0",
            )
        return [weight / sum(given) for weight in given]


@register
class MatryoshkaSAE(BatchSelectionSAE):
    """BatchTopK whose first features have to do alone, so that general ones come first."""

    Config: ClassVar[type[SAEConfig]] = MatryoshkaConfig
    config: MatryoshkaConfig  # type: ignore[assignment]

    @property
    def levels(self) -> int:
        """Number of prefixes that have features."""
        return len(self.config.widths())

    def selection_loss(
        self, batch: TrainingBatch, centred: Tensor, codes: SparseCodes, state: TrainingState
    ) -> tuple[Tensor, dict[str, Tensor], Reconstruction]:
        """Weighted FVU of the prefixes + coefficient * auxiliary; "fvu" is the full width's."""
        config = self.config
        widths, weights = config.widths(), config.weights()
        order = self._by_frequency() if config.sort_by_frequency else None
        levels = self._levels(codes, order)
        detached = config.detach_prefixes
        found = nested(levels, batch, self.W_dec, self.b_dec, detached=detached)
        losses = [each.loss for each in found[-len(weights) :]]
        loss = sum(
            (weight * loss for weight, loss in zip(weights, losses, strict=True)),
            start=losses[0].new_zeros(()),
        )
        terms = {"fvu": losses[-1].detach(), "nested": loss.detach()}
        if not config.aux_per_level:
            loss = self.add_auxiliary(loss, terms, centred, codes, found[-1], state)
            return loss, terms, found[-1]
        own, auxiliary = weights[-len(widths) :], {}
        for width, weight, level in zip(widths, own, found[1:], strict=True):
            zero, more = loss.new_zeros(()), {}
            term = self.add_auxiliary(
                zero, more, centred, codes, level, state, among=self._prefix(width, order)
            )
            loss = loss + weight / sum(own) * term
            for name, value in more.items():
                auxiliary[name] = auxiliary.get(name, 0.0) + weight / sum(own) * value
        return loss, {**terms, **auxiliary}, found[-1]

    def _by_frequency(self) -> Tensor:
        """The features, most frequent first; of equals the first."""
        return self.density.argsort(descending=True, stable=True)

    def _levels(self, codes: SparseCodes, order: Tensor | None) -> list[SparseCodes]:
        """The codes that each prefix adds to the one before; order int64 [d_sae], if not theirs."""
        number, edges = codes.index, pairwise([0, *self.config.widths()])
        if order is not None:
            number = order.argsort()[number]
        return [codes.select((number >= low) & (number < high)) for low, high in edges]

    def _prefix(self, width: int, order: Tensor | None) -> Tensor:
        """Which features a prefix has, bool [d_sae]."""
        first = torch.arange(self.d_sae, device=self.W_dec.device) < width
        return first if order is None else torch.zeros_like(first).index_fill_(0, order[:width], 1)

    @torch.no_grad()
    def calibrate(self, rows: Callable[[], Iterable[Tensor]]) -> None:
        """Set the threshold for an L0 of k; with sort_by_frequency, put the features in order.

        What an SAE gives is then the same but for the numbers of its features, which no step of
        training follows. Raises InputError without rows.
        """
        super().calibrate(rows)
        if self.config.sort_by_frequency:
            order = self._by_frequency()
            for name in ("W_enc_T", "b_enc", "W_dec", "density", "underused"):
                values = getattr(self, name)
                values.copy_(values[order])

    @torch.no_grad()
    def prefix(self, level: int) -> BatchTopKSAE:
        """An SAE of the features of a prefix alone (level 0 the smallest), with copied weights.

        The threshold is the whole's, so its features fire where they do there, and its L0 is lower.
        Raises InputError for a level there is not, or for an SAE with a LISTA step, in which
        features depend on all others.
        """
        refuse_lista(self, "prefix")
        level = as_index(level, where="prefix", low=0, high=self.levels - 1, what="no such level")
        width = self.config.widths()[level]
        shared = {name: getattr(self.config, name) for name in BatchTopKConfig.__dataclass_fields__}
        shared |= {"kind": "batchtopk", "d_sae": width, "k": min(self.config.k, width)}
        shared["k_start"] = None
        sae = BatchTopKSAE(BatchTopKConfig(**shared), self.d_in, self.d_out)
        sae.to(self.W_dec)
        own = self.state_dict()
        sae.load_state_dict(
            {
                name: own[name][:width] if value.ndim and len(value) == width else own[name]
                for name, value in sae.state_dict().items()
            }
        )
        sae.normaliser, sae.output_normaliser = self.normaliser, self.output_normaliser
        sae.site_normalisers = dict(self.site_normalisers)
        sae.metadata = {**self.metadata, "prefix_of": self.d_sae}
        return sae.train(self.training)
