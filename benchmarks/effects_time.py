r"""How long `saescope effects` takes for all live features of a store, beside its stated budget.

    cp -r stores/smollm2-135m-topk-quick copy
    python -m benchmarks.effects_time --store copy

The store gets the effects, anew if it has some. A row a run in benchmarks/results/effects_time.csv:
`live` features, of which `reached` were measured, at `done` of the `planned` positions;
`seconds` is what one waits for, loading the model and the scores of steering included, and
`holds` whether everything planned was measured within `budget_s`. `load` is how many processes
wanted to run, of the whole machine, on average of the minute before the end.
"""

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.running import run
from sae.bench import rows as results
from sae.commands.effects import EffectsConfig, measure_effects
from saescope.config import Config
from saescope.errors import check_range
from saescope.progress import say
from store import FeatureStore
from store.measured import EFFECTS

COLUMNS = (
    "date",
    "store",
    "d_sae",
    "live",
    "reached",
    "positions",
    "done",
    "planned",
    "budget_s",
    "seconds",
    "cpu_s",
    "holds",
    "peak_mb",
    "load",
    "seed",
    "threads",
    "processor",
    "torch",
    "saescope",
    "commit",
)


@dataclass(frozen=True, kw_only=True)
class EffectsTimeConfig(Config):
    """Time the measured effects of all live features of a store."""

    store: str
    """Folder of a feature store, which gets the effects: a copy."""
    positions: int = 4
    """Positions of each feature, as of `saescope effects`."""
    seconds: float = 600.0
    """The budget, as of `saescope effects`."""
    seed: int = 0
    """Seed of the positions and of the random directions."""
    threads: int = 1
    """Threads of torch."""
    results: str = "benchmarks/results/effects_time.csv"
    """File that the row is added to."""

    def __post_init__(self) -> None:
        check_range("threads", self.threads, low=1)


def measure(config: EffectsTimeConfig) -> None:
    """Time it, and add the row."""
    torch.set_num_threads(config.threads)
    wall, cpu = time.perf_counter(), time.process_time()
    path = measure_effects(
        EffectsConfig(
            store=config.store,
            positions=config.positions,
            seconds=config.seconds,
            seed=config.seed,
            replace=True,
        )
    )
    seconds, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    with FeatureStore.open(path) as store:
        done, planned = store.meta[EFFECTS]["pairs"]
        sql = "SELECT n_active > 0 AS live, measured_positions > 0 AS reached FROM db.feature"
        found = store.database.columns(sql)
        name, d_sae = str(store.meta["name"]), store.d_sae
    row = {
        "store": name,
        "d_sae": d_sae,
        "live": int(np.sum(found["live"])),
        "reached": int(np.sum(found["reached"])),
        "positions": config.positions,
        "done": done,
        "planned": planned,
        "budget_s": config.seconds,
        "seconds": round(seconds, 1),
        "cpu_s": round(cpu_s, 1),
        "holds": int(done == planned),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "load": round(os.getloadavg()[0], 1),
        "seed": config.seed,
    }
    facts = {k: v for k, v in results.facts("cpu").items() if k in COLUMNS}
    results.append(Path(config.results), [{**row, **facts}], COLUMNS)
    say(f"{row['reached']:,} of {row['live']:,} features in {seconds:.0f} s ({cpu_s:.0f} of CPU)")


if __name__ == "__main__":
    run(EffectsTimeConfig, measure)
