"""Selectors that share a budget of k B activations among all rows of a training batch.

Selection over a batch makes tokens compete with each other, so it cannot be used where tokens
arrive one by one. At inference a feature fires where its pre-activation is above a threshold: the
running average of the smallest selected value, or what `calibrate` found on held-out rows.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from sae import kernels
from sae.architectures._auxk import AuxKConfig, AuxKSAE
from sae.architectures._falling_k import FallingKConfig, falling
from sae.architectures._lista import check_fits, refuse_lista, step_size, stepped
from sae.architectures._thresholds import calibrated_threshold, running_mean_, smallest_of
from sae.architectures._zipf import zipf_densities
from sae.core import losses
from sae.core.base import TrainingOutput, TrainingState
from sae.core.batch import TrainingBatch
from sae.core.losses import Reconstruction
from sae.core.plain import Rule
from sae.distributed import FEATURES, ROWS
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError, check_range

_REFIT_EVERY = 25
"""steps between fits of the Zipf law, whose cost is then not felt"""


@dataclass(frozen=True, kw_only=True)
class BatchSelectionConfig(AuxKConfig):
    """The fields of selectors over a batch."""

    k: float = 32
    """Mean number of features kept a token (L0)."""
    ema_decay: float = 0.99
    """Decay a step of the running averages: of the threshold, and of features' densities."""
    auxiliary: Literal["auxk", "zipf"] = "auxk"
    """Which features predict the residual: dead ones, or all under-used ones (aux_zipf)."""
    zipf_share: float = 0.5
    """Under-used is a density below this fraction of what the Zipf law gives its rank. About half
    of all features lie below the fitted law itself (1.0), by noise alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("sae.k", self.k, above=0, high=self.d_sae)
        check_range("sae.ema_decay", self.ema_decay, low=0, below=1)
        check_range("sae.zipf_share", self.zipf_share, above=0)

    def budget(self, rows: int, k: float | None = None) -> int:
        """Activations a batch may have: k (the configuration's if not given) times its rows.

        Raises InputError if that is none.
        """
        budget = round((self.k if k is None else k) * rows)
        if budget < 1:
            raise InputError(
                "the batch is too small for a single activation",
                where="sae.k",
                given=self.k,
                allowed=f"more than {0.5 / rows:g}",
            )
        return budget


class BatchSelectionSAE(AuxKSAE):
    """Keeps the k B largest positive pre-activations of a batch; a subclass may choose otherwise.

    BatchTopK (Bussmann et al. 2024), the same as Mutual Choice (Ayonrinde 2024):
    f = pi where pi is among the k B largest of the batch; at inference where pi > threshold.
    """

    config: BatchSelectionConfig

    batch_level: ClassVar[bool] = True
    """training selects over the batch, inference by thresholds: they differ row by row"""
    feature_units: ClassVar[tuple[str, ...]] = ("b_enc", "threshold", "first_threshold")
    full_precision: ClassVar[tuple[str, ...]] = ("threshold", "first_threshold", "density")
    plain_rules: ClassVar[tuple[Rule, ...]] = ("jumprelu",)
    threshold: Tensor
    """float32 [] (one for all) or [d_sae]; 0 before training, when all that is positive fires"""
    threshold_updates: Tensor
    """int64, of the threshold's shape"""
    first_threshold: Tensor
    """float32 [], the threshold before a LISTA step; only where there is one"""
    first_threshold_updates: Tensor
    """int64 []"""
    density: Tensor
    """float32 [d_sae], running average of the fraction of rows each feature is selected on"""
    density_updates: Tensor
    """int64 []"""
    underused: Tensor
    """bool [d_sae], the features that aux_zipf trains; all false before the first fit"""

    def make_parameters(self) -> None:
        """Also the buffers, which are all of a run's state that is not in the weights."""
        check_fits(self)
        super().make_parameters()
        self._last_bar = 0.0  # the smallest value chosen in the last batch
        if FEATURES.size > 1 and self.config.auxiliary == "zipf":
            raise InputError(
                "needs the densities of all features, which processes share out",
                where="sae.auxiliary",
                given="zipf",
                allowed="auxk, or ranks rows",
            )
        shape = self.threshold_shape()
        self.register_buffer("threshold", torch.zeros(shape))
        self.register_buffer("threshold_updates", torch.zeros(shape, dtype=torch.int64))
        if step_size(self.config):
            self.register_buffer("first_threshold", torch.zeros(()))
            self.register_buffer("first_threshold_updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("density", torch.zeros(self.d_sae))
        self.register_buffer("density_updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("underused", torch.zeros(self.d_sae, dtype=torch.bool))

    def threshold_shape(self) -> tuple[int, ...]:
        """One threshold for all features, or one each."""
        return ()

    # ---- inference --------------------------------------------------------------------------

    def encode_normalised(self, y: Tensor) -> SparseCodes:
        """Codes of y [batch, d_in]: the pre-activations above the stored threshold."""
        return self._above(self._inferred_input(y), self.threshold)

    def _above(self, centred: Tensor, threshold: Tensor) -> SparseCodes:
        # one value a feature: a single one would be rounded to the precision of the activations
        bars = threshold.expand(self.d_sae)
        csr = kernels.encode_above(centred, self.W_enc_T, self.b_enc, bars)
        return SparseCodes(*csr, self.d_sae)

    def _inferred_input(self, y: Tensor) -> Tensor:
        """The encoder's input at inference, after the LISTA step if there is one."""
        centred, eta = self.encoder_input(y), step_size(self.config)
        if not eta:
            return centred
        return stepped(centred, self._above(centred, self.first_threshold), self.W_dec, eta)

    @torch.no_grad()
    def calibrate(self, rows: Callable[[], Iterable[Tensor]]) -> None:
        """Set the threshold so that the mean L0 over rows y [n, d_in] is k.

        Several thresholds are all multiplied by one factor; before a LISTA step it is k, too.
        Raises InputError without rows.
        """
        k = self.config.k
        if step_size(self.config):
            first = calibrated_threshold(self, rows, None, k, self.encoder_input)
            self.first_threshold.fill_(first)
        profile = self.threshold_profile()
        weight = 1 / profile if profile.ndim else None
        factor = calibrated_threshold(self, rows, weight, k, self._inferred_input)
        self.threshold.copy_(factor * profile)

    def plain_parts(self) -> dict[str, Any]:
        """JumpReLU with the stored threshold, one for all or one each, which is how it infers."""
        refuse_lista(self, "sae")
        threshold = self.threshold.detach().float().clamp_min(0).expand(self.d_sae)
        return {"activation": "jumprelu", "threshold": threshold, "b_enc": self.b_enc}

    def threshold_profile(self) -> Tensor:
        """What `calibrate` multiplies by a factor, positive, of the threshold's shape."""
        return torch.ones_like(self.threshold)

    # ---- training ---------------------------------------------------------------------------

    def select(self, centred: Tensor, state: TrainingState) -> SparseCodes:
        """What is kept of a batch's pre-activations, all positive."""
        return self.largest(centred, self.k_at(state))

    def k_at(self, state: TrainingState) -> float:
        """Mean number of features kept at this step of the run."""
        config = self.config
        if not isinstance(config, FallingKConfig) or config.k_start is None:
            return config.k
        return falling(config.k_start, config.k, config.k_anneal_fraction, state)

    def largest(self, centred: Tensor, k: float | None = None) -> SparseCodes:
        """The k B largest pre-activations of the batch; k is the configuration's if not given."""
        budget = self.config.budget(ROWS.total(len(centred)), k)
        csr = kernels.encode_top_of_batch(
            centred, self.W_enc_T, self.b_enc, budget, hint=self._last_bar
        )
        codes = SparseCodes(*csr, self.d_sae)
        smallest = smallest_of(codes.value)
        if smallest.isfinite():
            self._last_bar = float(smallest)
        return codes

    def training_output(self, batch: TrainingBatch, state: TrainingState) -> TrainingOutput:
        """The loss of a batch; thresholds and densities move in training mode only."""
        centred = self._after_lista(batch, state)
        codes = self.select(centred, state)
        budget = self.config.budget(batch.total, self.k_at(state))
        assert len(codes.index) <= budget, "a selection exceeds its budget"
        counts = codes.counts()
        if self.training:
            self._observe(codes, counts, state)
        loss, terms, found = self.selection_loss(batch, centred, codes, state)
        return TrainingOutput(loss, terms, counts, found)

    def _after_lista(self, batch: TrainingBatch, state: TrainingState) -> Tensor:
        """The encoder's input for a batch, after the LISTA step if there is one."""
        centred, eta = self.centred(batch), step_size(self.config)
        if not eta:
            return centred
        first = self.select(centred, state)
        smallest = smallest_of(first.value)
        if self.training and smallest.isfinite():
            running_mean_(
                self.first_threshold,
                smallest,
                self.first_threshold_updates,
                self.config.ema_decay,
            )
        return stepped(centred, first, self.W_dec, eta, batch.mask_input)

    def selection_loss(
        self, batch: TrainingBatch, centred: Tensor, codes: SparseCodes, state: TrainingState
    ) -> tuple[Tensor, dict[str, Tensor], Reconstruction]:
        """FVU + coefficient * auxiliary of the selected codes, its terms, the reconstruction."""
        found = self.reconstruct(codes, batch)
        terms = {"fvu": found.loss.detach()}
        loss = self.add_auxiliary(found.loss, terms, centred, codes, found, state)
        return loss, terms, found

    def add_auxiliary(
        self,
        loss: Tensor,
        terms: dict[str, Tensor],
        centred: Tensor,
        codes: SparseCodes,
        found: Reconstruction,
        state: TrainingState,
        among: Tensor | None = None,
    ) -> Tensor:
        """The loss with AuxK or aux_zipf added, also put into terms.

        Args: among, bool [d_sae]: the features that may predict the residual; all if not given.
        """
        config = self.config
        chosen = self.underused if config.auxiliary == "zipf" else state.dead
        if among is not None:
            chosen = chosen & among
        if config.auxiliary == "auxk":
            limited = replace(state, dead=chosen)
            return self.add_auxk(loss, terms, centred, found, limited)
        if not config.auxk_coefficient:
            return loss
        term = loss.new_zeros(())
        if chosen.any():
            term = self._aux_zipf(found, centred, codes, chosen)
        terms["aux_zipf"] = term.detach()
        return loss + config.auxk_coefficient * term

    def _aux_zipf(
        self, found: Reconstruction, centred: Tensor, codes: SparseCodes, chosen: Tensor
    ) -> Tensor:
        """aux_zipf (Ayonrinde 2024): AuxK's loss, predicted by under-used features.

        They share k_aux activations a row over the batch. An entry that the code has already is
        left out: its share of the residual is gone, and asking for it twice would shrink it.
        """
        residual, features = found.left_over(), chosen.nonzero()[:, 0]
        encoder, decoder = (losses.rows_of(W, features) for W in (self.W_enc_T, self.W_dec))
        if found.batch.visible is not None:  # what the residual is of
            decoder = decoder * ~found.batch.visible
        bias = self.b_enc.index_select(0, features)
        held = codes.of(features)
        if len(features) <= self.k_aux:  # none is too many, and dense products on few are cheap
            pre = torch.relu(functional.linear(centred, encoder, bias))
            free = pre.new_ones(pre.shape).view(-1).index_fill_(0, held.flat(), 0.0)
            e_hat = (pre * free.view_as(pre)) @ decoder
            left = kernels.total((residual - e_hat).square())
        else:
            csr = kernels.encode_top_of_batch(
                centred,
                encoder,
                bias,
                self.k_aux * ROWS.total(len(residual)),
                excluded=(held.row_ptr, held.index),
            )
            left = losses.left_by(SparseCodes(*csr, len(features)), residual, decoder)
        return losses.unpredicted(residual, left, found.batch.target)

    @torch.no_grad()
    def _observe(self, codes: SparseCodes, counts: Tensor, state: TrainingState) -> None:
        config = self.config
        fraction = ROWS.sum(counts) / ROWS.total(codes.batch)
        running_mean_(self.density, fraction, self.density_updates, config.ema_decay)
        self.observe_threshold(codes, state)
        known = int(self.density_updates) * (1 - config.ema_decay) >= 1
        if config.auxiliary == "zipf" and known and state.step % _REFIT_EVERY == 0:
            law = zipf_densities(self.density)
            self.underused.copy_(self.density < config.zipf_share * law)

    def observe_threshold(self, codes: SparseCodes, state: TrainingState) -> None:
        """Move the threshold towards the smallest value selected in a batch."""
        del state
        smallest = smallest_of(codes.value)
        if smallest.isfinite():
            running_mean_(self.threshold, smallest, self.threshold_updates, self.config.ema_decay)
