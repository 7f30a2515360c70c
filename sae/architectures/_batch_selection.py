"""Selectors that share a budget of k B activations among all rows of a training batch.

Selection over a batch lets tokens compete with each other, so it cannot be used where tokens arrive
one by one: at inference a feature fires where it passes a threshold learnt in training, the running
average of the smallest selected value, or the one `calibrate` found on held-out rows.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from sae import kernels
from sae.architectures._auxk import AuxKConfig, AuxKSAE
from sae.core import losses
from sae.core.base import SparseAutoencoder, TrainingOutput, TrainingState, kind_of
from sae.core.batch import TrainingBatch
from sae.core.losses import Reconstruction
from sae.distributed import ALL, FEATURES, ROWS
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError, check_range
from saescope.progress import say

_REFIT_EVERY = 25
"""steps between fits of the Zipf law, whose cost is then not felt"""
_CALIBRATION_ROWS = 2048
"""rows encoded at a time by `calibrate`"""


@dataclass(frozen=True, kw_only=True)
class BatchSelectionConfig(AuxKConfig):
    """The fields of selectors over a batch."""

    k: float = 32
    """Mean number of features kept a token (L0)."""
    ema_decay: float = 0.99
    """Decay a step of the running averages: of the threshold, and of features' densities."""
    auxiliary: Literal["auxk", "zipf"] = "auxk"
    """Who predicts the residual: dead features, or all under-used ones (aux_zipf)."""
    zipf_share: float = 0.5
    """Under-used is a density below this part of the one the Zipf law gives its rank. About half of
    all features lie below the fitted law itself (1.0), by noise alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("sae.k", self.k, above=0, high=self.d_sae)
        check_range("sae.ema_decay", self.ema_decay, low=0, below=1)
        check_range("sae.zipf_share", self.zipf_share, above=0)

    def budget(self, rows: int) -> int:
        """Activations a batch may have: k times its rows, rounded.

        Raises InputError if that is none.
        """
        budget = round(self.k * rows)
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
    feature_units: ClassVar[tuple[str, ...]] = ("b_enc", "threshold")
    full_precision: ClassVar[tuple[str, ...]] = ("threshold", "density")
    threshold: Tensor
    """float32 [] (one for all) or [d_sae]; 0 before training, when all that is positive fires"""
    threshold_updates: Tensor
    """int64, of the threshold's shape"""
    density: Tensor
    """float32 [d_sae], running average of the part of rows each feature is selected on"""
    density_updates: Tensor
    """int64 []"""
    underused: Tensor
    """bool [d_sae], whom aux_zipf trains; all false before the first fit"""

    def make_parameters(self) -> None:
        """Also the buffers, which are all of a run's state that is not in the weights."""
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
        self.register_buffer("density", torch.zeros(self.d_sae))
        self.register_buffer("density_updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("underused", torch.zeros(self.d_sae, dtype=torch.bool))

    def threshold_shape(self) -> tuple[int, ...]:
        """One threshold for all features, or one each."""
        return ()

    # ---- inference --------------------------------------------------------------------------

    def encode_normalised(self, y: Tensor) -> SparseCodes:
        """Codes of y [batch, d_in]: the pre-activations above the stored threshold."""
        # one value a feature: a single one would be rounded to the precision of the activations
        threshold = self.threshold.expand(self.d_sae)
        centred = self.encoder_input(y)
        parts = kernels.encode_above(centred, self.W_enc_T, self.b_enc, threshold)
        return SparseCodes(*parts, self.d_sae)

    @torch.no_grad()
    def calibrate(self, rows: Callable[[], Iterable[Tensor]]) -> None:
        """Set the threshold so that the mean L0 over rows y [n, d_in] is k.

        Several thresholds are all multiplied by one factor. Raises InputError without rows.
        """
        profile = self.threshold_profile()
        weight = 1 / profile if profile.ndim else None
        factor = calibrated_threshold(self, rows, weight, self.config.k)
        self.threshold.copy_(factor * profile)

    def threshold_profile(self) -> Tensor:
        """What `calibrate` multiplies by a factor, positive, of the threshold's shape."""
        return torch.ones_like(self.threshold)

    # ---- training ---------------------------------------------------------------------------

    def select(self, centred: Tensor, state: TrainingState) -> SparseCodes:
        """What is kept of a batch's pre-activations, all positive."""
        del state
        return self.largest(centred)

    def largest(self, centred: Tensor) -> SparseCodes:
        """The k B largest pre-activations of the batch."""
        budget = self.config.budget(ROWS.total(len(centred)))
        parts = kernels.encode_top_of_batch(
            centred, self.W_enc_T, self.b_enc, budget, hint=self._last_bar
        )
        codes = SparseCodes(*parts, self.d_sae)
        smallest = smallest_of(codes.value)
        if smallest.isfinite():
            self._last_bar = float(smallest)
        return codes

    def training_output(self, batch: TrainingBatch, state: TrainingState) -> TrainingOutput:
        """The objective on a batch; thresholds and densities move in training mode only."""
        centred = self.centred(batch)
        codes = self.select(centred, state)
        assert len(codes.index) <= self.config.budget(batch.total), "a selection exceeds its budget"
        counts = codes.counts()
        if self.training:
            self._observe(codes, counts, state)
        loss, terms, found = self.objective(batch, centred, codes, state)
        return TrainingOutput(loss, terms, counts, found)

    def objective(
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
        width: int | None = None,
    ) -> Tensor:
        """The loss with AuxK or aux_zipf added, by features below `width`; also put into terms."""
        config = self.config
        chosen = self.underused if config.auxiliary == "zipf" else state.dead
        if width is not None:
            chosen = chosen & (torch.arange(self.d_sae, device=chosen.device) < width)
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
        left out: its part of the residual is gone, and asking for it twice would shrink it.
        """
        residual, features = found.left_over(), chosen.nonzero()[:, 0]
        encoder, decoder = (losses.rows_of(W, features) for W in (self.W_enc_T, self.W_dec))
        if found.batch.visible is not None:  # what the residual is of
            decoder = decoder * ~found.batch.visible
        bias = self.b_enc.index_select(0, features)
        taken = codes.of(features)
        if len(features) <= self.k_aux:  # none is too many, and dense products on few are cheap
            pre = torch.relu(functional.linear(centred, encoder, bias))
            free = pre.new_ones(pre.shape).view(-1).index_fill_(0, taken.flat(), 0.0)
            e_hat = (pre * free.view_as(pre)) @ decoder
            left = kernels.total((residual - e_hat).square())
        else:
            parts = kernels.encode_top_of_batch(
                centred,
                encoder,
                bias,
                self.k_aux * ROWS.total(len(residual)),
                taken=(taken.row_ptr, taken.index),
            )
            left = losses.left_by(SparseCodes(*parts, len(features)), residual, decoder)
        return losses.unpredicted(residual, left, found.batch.target)

    @torch.no_grad()
    def _observe(self, codes: SparseCodes, counts: Tensor, state: TrainingState) -> None:
        config = self.config
        part = ROWS.sum(counts) / ROWS.total(codes.batch)
        running_mean_(self.density, part, self.density_updates, config.ema_decay)
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


def smallest_of(values: Tensor) -> Tensor:
    """The smallest of all ranks' values [entries], without gradient; inf if there is none."""
    none = values.new_full((1,), torch.inf)
    return ALL.min(torch.cat([values.detach(), none]).min())


def running_mean_(mean: Tensor, value: Tensor, updates: Tensor, decay: float) -> None:
    """Move a running average in place, and count it; the first update sets it (no bias).

    With t updates the mean is sum_s decay^(t-s) v_s / sum_s decay^(t-s).
    """
    updates += 1
    weight = (1 - decay) / (1 - decay ** updates.to(torch.float64))
    mean += (weight * (value - mean)).to(mean.dtype)


def calibrated_threshold(
    sae: SparseAutoencoder,
    rows: Callable[[], Iterable[Tensor]],
    weight: Tensor | None,
    k: float,
) -> float:
    """The threshold that pre-activations, times weight [d_sae], pass k times a row on average.

    0, and a word for people, if fewer are positive: all of these then pass. rows gives fresh
    iterators of y [n, d_in] at the normaliser's scale. Raises InputError without rows.
    """
    hint = 0.0
    seen = positive = 0

    def largest(part: Tensor, n: int) -> Tensor:
        nonlocal hint, seen, positive
        own = part[ROWS.share(len(part))]
        _, index, value = kernels.encode_top_of_batch(
            sae.encoder_input(own), sae.W_enc_T, sae.b_enc, n, weight=weight, hint=hint
        )
        score = ALL.gather(value if weight is None else value * weight[index])
        hint = float(score.min()) if len(score) == n else 0.0
        seen, positive = seen + len(part), positive + len(score)
        return score

    def chunks() -> Iterator[tuple[int, Callable[[int], Tensor]]]:
        nonlocal seen, positive
        seen = positive = 0
        for y in rows():
            for part in y.split(_CALIBRATION_ROWS):
                yield len(part), partial(largest, part)

    threshold = threshold_for_l0(chunks, k)
    if not threshold and positive < round(k * seen):
        say(
            f"{kind_of(sae.config)}: an L0 of {k:g} cannot be reached by thresholds: "
            f"{positive / seen:.1f} pre-activations a row are above 0, and all of them now count"
        )
    return threshold


def threshold_for_l0(
    chunks: Callable[[], Iterable[tuple[int, Callable[[int], Tensor]]]], k: float
) -> float:
    """The threshold >= 0 above which lie k scores a row: exactly round(k rows), but for ties.

    chunks gives fresh iterators of (number of rows, what gives the n largest positive scores of
    those rows). The largest of each are kept, and the threshold read off their order, half way
    between two: one pass, unless rows differ so much from chunk to chunk that too few were kept. 0
    if fewer are positive. Raises InputError without rows.
    """
    spare = 2.0
    while True:
        rows, bar, parts = 0, 0.0, []
        for number, largest in chunks():
            rows += number
            wanted = math.ceil(spare * k * number) + 1
            value = largest(wanted)
            if len(value) == wanted:  # perhaps more; above the bar is all kept
                bar = max(bar, float(value.min()))
            parts.append(value.float())
        if not rows:
            raise InputError("no rows to calibrate on", where="calibrate", given=0)
        values = torch.cat(parts).sort(descending=True).values
        count = max(1, round(k * rows))
        if len(values) > count and float(values[count]) >= bar:
            upper, lower = values[count - 1 : count + 1].double().tolist()
            middle = float(torch.tensor((upper + lower) / 2, dtype=torch.float32))
            return middle if middle < upper else lower
        if len(values) <= count and not bar:
            return 0.0
        spare *= 4


def fit_zipf(densities: Tensor) -> tuple[float, float]:
    """(alpha, beta) of the Zipf-Mandelbrot law density ~ 1 / (rank + beta)^alpha.

    Least squares in log density over densities [n], in any order, each weighted by itself: to
    second order that minimises the divergence of the law from how activations are shared out, and a
    tail of features that hardly fire does not bend it. alpha >= 0, and beta from 0 to 10 n. For a
    given beta it is a straight line; beta is found by search. Raises InputError if none is
    positive.

    >>> alpha, beta = fit_zipf(1 / (torch.arange(1, 101) + 4.0) ** 1.5)
    >>> round(alpha, 3), round(beta, 3)
    (1.5, 4.0)
    """
    density = densities.to(torch.float64).reshape(-1)
    density = density[density > 0].sort(descending=True).values
    n = len(density)
    if n == 0:
        raise InputError("no feature fires", where="fit_zipf", given=0)
    weight = (density / density.sum())[:, None]
    wanted = density.log()[:, None]
    wanted = wanted - (weight * wanted).sum(0)
    ranks = torch.arange(1, n + 1, dtype=torch.float64, device=density.device)[:, None]

    def lines(betas: Tensor) -> tuple[Tensor, Tensor]:
        x = (ranks + betas).log()
        x -= (weight * x).sum(0)
        slope = (weight * x * wanted).sum(0) / (weight * x.square()).sum(0).clamp_min(1e-300)
        return slope, (weight * (wanted - slope * x).square()).sum(0)

    low, high = math.log(1e-3), math.log(10.0 * n)
    grid, best = ranks.new_zeros(1), 0
    for _ in range(9):  # each round is 8 times finer
        grid = torch.linspace(low, high, 17, dtype=torch.float64, device=ranks.device)
        best = int(lines(grid.exp())[1].argmin())
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, 16)])
    betas = torch.stack([torch.zeros_like(grid[best]), grid[best].exp()])
    slope, error = lines(betas)
    chosen = int(error.argmin())
    return max(0.0, -float(slope[chosen])), float(betas[chosen])


def zipf_densities(densities: Tensor) -> Tensor:
    """What the law fitted to densities [n] gives each of them by its rank, float32 [n].

    Uniform 1 / n if none is positive.
    """
    n = len(densities)
    exact = densities.to(torch.float64)
    if not exact.any():
        return torch.full((n,), 1 / n, device=densities.device)
    alpha, beta = fit_zipf(exact)
    order = exact.argsort(descending=True, stable=True)
    ranks = torch.arange(1, n + 1, dtype=torch.float64, device=densities.device)
    log_law = -alpha * (ranks + beta).log()
    ranked = exact[order]
    misfit = torch.where(ranked > 0, ranked * (ranked.log() - log_law), 0.0)
    law = torch.empty_like(ranks)
    law[order] = (log_law + misfit.sum() / ranked.sum()).exp()
    return law.float()
