"""Whether `saescope advise` is right: advise.csv.

    OMP_NUM_THREADS=1 python -m benchmarks.advise --harvest data/smollm2-135m-quick

On the small synthetic world, whose L0 is known: which L0 it finds, with as many features as the
world has and with a quarter. On the quick demo's harvest: its learning rate for a run of 1,000
steps, beside a grid of others at the same L0 and width. Each row is one training. Some 15 minutes
on one thread.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.running import run
from sae.architectures.batchtopk import BatchTopKConfig
from sae.bench import rows
from sae.commands.synth import frequent_l0
from sae.data.harvests import open_complete
from sae.synthetic.world import named_world
from sae.training.advice import best_l0, factor_of
from sae.training.config import TrainConfig
from sae.training.schedules import default_lr
from sae.training.short_runs import Measured, Setting, ShortRuns
from sae.training.trainer_config import TrainerConfig
from saescope.config import Config
from saescope.progress import say

OUT = Path(__file__).parent / "results" / "advise.csv"
WORLD = "synth:small"
WORLD_STEPS, HARVEST_STEPS, LONG = 600, 300, 1000
GRID = (0.5, 1.0, 2.0)
"""factors on the learning rate that a run takes by itself"""
COLUMNS = (
    "date",
    "data",
    "what",
    "d_sae",
    "target_l0",
    "steps",
    "batch",
    "lr",
    "l0",
    "fvu",
    "dead",
    "decoder_similarity",
    "true_l0",
    "advised",
    "seed",
    "threads",
    "processor",
    "torch",
    "saescope",
    "commit",
)
"""what: short, or long; true_l0: of the world's d_sae most frequent features; advised: the L0, or
for long runs the learning rate, that is advised"""
MINUTES = 1e6


@dataclass(frozen=True, kw_only=True)
class AdviseBenchmark(Config):
    """Compare what is advised with the truth, and with a grid."""

    harvest: str = "data/smollm2-135m-quick"
    """Folder of the quick demo's harvest."""
    out: str = str(OUT)
    """The results."""
    cases: tuple[str, ...] = ("harvest", "world-2048", "world-512")
    """Which to measure."""
    threads: int = 1
    """Threads of torch."""


def work(config: AdviseBenchmark) -> None:
    """Measure each case, and add its rows."""
    torch.set_num_threads(config.threads)
    cases = {
        "harvest": lambda: on_harvest(config.harvest),
        "world-2048": lambda: on_world(2048),
        "world-512": lambda: on_world(512),
    }
    for name in config.cases:
        found = cases[name]()
        facts = {k: v for k, v in rows.facts("cpu").items() if k in COLUMNS}
        rows.append(Path(config.out), [{**facts, **row} for row in found], COLUMNS)


def on_world(d_sae: int) -> list[dict[str, Any]]:
    """The search for L0, from twice and four times the truth."""
    world = named_world(WORLD)
    runs = ShortRuns(_config(WORLD, d_sae), world, minutes=MINUTES, steps=WORLD_STEPS)

    def measure(l0: float) -> Measured | None:
        return runs.measure(Setting(target_l0=l0, d_sae=d_sae, steps=WORLD_STEPS))

    l0, told = best_l0(measure, 32.0, highest=d_sae / 4)
    truth = frequent_l0(world, d_sae)
    say(f"{WORLD}, {d_sae} features: L0 {l0:g} from {told}, in truth {truth:.2f}")
    return [
        {**_row(WORLD, "short", each), "true_l0": truth, "advised": l0}
        for each in runs.found.values()
    ]


def on_harvest(path: str) -> list[dict[str, Any]]:
    """L0 and learning rate by short runs; then longer ones at that learning rate and at others."""
    harvest, d_sae = open_complete(path), 1024
    runs = ShortRuns(_config(path, d_sae), harvest, minutes=MINUTES, steps=HARVEST_STEPS)

    def at(l0: float, factor: float = 1.0) -> Setting:
        return Setting(target_l0=l0, d_sae=d_sae, steps=HARVEST_STEPS, lr_factor=factor)

    l0, told = best_l0(lambda value: runs.measure(at(value)), 32.0, highest=d_sae / 4)
    factor = factor_of([runs.measure(at(l0, each)) for each in (1.0, 0.5, 2.0)])
    lr = factor * default_lr(d_sae, LONG)
    say(f"{path}: L0 {l0:g} from {told}, learning rate {lr:.2g}")
    short = list(runs.found.values())
    for each in dict.fromkeys((factor, *GRID)):
        runs.measure(replace(at(l0, each), steps=LONG))
    long = [each for each in runs.found.values() if each.steps == LONG]
    name = Path(path).name
    return [
        *({**_row(name, "short", each), "advised": l0} for each in short),
        *({**_row(name, "long", each), "advised": lr} for each in long),
    ]


def _config(harvest: str, d_sae: int) -> TrainConfig:
    return TrainConfig.specialise({"sae": {"kind": "batchtopk"}})(
        harvest=harvest,
        out="build/advise",  # nothing is written
        sae=BatchTopKConfig(d_sae=d_sae, k=32.0),
        trainer=TrainerConfig(batch_size=256),
    )


def _row(data: str, what: str, each: Measured) -> dict[str, Any]:
    return {
        "data": data,
        "what": what,
        "d_sae": each.d_sae,
        "target_l0": each.target_l0,
        "steps": each.steps,
        "batch": 256,
        "lr": each.lr,
        "l0": each.l0,
        "fvu": each.fvu,
        "dead": each.dead_fraction,
        "decoder_similarity": each.decoder_similarity,
        "seed": 0,
    }


if __name__ == "__main__":
    run(AdviseBenchmark, work)
