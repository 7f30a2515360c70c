"""Options of architectures on a synthetic world, each alone and all together: recipe.csv.

    python -m benchmarks.recipe --page docs/reports/recipe.md

The options are those of a recipe that was searched on SynthSAEBench (see docs/reports/recipe.md),
its sizes scaled to the world: k falls from 2.4 times the L0, prefixes are 1/32, 1/8 and 1/2 of the
dictionary and the whole, the LISTA step is 0.3, the tilt 0.002 of a row's share of the loss. Rows
that are in the file are not trained again.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.recipe_model import COLUMNS as MODEL_COLUMNS
from benchmarks.recipe_page import page, table
from benchmarks.running import run
from sae.architectures import architecture
from sae.bench.rows import append, facts, read
from sae.core.base import SparseAutoencoder
from sae.evaluation.true_features import score_true_features
from sae.synthetic.config import PREFIX
from sae.synthetic.stream import SyntheticStream
from sae.synthetic.world import World, named_world
from sae.training.batch_maker import LossConfig
from sae.training.config import TrainConfig
from sae.training.synthetic import SyntheticRun
from sae.training.trainer_config import TrainerConfig
from saescope.config import Config
from saescope.progress import say

SCORES = (
    "l0", "f1", "mcc", "precision", "recall", "uniqueness", "explained_variance", "shrinkage",
    "dead_latents",
)  # fmt: skip
FACTS = ("date", "processor", "threads", "torch", "python", "saescope", "commit")
COLUMNS = (
    "world", "samples", "lr_multiplier", "architecture", "options", "seed", *SCORES, "cpu_s", *FACTS
)  # fmt: skip
"""cpu_s: processor seconds of the training"""
TILT = 0.01
"""of a row's error over the data's variance: the recipe's 0.002 of its share at an FVU of 0.2"""
OPTIONS: dict[str, tuple[str, ...]] = {
    "batchtopk": ("", "k", "lista", "tilt", "k lista tilt"),
    "matryoshka": ("", "detach", "sort", "k lista tilt detach sort"),
}
"""architectures, and the sets of options that each is trained with"""


@dataclass(frozen=True, kw_only=True)
class RecipeBenchmark(Config):
    """Train with options and without, and score."""

    world: str = "small"
    """The world."""
    samples: int = 200_000
    """Rows to train each on."""
    d_sae: int = 512
    """Latents."""
    l0: int = 8
    """L0 to reach."""
    lr_multiplier: float = 4.0
    """Of the learning rate."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of weights and rows."""
    architectures: tuple[str, ...] = tuple(OPTIONS)
    """What to train."""
    options: tuple[str, ...] = ()
    """Only these sets of options."""
    scored_rows: int = 30_000
    """Rows to score on."""
    threads: int = 1
    """Threads of torch."""
    results: str = "benchmarks/results/recipe.csv"
    """File that rows are added to."""
    page: str | None = None
    """Page to write, docs/reports/recipe.md; its section on a model is of recipe_model.csv beside
    the results."""


def sae_options(config: RecipeBenchmark, kind: str, chosen: str) -> dict[str, Any]:
    """Fields of an architecture's configuration."""
    words = chosen.split()
    found: dict[str, Any] = {"d_sae": config.d_sae, "k": config.l0}
    if kind == "matryoshka":
        found["prefix_widths"] = tuple(config.d_sae // part for part in (32, 8, 2, 1))
    if "k" in words:
        found |= {"k_start": round(2.4 * config.l0), "k_anneal_fraction": 1.0}
    fields: Mapping[str, dict[str, Any]] = {
        "lista": {"lista_eta": 0.3},
        "detach": {"detach_prefixes": True},
        "sort": {"sort_by_frequency": True},
    }
    for word in words:
        found |= fields.get(word, {})
    return found


def runs(config: RecipeBenchmark) -> Iterator[tuple[str, str, int]]:
    """Architecture, options and seed of each run: all of one seed, then the next."""
    for seed in config.seeds:
        for kind in config.architectures:
            for chosen in OPTIONS[kind]:
                if not config.options or chosen in config.options:
                    yield kind, chosen or "none", seed


def work(config: RecipeBenchmark) -> None:
    """Train, score and write what is not there yet."""
    torch.set_num_threads(config.threads)
    world, path = named_world(PREFIX + config.world), Path(config.results)
    have = {_key(row) for row in read(path, COLUMNS)}
    for kind, chosen, seed in runs(config):
        row: dict[str, Any] = {
            "world": config.world, "samples": config.samples,
            "lr_multiplier": config.lr_multiplier, "architecture": kind, "options": chosen,
            "seed": seed,
        }  # fmt: skip
        if _key(row) in have:
            continue
        before = time.process_time()
        sae = trained(config, world, kind, chosen, seed)
        row["cpu_s"] = round(time.process_time() - before, 1)
        scores = scored(config, world, sae, seed)
        named = {key: value for key, value in facts("cpu").items() if key in FACTS}
        append(path, [{**row, **{name: scores[name] for name in SCORES}, **named}], COLUMNS)
        say(f"{kind} ({chosen}), seed {seed}: F1 {scores['f1']:.3f}, MCC {scores['mcc']:.3f}")
    rows = read(path, COLUMNS)
    for line in table(rows):
        say(line)
    if config.page:
        of_model = read(path.with_name("recipe_model.csv"), MODEL_COLUMNS)
        Path(config.page).write_text(page(rows, of_model), encoding="utf-8")


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    names = ("world", "samples", "lr_multiplier", "architecture", "options", "seed")
    return tuple(f"{row[n]:.5g}" if isinstance(row[n], float) else str(row[n]) for n in names)


def trained(
    config: RecipeBenchmark, world: World, kind: str, chosen: str, seed: int
) -> SparseAutoencoder:
    """The SAE, trained in memory."""
    tilt = TILT if "tilt" in chosen.split() else 0.0
    settings = TrainConfig.specialise({"sae": {"kind": kind}})(
        harvest=PREFIX + config.world,
        out="runs/recipe",  # nothing is written there
        samples=config.samples,
        seed=seed,
        sae=architecture(kind).Config(**sae_options(config, kind, chosen)),
        trainer=TrainerConfig(
            batch_size=1024,
            lr_multiplier=config.lr_multiplier,
            decay_fraction=1 / 3,
            evaluate_every=10**9,
            checkpoint_every=10**9,
            loss=LossConfig(tilt=tilt),
        ),
    )
    trainer = SyntheticRun(settings, world).make_trainer(None)
    trainer.run()
    return trainer.release()


def scored(
    config: RecipeBenchmark, world: World, sae: SparseAutoencoder, seed: int
) -> dict[str, Any]:
    """What it finds of the world's features, on rows that were not trained on."""
    stream = SyntheticStream(world, batch_size=1, seed=seed)
    rows = stream.scored(config.scored_rows)
    return asdict(score_true_features(sae.eval(), sae.W_dec.detach(), world.directions, rows))


if __name__ == "__main__":
    run(RecipeBenchmark, work)
