"""Core metrics by SAELens, by SAEBench and by us: the same SAE, activations, tokens and model.

    python -m benchmarks.core_metrics --sae runs/smollm2-135m-topk-quick --harvest data/...-quick

The libraries' own functions run in an environment of their own, with the SAE exported to SAELens'
format, on the harvest's held-out rows and, for the losses, on its first held-out sequences through
the model in float32. Column `ours` is what `saescope eval` would say; where a library defines
something else, `by_formula` is its formula computed by us, in float64 from the same rows, so that
the difference is one of definition and of nothing else (`difference` is to that).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from activations import load_model
from activations.loading.unshuffled import aligned_rows
from activations.models.files import folder_of
from benchmarks.peers.environments import ABSORPTION as SAEBENCH
from benchmarks.peers.in_core_metrics import HIDDEN
from benchmarks.running import run, run_peer
from sae.bench import rows as results
from sae.commands.convert import ConvertConfig, convert
from sae.data.harvests import open_harvest
from sae.evaluation import families
from sae.evaluation.divergence import divergence_in_place
from sae.evaluation.downstream import measure_downstream
from sae.evaluation.rows import Piece, pass_over
from sae.formats.load import load
from saescope.config import Config
from saescope.errors import check_range
from saescope.paths import remove
from saescope.progress import say

COLUMNS = (
    "date",
    "library",
    "version",
    "metric",
    "theirs",
    "ours_name",
    "ours",
    "by_formula",
    "difference",
    "rows",
    "sequences",
    "batch",
    "processor",
    "threads",
    "torch",
    "python",
    "saescope",
    "commit",
)
LIBRARIES = {"sae_lens": "sae-lens", "sae_bench": "sae-bench"}
SCRIPT = Path(__file__).parent / "peers" / "in_core_metrics.py"
OURS = {
    "l0": "l0",
    "cossim": "cosine",
    "l2_ratio": "l2_ratio",
    "relative_reconstruction_bias": "reconstruction_bias",
    "explained_variance": "fvu",
    "explained_variance_legacy": "fvu",
    "mse": "",
    "ce_loss_without_sae": "ce_clean",
    "ce_loss_with_sae": "ce",
    "ce_loss_with_ablation": "ce_zero",
    "ce_loss_score": "recovered_zero",
    "kl_div_with_sae": "kl",
}
"""the libraries' names, and ours for what is meant by them; FVU is 1 - explained variance"""


@dataclass(frozen=True, kw_only=True)
class CoreMetricsConfig(Config):
    """Compare core metrics with those of SAELens and SAEBench."""

    sae: str
    """Folder of the run or SAE, of one site of a language model."""
    harvest: str | None = None
    """Its harvest; the one it was trained on if not given."""
    tokens: int = 2048
    """Held-out tokens that the model is run on."""
    batch: int = 16
    """Sequences a batch, in the libraries: some of their figures depend on it."""
    threads: int = 1
    """Threads of torch, in all."""
    work: str = "build/peers"
    """Folder for the environment and for what is written."""
    results: str = "benchmarks/results/core_metrics.csv"
    """File that rows are added to."""

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "threads"):
            check_range(name, getattr(self, name), low=1)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Held-out sequences, and their activations at the SAE's site."""

    tokens: Tensor
    """int64 [sequence, position]"""
    keep: Tensor
    """bool [sequence, position]"""
    activations: Tensor
    """float32 [sequence, position, d_in], zeros where not kept"""
    document: Tensor
    """int64 [sequence, position]"""

    def pieces(self, sequences: int) -> Iterator[Piece]:
        """The kept rows of so many sequences at a time."""
        each = zip(
            self.activations.split(sequences),
            self.keep.split(sequences),
            self.document.split(sequences),
            strict=True,
        )
        for x, keep, document in each:
            yield Piece(x[keep], x[keep], document[keep])


def main(config: CoreMetricsConfig) -> None:
    """Run the libraries and ours; rows in the results, and all of them on the screen."""
    torch.set_num_threads(config.threads)
    folder = Path(config.work).absolute() / "core-metrics"
    remove(folder)
    folder.mkdir(parents=True)
    convert(ConvertConfig(source=config.sae, out=str(folder / "sae"), to="saelens"))
    harvest, placement = open_harvest(load(config.sae), config.harvest, None)
    site, facts = placement.read[0], harvest.manifest["model"]
    data = held_out(harvest, site)
    sequences = max(1, config.tokens // harvest.context)
    given = {
        "tokens": torch.where(data.keep, data.tokens, data.tokens + HIDDEN),
        "activations": data.activations,
    }
    save_file(given, str(folder / "data.safetensors"))
    settings = {
        "model": str(folder_of(facts["spec"], facts["revision"])[0]),
        "sae": str(folder / "sae"),
        "data": str(folder / "data.safetensors"),
        "site": site,
        "batch": config.batch,
        "sequences": sequences,
        "threads": config.threads,
    }
    theirs = run_peer(SAEBENCH, SCRIPT, settings, Path(config.work), folder)
    mean = torch.from_numpy(harvest.statistics(site).mean)
    ours = {
        **of_rows(placement.sae, data),
        **in_model(placement.sae, data, facts["spec"], site, mean, sequences),
    }
    x = data.activations
    x_hat = torch.zeros_like(x)
    x_hat[data.keep] = placement.sae(x[data.keep]).x_hat.detach()
    found = list(compared(theirs, ours, formulas(x, x_hat, data.keep, config.batch)))
    common = {k: v for k, v in results.facts("cpu").items() if k in COLUMNS}
    measured = {"rows": int(data.keep.sum()), "sequences": sequences, "batch": config.batch}
    results.append(Path(config.results), [{**row, **measured, **common} for row in found], COLUMNS)
    for row in found:
        say(
            f"{row['library']:<10} {row['metric']:<30} {row['theirs']:>12} "
            f"ours {row['ours'] or '-':>12} formula {row['by_formula'] or '-':>12}"
        )
    remove(folder)


def page_lines(table: Sequence[Mapping[str, str]]) -> list[str]:
    """The table of the page: each metric by both libraries and by us, from the last rows."""
    last = {(row["library"], row["metric"]): row for row in table}
    lines = ["| theirs | SAELens | SAEBench | ours | |", "|---|---|---|---|---|"]
    for name in OURS:
        lens, bench = (last[package, name] for package in LIBRARIES.values())
        formulas_ = [f"{float(x):.5g}" for row in (lens, bench) if (x := row["by_formula"])]
        own = f"{float(lens['ours']):.5g} (`{lens['ours_name']}`)" if lens["ours"] else "-"
        shown = [f"{float(row['theirs']):.5g}" for row in (lens, bench)]
        about = f"by their formula {', '.join(dict.fromkeys(formulas_))}" if formulas_ else "equal"
        lines.append(f"| `{name}` | {shown[0]} | {shown[1]} | {own} | {about} |")
    return lines


def held_out(harvest: Any, site: str) -> Data:
    """The held-out part of a harvest, by sequence and position."""
    chosen = np.flatnonzero(harvest.split == 1)
    tokens = torch.from_numpy(np.asarray(harvest.tokens[chosen])).long()
    number = torch.zeros(len(harvest.split), dtype=torch.long)
    number[torch.from_numpy(chosen)] = torch.arange(len(chosen))
    activations = torch.zeros(*tokens.shape, harvest.d_in(site))
    keep = torch.zeros(tokens.shape, dtype=torch.bool)
    for (x,), row in aligned_rows(harvest, (site,), split="held_out"):
        at = number[row // harvest.context], row % harvest.context
        activations[at], keep[at] = x, True
    document = torch.from_numpy(np.asarray(harvest.document[chosen])).long()
    return Data(tokens=tokens, keep=keep, activations=activations, document=document)


def of_rows(sae: Any, data: Data) -> dict[str, Any]:
    """Our metrics of rows, as `saescope eval` measures them."""
    wanted = [each.measure for name in ("density", "reconstruction", "shrinkage")
              for each in [families()[name]]]  # fmt: skip
    counted, sums = pass_over(sae, lambda: data.pieces(16), wanted)
    return {name: value for one in sums for name, value in one.values(counted).items()}


def in_model(
    sae: Any, data: Data, model: str, site: str, mean: Tensor, sequences: int
) -> dict[str, Any]:
    """Our metrics of the model's loss, in float32, and two as the libraries define them.

    "ce_zero_all" is the loss with zeros at all positions, averaged where ours is; "kl_all" the
    divergence averaged over all kept positions, the last of a sequence among them.
    """
    loaded = load_model(model, dtype="float32")
    some = (data.tokens[:sequences], data.keep[:sequences])
    found = measure_downstream(
        loaded, site, lambda x: sae(x).x_hat, mean, *some, document=data.document[:sequences]
    )
    with torch.inference_mode():
        loss, divergence = _as_they_define(loaded, sae, site, *some)
    counted, kept = int(some[1][:, :-1].sum()), int(some[1].sum())
    return {**vars(found), "ce_zero_all": loss / counted, "kl_all": divergence / kept}


def _as_they_define(
    model: Any, sae: Any, site: str, tokens: Tensor, keep: Tensor
) -> tuple[float, float]:
    """Sums of the loss with zeros everywhere where ours is counted, and of KL where we keep."""
    loss = divergence = 0.0
    for some, kept in zip(tokens.split(4), keep.split(4), strict=True):

        def with_sae(h: Tensor, _: Tensor, kept: Tensor = kept) -> Tensor:
            out = h.clone()
            out[kept] = sae(h[kept]).x_hat
            return out

        found = []
        for edits in ({}, {site: with_sae}, {site: lambda h, _: torch.zeros_like(h)}):
            with model.edit(edits):
                found.append(model.logits(some, attention_mask=torch.ones_like(some)).float())
        clean, spliced, zeros = found
        z = zeros[:, :-1]
        each = z.logsumexp(-1) - z.gather(-1, some[:, 1:, None])[..., 0]
        loss += float(each[kept[:, :-1]].sum(dtype=torch.float64))
        kl = divergence_in_place(clean, spliced)
        divergence += float(kl[kept].sum(dtype=torch.float64))
    return loss, divergence


def formulas(x: Tensor, x_hat: Tensor, keep: Tensor, batch: int) -> dict[str, dict[str, float]]:
    """What the libraries' definitions give that differ from ours, from rows in float64.

    x, x_hat: [sequence, position, d_in]; batches are of so many sequences.
    """
    pairs = [
        (one[kept].double(), other[kept].double())
        for one, other, kept in zip(
            x.split(batch), x_hat.split(batch), keep.split(batch), strict=True
        )
    ]
    error = [(a - b).square().sum(1) for a, b in pairs]
    # mean of ratios, each with its batch's mean
    legacy = [
        1 - e / (a - a.mean(0)).square().sum(1) for e, (a, _) in zip(error, pairs, strict=True)
    ]
    bias = [b.square().sum(1).mean() / (a * b).sum(1).mean() for a, b in pairs]
    both = {
        "explained_variance_legacy": float(torch.cat(legacy).mean()),
        "relative_reconstruction_bias": float(torch.stack(bias).mean()),
    }
    # "variance": E||x||^2 less the square of the mean over coordinates of E[x_d^2], a number of
    # another unit; a mean over batches of means
    square = torch.stack([a.square().sum(1).mean() for a, _ in pairs]).mean()
    coordinate = torch.cat([a.square().mean(0) for a, _ in pairs]).mean()
    residual = torch.stack([each.mean() for each in error]).mean()
    return {
        "sae_lens": {**both, "mse": float(torch.cat(error).mean())},
        "sae_bench": {
            **both,
            "explained_variance": float(1 - residual / (square - coordinate.square())),
            # divided by the batch's positions, and by all of them when the mean is taken
            "mse": float(torch.cat([each / len(each) for each in error]).mean()),
        },
    }


def compared(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], formula: Mapping[str, Mapping[str, float]]
) -> Iterator[dict[str, Any]]:
    """A row for each library and metric."""
    everywhere = ours["ce_zero_all"]
    of_model = {
        "ce_loss_with_ablation": everywhere,
        "ce_loss_score": (everywhere - ours["ce"]) / (everywhere - ours["ce_clean"]),
        "kl_div_with_sae": ours["kl_all"],
    }
    for library, package in LIBRARIES.items():
        for name, own in OURS.items():
            value = ours[own] if own else None
            value = 1 - value if own == "fvu" and value is not None else value
            by_formula = {**formula[library], **of_model}.get(name)
            expected = value if by_formula is None else by_formula
            yield {
                "library": package,
                "version": theirs["versions"][package],
                "metric": name,
                "theirs": f"{theirs[library][name]:.7g}",
                "ours_name": f"1 - {own}" if own == "fvu" else own,
                "ours": "" if value is None else f"{value:.7g}",
                "by_formula": "" if by_formula is None else f"{by_formula:.7g}",
                "difference": f"{theirs[library][name] - expected:.2g}",
            }


if __name__ == "__main__":
    run(CoreMetricsConfig, main)
