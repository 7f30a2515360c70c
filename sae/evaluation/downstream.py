"""What replacing activations does to the model: delta CE, KL, CE recovered.

At kept positions of held-out sequences the site's activation is replaced by the SAE's
reconstruction, by zero, or by the mean activation; other positions are left alone. What the SAE
reads is the untouched model's activation: a transcoder's output site is replaced by its prediction
from the input site, a crosscoder's sites by its reconstructions, all at once or one of them.
Cross-entropy and KL are averaged over kept source positions that have a next token.
    delta CE     = CE_sae - CE_clean                                (Gao et al. 2024, section 4.1)
    KL           = mean KL(clean || with the SAE)                   (Braun et al. 2024, section 2)
    CE recovered = (CE_ablated - CE_sae) / (CE_ablated - CE_clean)
                                              (loss recovered; Rajamanoharan et al. 2024, section 2)
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import repeat
from torch import Tensor

from sae.evaluation import metric_family
from sae.evaluation.divergence import divergence_in_place
from sae.evaluation.in_model import InModel, Replacement, Splice
from sae.evaluation.intervals import by_cluster, half_width
from saescope.errors import InputError
from saescope.integers import as_index
from saescope.metrics import metric
from saescope.progress import Progress

if TYPE_CHECKING:
    from activations import Model


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
    ce_clean_interval: float | None = None
    """half width of its 95% interval, as those below"""
    ce_interval: float | None = None
    ce_zero_interval: float | None = None
    ce_mean_interval: float | None = None
    recovered_zero_interval: float | None = None
    recovered_mean_interval: float | None = None


_METRICS = (
    "ce_clean",
    "ce",
    "ce_mean",
    "ce_zero",
    "delta_ce",
    "kl",
    "recovered_mean",
    "recovered_zero",
)


@metric_family("downstream", needs="model", metrics=tuple(metric(name) for name in _METRICS))
def downstream(given: InModel) -> dict[str, Any]:
    """`Downstream` by name."""
    return asdict(measure_in_model(given))


def measure_downstream(
    model: "Model",
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
        document, attention_mask, batch: see `InModel`.

    Raises InputError if no position is kept, or for a mean of another width than the targets.
    """
    given = InModel(
        model=model,
        read=_names(site),
        written=_names(site if target is None else target),
        replacement=sae,
        mean=mean,
        tokens=tokens,
        keep=keep,
        document=document,
        attention_mask=attention_mask,
        batch=batch,
    )
    return measure_in_model(given)


@torch.inference_mode()
def measure_in_model(given: InModel) -> Downstream:
    """Measure as `measure_downstream` does, whose errors it raises."""
    batch = as_index(given.batch, where="batch", low=1)
    tokens, mean, real = given.tokens, given.mean, given.real()
    keep = given.keep & real.to(given.keep.device)
    splice = given.splice()
    _check(given, splice)
    replacements: Mapping[str, Replacement] = {
        "sae": given.replacement,
        "zero": lambda x: x.new_zeros(1, len(mean)).expand(len(x), -1),
        "mean": lambda x: mean.to(x).expand(len(x), -1),
    }
    sums: dict[str, list[Tensor]] = {name: [] for name in ("clean", "kl", *replacements)}
    with Progress("measuring the model's loss", len(tokens), "sequences") as progress:
        for start in range(0, len(tokens), batch):
            each = slice(start, start + batch)
            sequences = _Sequences(tokens[each], keep[each], real[each])
            _measure_batch(splice, replacements, sequences, sums)
            progress.advance(len(sequences.tokens))
    counted = keep[:, :-1] & real[:, 1:].to(keep.device)
    if not counted.any():
        raise InputError("no kept positions to evaluate on", where="measure_downstream", given=0)
    document = given.document
    if (unit := document) is None:
        own = torch.arange(len(tokens))
        unit = repeat(own, "sequence -> sequence position", position=tokens.shape[1])
    values = {name: torch.cat(parts)[counted] for name, parts in sums.items()}
    return _summarise(values, unit[:, :-1][counted], documented=document is not None)


def _check(given: InModel, splice: Splice) -> None:
    if len(given.mean) != sum(splice.widths):
        raise InputError(
            "a mean of another width than the sites replaced",
            where="measure_downstream",
            given=len(given.mean),
            allowed=str(sum(splice.widths)),
        )
    if given.document is not None and given.document.shape != given.tokens.shape:
        raise InputError(
            "needs the document of every token",
            where="document",
            given=tuple(given.document.shape),
            allowed=str(tuple(given.tokens.shape)),
        )


def _names(sites: str | Sequence[str]) -> list[str]:
    return [sites] if isinstance(sites, str) else list(sites)


@dataclass(frozen=True)
class _Sequences:
    """Some sequences [sequence, position]."""

    tokens: Tensor
    keep: Tensor
    real: Tensor
    """false at padding"""


def _measure_batch(
    splice: Splice,
    replacements: Mapping[str, Replacement],
    sequences: _Sequences,
    sums: dict[str, list[Tensor]],
) -> None:
    keep = sequences.keep
    targets = sequences.tokens[:, 1:, None]

    def logits() -> Tensor:
        found = splice.model.logits(sequences.tokens, attention_mask=sequences.real)
        return found[:, :-1].float()

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
            sums["kl"].append(divergence_in_place(clean, z).double())


def _summarise(values: Mapping[str, Tensor], unit: Tensor, *, documented: bool) -> Downstream:
    """From values at each counted position [positions], and what is independent of what else."""
    weights = by_cluster(torch.ones(len(unit), dtype=torch.float64), unit)

    def mean(name: str) -> float:
        return float(values[name].mean())

    def interval(each: Tensor) -> float | None:
        return half_width(by_cluster(each, unit), weights)

    clean, ce = mean("clean"), mean("sae")

    def recovered(ablated: str) -> tuple[float | None, float | None]:
        if not mean(ablated) > clean:
            return None, None
        undone, harm = (values[ablated] - values[name] for name in ("sae", "clean"))
        half = half_width(by_cluster(undone, unit), by_cluster(harm, unit))
        return (mean(ablated) - ce) / (mean(ablated) - clean), half

    zero, mean_ablated = recovered("zero"), recovered("mean")
    return Downstream(
        tokens=len(unit),
        ce_clean=clean,
        ce_clean_interval=interval(values["clean"]),
        ce=ce,
        ce_interval=interval(values["sae"]),
        delta_ce=ce - clean,
        delta_ce_interval=interval(values["sae"] - values["clean"]),
        kl=mean("kl"),
        kl_interval=interval(values["kl"]),
        ce_zero=mean("zero"),
        ce_zero_interval=interval(values["zero"]),
        ce_mean=mean("mean"),
        ce_mean_interval=interval(values["mean"]),
        recovered_zero=zero[0],
        recovered_zero_interval=zero[1],
        recovered_mean=mean_ablated[0],
        recovered_mean_interval=mean_ablated[1],
        documents=len(weights) if documented else None,
    )
