"""End-to-end training (Braun et al. 2024): the loss is what the reconstruction does to the model.

At the SAE's site, at kept positions, x_hat replaces the activation, and

    loss = KL(clean || spliced) + w FVU + v mean_k FVU_k + the architecture's own other terms

with KL in nats, averaged over kept source positions; w = 0 is their SAE_e2e. With v > 0, FVU_k is
the error at the residual stream after a later layer k, over that layer's variance in the batch
(their SAE_e2e+ds, which has squared errors). Gradients go through the model into x_hat alone: its
weights are frozen.

An architecture is not changed for it: it gets a batch whose reconstruction loss is this one. Losses
of prefixes (Matryoshka) or gates so go through the model, too, at the cost of a pass each.

The gradient in x_hat is taken a few sequences at a time, in the forward pass, so that logits of the
whole batch (rows x vocabulary) are never in memory.
"""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from activations import Model
from activations.models.blocks_below import BlocksBelow
from sae.core.base import SparseAutoencoder, TrainingOutput
from sae.core.batch import RawBatch, TrainingBatch
from sae.evaluation.divergence import DivergenceOfLogits
from saescope.config import Config
from saescope.errors import InputError, check_range


@dataclass(frozen=True, kw_only=True)
class EndToEndConfig(Config):
    """The terms of the loss beside the KL divergence, and how much is computed at once."""

    reconstruction_weight: float = 0.0
    """w: weight of the usual reconstruction loss."""
    downstream_weight: float = 0.0
    """v: weight of the errors at the residual stream after later layers."""
    sequences_at_once: int = 4
    """Sequences that go through the model at once; bounds the memory for their logits."""

    def __post_init__(self) -> None:
        check_range("end_to_end.reconstruction_weight", self.reconstruction_weight, low=0)
        check_range("end_to_end.downstream_weight", self.downstream_weight, low=0)
        check_range("end_to_end.sequences_at_once", self.sequences_at_once, low=1)


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """The text that a batch's rows are from."""

    tokens: Int64[Tensor, "sequence pos"]
    keep: Bool[Tensor, "sequence pos"]
    """positions that have a row; rows are in the order of positions"""
    later: dict[str, Float[Tensor, "rows d_model"]] = field(default_factory=dict)
    """clean activations of later sites at these positions"""
    below: list[Any] = field(default_factory=list)
    """of each few sequences that go through the model at once, what the blocks below the site
    give; empty where they are run again"""


@dataclass(frozen=True)
class SequenceRows(RawBatch):
    """Rows of whole sequences, and the sequences."""

    sequences: Sequences = field(kw_only=True)

    def select(self, rows: Tensor | slice) -> RawBatch:
        """Raises InputError: a sequence goes through a model only as a whole."""
        raise InputError(
            "end-to-end training takes whole batches; bound the memory by sequences_at_once",
            where="end_to_end",
            given=rows,
        )


class EndToEndLoss(NamedTuple):
    """What `EndToEnd.loss` returns."""

    loss: Tensor
    """scalar, differentiable in x_hat: KL + v downstream"""
    terms: dict[str, Tensor]
    """"kl" and, where weighted, "downstream": detached scalars"""


class EndToEnd:
    """The end-to-end loss of one site of a model.

    Args: balanced: KL and FVU count alike, as in `balance`; `reconstruction_weight` is not used.

    Raises InputError for an unknown site, or if downstream errors are asked for where no layer
    follows.

    >>> end_to_end = EndToEnd(model, site, EndToEndConfig())  # doctest: +SKIP
    >>> batch = end_to_end.batch(sae, rows, maker.make(rows, generator))  # doctest: +SKIP
    >>> output = batch.finish(sae.training_output(batch, state))  # doctest: +SKIP
    """

    def __init__(
        self, model: Model, site: str, config: EndToEndConfig, *, balanced: bool = False
    ) -> None:
        self.model, self.config, self.balanced = model, config, balanced
        (self.site,) = model.resolve([site])
        self.below = BlocksBelow(model, self.site)
        self.later_sites = _later_sites(model, self.site) if config.downstream_weight else []
        if config.downstream_weight and not self.later_sites:
            raise InputError(
                "no layer follows this site",
                where="end_to_end.downstream_weight",
                given=config.downstream_weight,
                allowed="0",
            )

    def capture(self, tokens: Tensor, keep: Tensor) -> tuple[Tensor, Sequences]:
        """The rows x float32 [rows, d_in] of kept positions, and what `loss` needs of them."""
        wanted, size = [self.site, *self.later_sites], self.config.sequences_at_once
        found: dict[str, list[Tensor]] = {site: [] for site in wanted}
        below: list[Any] = []
        for some, kept in zip(tokens.split(size), keep.split(size), strict=True):
            with self.below.keeping() as given:
                values = self.model.capture(some, wanted)
            below += given[-1:]
            for site, value in values.items():
                rows = value[kept.to(value.device)]
                found[site].append(rows.to(torch.promote_types(rows.dtype, torch.float32)))
        rows = {site: torch.cat(pieces) for site, pieces in found.items()}
        x = rows.pop(self.site)
        return x, Sequences(tokens=tokens, keep=keep, later=rows, below=below)

    def loss(self, sequences: Sequences, x_hat: Float[Tensor, "rows d_in"]) -> EndToEndLoss:
        """The loss if x_hat, in the model's units, replaces the kept rows.

        Raises InputError if there is not one row a kept position.
        """
        if len(x_hat) != int(sequences.keep.sum()):
            raise InputError(
                "one row a kept position is needed",
                where="EndToEnd.loss",
                given=len(x_hat),
                allowed=str(int(sequences.keep.sum())),
            )
        terms: dict[str, Tensor] = {}
        loss = _ThroughModel.apply(x_hat, lambda leaf: self._in_pieces(sequences, leaf, terms))
        return EndToEndLoss(loss, terms)  # type: ignore[arg-type]

    def _in_pieces(
        self, sequences: Sequences, x_hat: Tensor, terms: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The loss and its gradient in x_hat; fills `terms`."""
        later, size = sequences.later, self.config.sequences_at_once
        variance = {
            site: (rows - rows.mean(0)).square().sum(1).mean() for site, rows in later.items()
        }
        gradient = torch.zeros_like(x_hat)
        sums = torch.zeros(2, dtype=torch.float64)
        start = 0
        pieces = zip(sequences.tokens.split(size), sequences.keep.split(size), strict=True)
        for number, (tokens, keep) in enumerate(pieces):
            rows = slice(start, start + int(keep.sum()))
            start = rows.stop
            if rows.start == rows.stop:
                continue
            below = self._below(sequences, number)
            with torch.enable_grad(), below:
                leaf = x_hat[rows].detach().requires_grad_()
                kl, spliced = self._spliced(tokens, keep, leaf)
                downstream = kl.new_zeros(())
                for site, clean in later.items():
                    error = (spliced[site] - clean[rows]).square().sum()
                    downstream = downstream + error / (variance[site] * len(later))
                loss = (kl + self.config.downstream_weight * downstream) / len(x_hat)
                (gradient[rows],) = torch.autograd.grad(loss, leaf)
            both = torch.stack([kl, downstream]).detach().to(sums) / len(x_hat)
            sums += both
        terms["kl"] = sums[0].to(x_hat)
        if later:
            terms["downstream"] = sums[1].to(x_hat)
        return (sums[0] + self.config.downstream_weight * sums[1]).to(x_hat), gradient

    def _below(self, sequences: Sequences, number: int) -> AbstractContextManager[None]:
        """A context in which what is below the site is known, for some of the sequences."""
        return self.below.skipping(sequences.below[number]) if sequences.below else nullcontext()

    def _spliced(
        self, tokens: Tensor, keep: Tensor, x_hat: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of KL over kept positions, and later sites' activations there."""
        keep = keep.to(self.model.device)
        found: dict[str, Tensor] = {}

        def splice(h: Tensor, _: Tensor) -> Tensor:
            return torch.index_put(h, (keep,), x_hat.to(h))

        def watching(site: str) -> Callable[[Tensor, Tensor], None]:
            def see(h: Tensor, _: Tensor) -> None:
                found[site] = h[keep].to(x_hat)

            return see

        clean = self.model.logits(tokens)[keep]
        edits = {self.site: splice, **{site: watching(site) for site in self.later_sites}}
        with self.model.edit(edits):
            spliced = self.model.logits(tokens, gradient=True)[keep]
        divergence: Tensor = DivergenceOfLogits.apply(clean, spliced)  # type: ignore[assignment]
        return divergence.sum().to(x_hat.device), found

    def batch(
        self, sae: SparseAutoencoder, raw: SequenceRows, batch: TrainingBatch
    ) -> "EndToEndBatch":
        """The batch of these rows, with the end-to-end loss instead of the reconstruction's.

        Raises InputError for a batch with hidden coordinates, tilt, layers, or another target.
        """
        odd = (batch.visible is not None, bool(batch.tilt), batch.group is not None)
        if any(odd) or batch.target is not batch.y:
            raise InputError(
                "end-to-end training is of one site that is read and reconstructed, without "
                "tilt or hidden coordinates",
                where="end_to_end",
            )
        return EndToEndBatch(
            **vars(batch),
            end_to_end=self,
            sequences=raw.sequences,
            restore=lambda y_hat: sae.normaliser_out.invert(y_hat, like=raw.x),
        )


class _ThroughModel(torch.autograd.Function):
    """A scalar whose gradient was computed in the forward pass, and is used in the backward one."""

    @staticmethod
    def forward(
        ctx: Any, x_hat: Tensor, compute: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> Tensor:
        loss, gradient = compute(x_hat.detach())
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return upstream[0] * gradient, None


@dataclass(frozen=True, kw_only=True)
class EndToEndBatch(TrainingBatch):
    """A training batch whose reconstruction loss is the end-to-end loss."""

    end_to_end: EndToEnd
    sequences: Sequences
    restore: Callable[[Tensor], Tensor]
    """from the normaliser's scale to the model's units"""
    _seen: list[tuple[Tensor, dict[str, Tensor]]] = field(default_factory=list, init=False)

    def reconstruction(self, y_hat: Tensor) -> Tensor:
        """KL + v downstream errors + w FVU of y_hat [batch, d_out]."""
        found = self.end_to_end.loss(self.sequences, self.restore(y_hat))
        fvu = super().reconstruction(y_hat)
        self._seen.append((y_hat, {"fvu": fvu.detach(), **found.terms}))
        if self.end_to_end.balanced:
            return balance(found.loss, fvu)
        weight = self.end_to_end.config.reconstruction_weight
        return found.loss + weight * fvu if weight else found.loss

    def finish(self, output: TrainingOutput) -> TrainingOutput:
        """The architecture's output with its "fvu" replaced, and "kl" and "downstream" added."""
        terms = self._seen[-1][1]
        for y_hat, found in self._seen:
            if y_hat is output.y_hat:
                terms = found
        return output._replace(terms={**output.terms, **terms})


def balance(kl: Tensor, fvu: Tensor) -> Tensor:
    """(alpha KL + FVU) / 2, alpha = FVU / KL without gradient (Karvonen 2025, arXiv 2503.17272).

    The value is the FVU's, and of its relative changes each of the two has half. A KL of 0 leaves
    half the FVU.
    """
    alpha = torch.where(kl > 0, fvu / kl, 0.0).detach()
    return (alpha * kl + fvu) / 2


def _later_sites(model: Model, site: str) -> list[str]:
    """The residual stream after each layer from the site on, without the site itself."""
    layer = re.match(r"blocks\.(\d+)\.", site)
    if layer is None and site != "hook_embed":
        raise InputError(
            "which layers follow this site is not known",
            where="end_to_end.downstream_weight",
            given=site,
            allowed="sites of blocks",
        )
    first = int(layer.group(1)) if layer else 0
    after = [f"blocks.{n}.hook_resid_post" for n in range(first, model.n_layers)]
    return [each for each in after if each != site]
