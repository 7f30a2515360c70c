"""SAELens' and dictionary_learning's SAEs on the same activations in the same order, beside ours.

    python -m benchmarks.peers.architectures --harvest data/smollm2-135m-wikipedia

Trains TopK, BatchTopK, JumpReLU and Matryoshka with each library at three sparsities, measures what
it saved through our readers of its format, adds a row of results each, and reports on which side
of the best peer's front our own are (`benchmarks.pareto`). Run again after an interruption, it goes
on with what has no row yet.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.pareto import read_rows as read_ours
from benchmarks.pareto import summarise
from benchmarks.peers.data import Data, export, floats
from benchmarks.peers.environments import PEERS, Peer
from benchmarks.peers.fronts import next_coefficient
from benchmarks.peers.results import OUR_LR, OWN, append_row, read_rows, report, summary
from benchmarks.peers.training import CHECK_ROWS, check_against_library, train
from benchmarks.running import run
from sae.bench.rows import processor
from sae.core.base import SparseAutoencoder
from sae.data.harvests import choose_site, load_harvested_model, open_complete
from sae.evaluation.downstream import measure_downstream
from sae.evaluation.reconstruction import measure_reconstruction
from sae.formats.load import load
from sae.training.schedules import base_lr
from saescope.artefact import atomic_path, git_commit, read_json, sha256_json, write_bytes
from saescope.config import Config
from saescope.errors import InputError, check_range
from saescope.progress import say

ARCHITECTURES = ("topk", "batchtopk", "matryoshka", "jumprelu")
COEFFICIENT = "l0_coefficient"
START = 5.0  # what SAELens' documentation has in its recipe


@dataclass(frozen=True, kw_only=True)
class PeersConfig(Config):
    """Compare SAEs of other libraries with ours."""

    harvest: str = "data/smollm2-135m-wikipedia"
    """Folder of a finished harvest."""
    site: str | None = None
    """TransformerLens name of the site; may be left out if the harvest has only one."""
    work: str = "build/peers"
    """Folder for environments, exported activations and weights (about 5 GB)."""
    results: str = "benchmarks/results/peers.csv"
    """File that rows are added to."""
    page: str = "benchmarks/results/peers.md"
    """File that the report is written to."""
    ours: str = "benchmarks/results/pareto.csv"
    """Rows of our own SAEs."""
    architectures: tuple[str, ...] = ARCHITECTURES
    """Architectures to train."""
    targets: tuple[int, ...] = (32, 16, 64)
    """Features a token: k, or L0 aimed at."""
    d_sae: int = 4096
    """Width of each dictionary."""
    batch_size: int = 2048
    """Tokens a step."""
    steps: int | None = None
    """Steps of training; one pass over the harvest if not given."""
    lr_multiplier: float = 8.0
    """Our learning rate: factor on our rule for it."""
    coefficients: int = 8
    """Trainings at most for a penalty whose coefficient has to be searched for the targets."""
    dead_after_tokens: int = 250_000
    """Tokens without firing after which every library takes a feature for dead."""
    tokens: int = 4096
    """Held-out tokens that the model is run on for delta CE."""
    seed: int = 0
    """Seed of the order of the batches and of the initial weights."""
    threads: int = 2
    """Threads of torch."""

    def __post_init__(self) -> None:
        for name in ("d_sae", "batch_size", "coefficients", "tokens", "threads"):
            check_range(name, getattr(self, name), low=1)
        for target in self.targets:
            check_range("targets", target, low=1, high=self.d_sae)
        for name in self.architectures:
            if name not in ARCHITECTURES:
                raise InputError(
                    "not compared", where="architectures", given=name, allowed=ARCHITECTURES
                )
        if self.steps is not None:
            check_range("steps", self.steps, low=1)
        check_range("lr_multiplier", self.lr_multiplier, above=0)
        check_range("dead_after_tokens", self.dead_after_tokens, low=self.batch_size)


@dataclass(frozen=True)
class Series:
    """An architecture of a library at a learning rate, to be trained at several sparsities."""

    peer: Peer
    architecture: str
    lr: float | None
    """None: the library's own"""

    @property
    def variant(self) -> str:
        """As the results name it."""
        return OWN if self.lr is None else OUR_LR

    @property
    def control(self) -> str:
        """The setting that sparsity is set by."""
        if self.architecture != "jumprelu":
            return "k"
        return COEFFICIENT if self.peer.name == "SAELens" else "target_l0"

    def next_value(self, config: PeersConfig, tried: Mapping[float, float]) -> float | None:
        """What to train with next, given the L0 of each value tried; None: all is there."""
        if self.control == COEFFICIENT:
            return next_coefficient(tried, config.targets, start=START, most=config.coefficients)
        return next((float(target) for target in config.targets if target not in tried), None)

    def schedule(self, steps: int) -> dict[str, int]:
        """Steps of warm-up and decay of the learning rate.

        SAELens recommends no warm-up; dictionary_learning's 1000 steps, and our own, are scaled to
        the run's length.
        """
        warmup = 0 if self.peer.name == "SAELens" and self.lr is None else round(0.05 * steps)
        return {"warmup_steps": warmup, "decay_steps": round(0.2 * steps)}


def planned(config: PeersConfig) -> Iterator[Series]:
    """Every series, own settings first."""
    ours = base_lr(config.d_sae) * config.lr_multiplier
    for lr in (None, ours):
        for architecture in config.architectures:
            yield from (Series(peer, architecture, lr) for peer in PEERS.values())


class Evaluator:
    """Measures an SAE on the held-out rows, and within the model."""

    def __init__(self, config: PeersConfig, data: Data) -> None:
        self.config, self.data = config, data

    @cached_property
    def _downstream(self) -> tuple[Any, ...]:
        """The model, the site, its mean, and the held-out sequences chosen for delta CE."""
        harvest = open_complete(self.config.harvest)
        site = choose_site(harvest, self.config.site)
        model = load_harvested_model(harvest, harvest.manifest["model"]["dtype"])
        held_out = torch.from_numpy(harvest.split == 1).nonzero()[:, 0]
        chosen = held_out[: max(1, self.config.tokens // harvest.context)].numpy()
        tokens = torch.from_numpy(harvest.tokens[chosen]).long()
        mean = torch.from_numpy(harvest.statistics(site).mean)
        return model, site, mean, tokens, torch.from_numpy(harvest.keep[chosen])

    def measure(self, sae: SparseAutoencoder) -> dict[str, Any]:
        """The measured columns of a row."""
        found = measure_reconstruction(sae, self.data.held_out_rows)
        model, site, mean, tokens, keep = self._downstream
        within = measure_downstream(model, site, lambda x: sae(x).x_hat, mean, tokens, keep)
        return {
            "held_out_rows": found.rows,
            "l0": f"{found.l0:.3f}",
            "fvu": f"{found.fvu:.5f}",
            "fvu_interval": f"{found.fvu_interval:.5f}",
            "cosine": f"{found.cosine:.5f}",
            "dead_fraction": f"{found.dead_fraction:.5f}",
            "ce_tokens": within.tokens,
            "delta_ce": f"{within.delta_ce:.5f}",
            "delta_ce_interval": f"{within.delta_ce_interval:.5f}",
        }


def compare(config: PeersConfig, data: Data) -> list[dict[str, str]]:
    """Train and measure what has no row yet; the row of every training planned."""
    torch.set_num_threads(config.threads)
    evaluator, rows = Evaluator(config, data), []
    for series in planned(config):
        tried: dict[float, float] = {}
        while (value := series.next_value(config, tried)) is not None:
            row = _unit(config, data, evaluator, series, value)
            tried[value] = float(row["l0"])
            rows.append(row)
    return rows


def _unit(
    config: PeersConfig, data: Data, evaluator: Evaluator, series: Series, value: float
) -> dict[str, str]:
    """One training and its row; read, where it is there already."""
    schedule = series.schedule(len(data.stream))
    facts = {
        "library": series.peer.name, "architecture": series.architecture,
        "variant": series.variant, "control": series.control, "value": f"{value:g}",
        "data": data.name, "d_sae": config.d_sae, **schedule,
        "dead_after_tokens": config.dead_after_tokens, "seed": config.seed,
    }  # fmt: skip
    lr = "own" if series.lr is None else f"{series.lr:g}"
    mark = sha256_json([facts, lr, series.peer.requirement])[:12]
    run = f"{series.peer.name}-{series.architecture}-{series.control}{value:g}-lr-{lr}-{mark}"
    known = read_rows(Path(config.results))
    if run in known:
        return known[run]
    folder = Path(config.work) / "runs" / run
    if not (folder / "facts.json").exists():
        say(f"{series.peer.name}, {series.architecture}, {series.control} {value:g}, lr {lr}")
        settings = {
            **schedule, "architecture": series.architecture, "value": value, "lr": series.lr,
            "d_sae": config.d_sae, "dead_after_tokens": config.dead_after_tokens,
            "seed": config.seed, "threads": config.threads,
        }  # fmt: skip
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            train(series.peer, data, settings, temporary, Path(config.work))
    return append_row(Path(config.results), _row(data, evaluator, folder, facts))


def _row(
    data: Data, evaluator: Evaluator, folder: Path, facts: Mapping[str, Any]
) -> dict[str, Any]:
    noted = read_json(folder / "facts.json")
    sae = load(folder / noted["folder"])
    check_against_library(sae, folder, floats(data.held_out[:CHECK_ROWS]))
    measured = evaluator.measure(sae)
    say(
        f"{folder.name}: L0 {measured['l0']}, FVU {measured['fvu']} ± {measured['fvu_interval']}, "
        f"delta CE {measured['delta_ce']}, dead {measured['dead_fraction']}"
    )
    steps, batch_size, d_in = data.stream.shape
    return {
        **facts,
        **measured,
        "date": datetime.now(UTC).date().isoformat(),
        "version": noted["version"],
        "d_in": d_in,
        "tokens": steps * batch_size,
        "batch": batch_size,
        "lr": f"{noted['lr']:g}",
        "normaliser": noted["normaliser"],
        "settings": ", ".join(f"{name}={value}" for name, value in noted["settings"].items()),
        "training_seconds_not_a_speed_benchmark": round(noted["seconds"]),
        "torch": noted["torch"],
        "cpu": processor(),
        "commit": git_commit() or "",
        "run": folder.name,
    }


def main(config: PeersConfig) -> None:
    """Run the comparison and write its report."""
    data = export(
        Path(config.work),
        harvest=config.harvest,
        site=config.site,
        batch_size=config.batch_size,
        seed=config.seed,
        steps=config.steps,
    )
    rows = compare(config, data)
    ours = [r for r in read_ours(Path(config.ours)) if int(r["d_sae"]) == config.d_sae]
    means = summarise(ours)
    write_bytes(config.page, report(rows, means).encode())
    for line in summary(rows, means):
        say(line)


if __name__ == "__main__":
    run(PeersConfig, main, positional="harvest")
