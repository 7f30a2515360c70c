"""SAEs of SynthSAEBench's protocol on its 16k world, in minutes of a core each: synth_16k.csv.

    python -m benchmarks.synth_16k

TopK, BatchTopK, Matryoshka BatchTopK with the published prefixes, and that one with the searched
recipe (docs/reports/recipe.md): 4,096 latents, L0 25, batches of 1,024 rows, scored on 500,000
further ones, as published; but where the published runs have 200 million rows, these have
`samples`, and the learning rate that such a run takes. Prints a table beside the published figures.
Rows that are in the file are not trained again, and a run that was interrupted goes on.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.recipe import FACTS, SCORES, TILT, RecipeBenchmark, sae_options
from benchmarks.running import run
from sae.architectures import architecture
from sae.bench.rows import append, facts, read
from sae.core.base import SparseAutoencoder
from sae.evaluation.true_features import score_true_features
from sae.formats.load import load
from sae.synthetic.config import PREFIX
from sae.synthetic.stream import SyntheticStream
from sae.synthetic.world import World, named_world
from sae.training.batch_maker import LossConfig
from sae.training.config import TrainConfig
from sae.training.synthetic import SyntheticRun
from sae.training.trainer_config import TrainerConfig
from saescope.artefact import read_json, write_json
from saescope.config import Config
from saescope.progress import Progress, say

RUNS: dict[str, tuple[str, str]] = {
    "topk": ("topk", ""),
    "batchtopk": ("batchtopk", ""),
    "matryoshka": ("matryoshka", ""),
    "recipe": ("matryoshka", "k lista tilt detach sort"),
}
"""name, architecture and its options, by the words of benchmarks/recipe.py"""
COLUMNS = (
    "world", "run", "architecture", "options", "samples", "d_sae", "target_l0", "seed", "lr",
    "scored_rows", *SCORES, "cpu_s", "wall_s", *FACTS,
)  # fmt: skip
"""cpu_s, wall_s: of the training, drawing the rows included"""
CHECKPOINT_EVERY = 250
"""steps"""
PUBLISHED = {
    "batchtopk": {"f1": 0.7316, "mcc": 0.7574, "explained_variance": 0.792},
    "matryoshka": {"f1": 0.8793, "mcc": 0.7927, "explained_variance": 0.779},
}
"""arXiv 2602.14687, at L0 25: the same architectures after 200 million rows, means of 5 seeds"""


@dataclass(frozen=True, kw_only=True)
class Synth16k(Config):
    """Train on the 16k world, score, and print the table."""

    world: str = "16k"
    """The world; another is for trying this out."""
    architectures: tuple[str, ...] = tuple(RUNS)
    """Which of topk, batchtopk, matryoshka, recipe."""
    samples: int = 5_000_000
    """Rows to train each on."""
    d_sae: int = 4096
    """Latents."""
    l0: int = 25
    """L0 to reach."""
    seed: int = 0
    """Of weights and rows."""
    scored_rows: int = 500_000
    """Rows to score on."""
    threads: int = 1
    """Threads of torch."""
    minutes: float | None = None
    """Stop at the first checkpoint after so many; run again to go on."""
    work: str = "build/synth_16k"
    """Folder for the runs."""
    results: str = "benchmarks/results/synth_16k.csv"
    """File that rows are added to."""


def work(config: Synth16k) -> int:
    """Train, score and write what is not there yet; 3 if time was up before."""
    torch.set_num_threads(config.threads)
    world, path = named_world(PREFIX + config.world), Path(config.results)
    end = time.monotonic() + 60 * (config.minutes or float("inf"))
    for name in config.architectures:
        row = _described(config, name)
        if any(_same(row, other) for other in read(path, COLUMNS)):
            continue
        made = trained(config, world, name, end)
        if made is None:
            say("time is up; run the same command again to go on")
            return 3
        sae, spent = made
        scores = scored(config, world, sae)
        named = {key: value for key, value in facts("cpu").items() if key in FACTS}
        append(path, [{**row, **spent, **{n: scores[n] for n in SCORES}, **named}], COLUMNS)
    for line in table(read(path, COLUMNS)):
        print(line)  # noqa: T201
    return 0


def _described(config: Synth16k, name: str) -> dict[str, Any]:
    kind, options = RUNS[name]
    return {
        "world": config.world, "run": name, "architecture": kind, "options": options or "none",
        "samples": config.samples // 1024 * 1024, "d_sae": config.d_sae, "target_l0": config.l0,
        "seed": config.seed, "scored_rows": config.scored_rows,
    }  # fmt: skip


def _same(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(str(other[name]) == str(value) for name, value in row.items())


def settings(config: Synth16k, name: str) -> TrainConfig:
    """How one is trained."""
    kind, options = RUNS[name]
    sized = RecipeBenchmark(d_sae=config.d_sae, l0=config.l0)
    return TrainConfig.specialise({"sae": {"kind": kind}})(
        harvest=PREFIX + config.world,
        out=str(Path(config.work) / f"{name}-{config.seed}"),
        samples=config.samples,
        seed=config.seed,
        device="cpu",
        sae=architecture(kind).Config(**sae_options(sized, kind, options)),
        trainer=TrainerConfig(
            batch_size=1024,
            evaluate_every=1000,
            checkpoint_every=CHECKPOINT_EVERY,
            loss=LossConfig(tilt=TILT if "tilt" in options.split() else 0.0),
        ),
    )


def trained(
    config: Synth16k, world: World, name: str, end: float
) -> tuple[SparseAutoencoder, dict[str, Any]] | None:
    """The SAE and what it took; None if the clock passed `end` before the last step."""
    run = SyntheticRun(settings(config, name), world)
    times = run.folder / "time.json"
    with run.locked():
        if run.finished():
            return load(run.folder), read_json(times)
        run.start()
        for _ in _checkpoints(run, times):
            if time.monotonic() > end and not run.trainer.finished:
                return None
        return run.release(), read_json(times)


def _checkpoints(run: SyntheticRun, times: Path) -> Iterator[int]:
    """Train; after each checkpoint its step, with the time of all steps so far in a file."""
    trainer = run.trainer
    spent = read_json(times) if times.exists() else {"cpu_s": 0.0, "wall_s": 0.0}
    batches, cpu, wall = iter(run.stream), time.process_time(), time.perf_counter()
    with Progress("training", trainer.total_steps, "steps", done=trainer.step) as progress:
        while not trainer.finished:
            progress.advance(1, trainer.advance(next(batches)))
            if trainer.step % trainer.config.checkpoint_every == 0 or trainer.finished:
                now = {
                    "cpu_s": round(spent["cpu_s"] + time.process_time() - cpu, 1),
                    "wall_s": round(spent["wall_s"] + time.perf_counter() - wall, 1),
                    "lr": trainer.lr,
                }
                write_json(times, now)
                yield trainer.step


def scored(config: Synth16k, world: World, sae: SparseAutoencoder) -> dict[str, Any]:
    """What it finds of the world's features, on rows that were not trained on."""
    rows = SyntheticStream(world, batch_size=1, seed=config.seed).scored(config.scored_rows)
    return asdict(score_true_features(sae.eval(), sae.W_dec.detach(), world.directions, rows))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The results in Markdown, each beside the published figures of its architecture."""
    shown = ("f1", "mcc", "explained_variance", "l0", "dead_latents")
    lines = [
        "| | rows | F1 | MCC | variance explained | L0 | dead | training, one core |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = [f"{float(row[name]):.{0 if name == 'dead_latents' else 3}f}" for name in shown]
        took = f"{float(row['cpu_s']) / 60:.1f} min"
        lines.append(_line([row["run"], f"{int(row['samples']):,}", *numbers, took]))
    for name, figures in PUBLISHED.items():
        numbers = [f"{figures[each]:.3f}" if each in figures else "" for each in shown]
        numbers[shown.index("l0")] = "25"
        lines.append(_line([f"{name}, published", "200,000,000", *numbers, ""]))
    return lines


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    run(Synth16k, work)
