"""What replacing activations does to the model: delta CE, KL, CE recovered.

At kept positions of held-out sequences the site's activation is replaced by the SAE's
reconstruction, by zero, or by the mean activation; other positions are left alone. What the SAE
reads is the untouched model's activation: a transcoder's output site is replaced by its prediction
from the input site, a crosscoder's sites by its reconstructions, all at once or one of them.
Cross-entropy and KL are averaged over kept source positions that have a next token.
    delta CE     = CE_sae - CE_clean
    CE recovered = (CE_ablated - CE_sae) / (CE_ablated - CE_clean)
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from activations import Model
from activations.sites.kept import real_tokens
from sae.evaluation.intervals import by_cluster, half_width
from saescope.errors import InputError
from saescope.integers import as_index
from saescope.progress import Progress

Replacement = Callable[[Tensor], Tensor]
"""Activations [rows, d_in] float32 to what stands in for them, [rows, d_out]."""


@dataclass(frozen=True, kw_only=True)
class Downstream:
    """Nats a token; an interval is half of a 95% one, None where there are too few documents."""

    tokens: int
    """kept source positions averaged over"""
    ce_clean: float
    """cross-entropy of the untouched model"""
    ce: float
    """cross-entropy with the SAE in place"""
    delta_ce: float
    """ce - ce_clean"""
    delta_ce_interval: float | None
    """half width of its 95% interval (paired; `sae.evaluation.intervals`)"""
    kl: float
    """KL(clean || with the SAE)"""
    kl_interval: float | None
    """half width of its 95% interval"""
    ce_zero: float
    """cross-entropy with zeros in place"""
    ce_mean: float
    """cross-entropy with the mean activation in place"""
    recovered_zero: float | None
    """CE recovered against zero-ablation; None if ablation does no harm"""
    recovered_mean: float | None
    """CE recovered against mean-ablation; None if ablation does no harm"""
    documents: int | None
    """documents of these tokens, the intervals' unit; None: not known, sequences are it"""


@torch.inference_mode()
def measure_downstream(
    model: Model,
    site: str | Sequence[str],
    sae: Replacement,
    mean: Tensor,
    tokens: Tensor,
    keep: Tensor,
    *,
    target: str | Sequence[str] | None = None,
    document: Tensor | None = None,
    attention_mask: Tensor | None = None,
    batch: int = 4,
) -> Downstream:
    """Measure on sequences tokens int64 [sequence, position] with keep bool of the same shape.

    Args:
        site: where activations are read; several are put side by side.
        sae: what it does to them, [rows, d_in] to [rows, d_out].
        mean: [d_out], the ablation's constant.
        target: where its output goes, in the order of its columns; `site` if not given.
        document: int64 of tokens' shape, which document each is of: its tokens are not independent
            of each other. If not given, sequences are taken for documents.
        attention_mask: [sequence, position], 0 at padding, which is neither replaced nor predicted.

    Raises InputError if no position is kept, or for a mean of another width than the targets.
    """
    batch = as_index(batch, where="batch", low=1)
    real = real_tokens(tokens, attention_mask)
    keep = keep & real.to(keep.device)
    splice = _Splice(model, _names(site), _names(site if target is None else target))
    if len(mean) != sum(splice.widths):
        raise InputError(
            "a mean of another width than the sites replaced",
            where="measure_downstream",
            given=len(mean),
            allowed=str(sum(splice.widths)),
        )
    replacements: Mapping[str, Replacement] = {
        "sae": sae,
        "zero": lambda x: x.new_zeros(1, len(mean)).expand(len(x), -1),
        "mean": lambda x: mean.to(x).expand(len(x), -1),
    }
    if document is not None and document.shape != tokens.shape:
        raise InputError(
            "needs the document of every token",
            where="document",
            given=tuple(document.shape),
            allowed=str(tuple(tokens.shape)),
        )
    sums: dict[str, list[Tensor]] = {name: [] for name in ("clean", "kl", *replacements)}
    with Progress("measuring the model's loss", len(tokens), "sequences") as progress:
        for start in range(0, len(tokens), batch):
            each = slice(start, start + batch)
            part = _Part(tokens[each], keep[each], real[each])
            _measure_batch(model, splice, replacements, part, sums)
            progress.advance(len(part.tokens))
    counted = keep[:, :-1] & real[:, 1:].to(keep.device)
    if not counted.any():
        raise InputError("no kept positions to evaluate on", where="measure_downstream", given=0)
    unit = torch.arange(len(tokens))[:, None].expand(tokens.shape) if document is None else document
    values = {name: torch.cat(parts)[counted] for name, parts in sums.items()}
    return _summarise(values, unit[:, :-1][counted], documented=document is not None)


def _names(sites: str | Sequence[str]) -> list[str]:
    return [sites] if isinstance(sites, str) else list(sites)


class _Splice:
    """Reads some sites in one run of a model, replaces some in another."""

    def __init__(self, model: Model, read: list[str], written: list[str]) -> None:
        self.model, self.read, self.written = model, read, written
        self.widths = [model.d_in(site) for site in written]
        self._seen: dict[str, Tensor] = {}

    def reading(self, keep: Tensor) -> AbstractContextManager[None]:
        """Within the block, a run's activations at kept positions are remembered."""

        def remember(site: str) -> Callable[[Tensor, Tensor], None]:
            def see(h: Tensor, _: Tensor) -> None:
                self._seen[site] = h[keep].float()

            return see

        return self.model.edit({site: remember(site) for site in self.read})

    def replacing(self, replacement: Replacement, keep: Tensor) -> AbstractContextManager[None]:
        """Within the block, kept positions are replaced; made from what `reading` saw."""
        x = torch.cat([self._seen[site] for site in self.read], dim=-1)
        parts = replacement(x).split(self.widths, dim=-1)
        edits = zip(self.written, parts, strict=True)
        return self.model.edit({site: _replace_kept(part, keep) for site, part in edits})


@dataclass(frozen=True)
class _Part:
    """Some sequences [sequence, position]."""

    tokens: Tensor
    keep: Tensor
    real: Tensor
    """false at padding"""


def _measure_batch(
    model: Model,
    splice: _Splice,
    replacements: Mapping[str, Replacement],
    part: _Part,
    sums: dict[str, list[Tensor]],
) -> None:
    keep = part.keep
    targets = part.tokens[:, 1:, None]

    def logits() -> Tensor:
        return model.logits(part.tokens, attention_mask=part.real)[:, :-1].float()

    def cross_entropy(z: Tensor) -> Tensor:
        return (z.logsumexp(-1) - z.gather(-1, targets)[..., 0]).double()

    with splice.reading(keep):
        clean = logits()
    sums["clean"].append(cross_entropy(clean))
    for name, replacement in replacements.items():
        with splice.replacing(replacement, keep):
            z = logits()
        sums[name].append(cross_entropy(z))
        if name == "sae":
            sums["kl"].append(_kl(clean, z).double())


def _kl(clean: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(other)) over the last axis; the arguments are overwritten."""
    log_p = clean.sub_(clean.logsumexp(-1, keepdim=True))
    log_q = other.sub_(other.logsumexp(-1, keepdim=True))
    log_q.neg_().add_(log_p)
    return log_q.mul_(log_p.exp_()).sum(-1)


def _replace_kept(rows: Tensor, keep: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def edit(h: Tensor, _: Tensor) -> Tensor:
        out = h.clone()
        out[keep] = rows.to(h.dtype)
        return out

    return edit


def _summarise(values: Mapping[str, Tensor], unit: Tensor, *, documented: bool) -> Downstream:
    """From values at each counted position [positions], and what is independent of what else."""
    weights = by_cluster(torch.ones(len(unit), dtype=torch.float64), unit)

    def mean(name: str) -> float:
        return float(values[name].mean())

    def interval(each: Tensor) -> float | None:
        return half_width(by_cluster(each, unit), weights)

    clean, ce = mean("clean"), mean("sae")

    def recovered(ablated: float) -> float | None:
        harm = ablated - clean
        return (ablated - ce) / harm if harm > 0 else None

    return Downstream(
        tokens=len(unit),
        ce_clean=clean,
        ce=ce,
        delta_ce=ce - clean,
        delta_ce_interval=interval(values["sae"] - values["clean"]),
        kl=mean("kl"),
        kl_interval=interval(values["kl"]),
        ce_zero=mean("zero"),
        ce_mean=mean("mean"),
        recovered_zero=recovered(mean("zero")),
        recovered_mean=recovered(mean("mean")),
        documents=len(weights) if documented else None,
    )
