"""What learning rate runs of different lengths want: learning_rate.csv.

    OMP_NUM_THREADS=1 python -m benchmarks.learning_rate --harvest data/smollm2-135m-quick

Each row is one training at a given learning rate, on rows of the quick demo's harvest or of the
small synthetic world. Run again after an interruption, it goes on with what is not there yet. Some
40 minutes on one thread.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from activations import ActivationStore
from benchmarks.running import run
from sae.architectures import architecture
from sae.bench import rows
from sae.data.harvests import open_complete
from sae.evaluation.true_features import score_true_features
from sae.synthetic.stream import SyntheticStream
from sae.training.config import TrainConfig
from sae.training.run import Run
from sae.training.schedules import base_lr, default_lr
from sae.training.synthetic import SyntheticRun
from sae.training.trainer import Trainer
from sae.training.trainer_config import TrainerConfig
from saescope.config import Config
from saescope.errors import check_range
from saescope.metrics import texts
from saescope.progress import say

OUT = Path(__file__).parent / "results" / "learning_rate.csv"
WORLD = "synth:small"
SILENT = 50_000
"""rows: a feature that fired on none of the last so many is silent"""
SCORED = 20_000
"""rows of the world that F1 and MCC are of"""
L0 = {"harvest": 32.0, "world": 11.0}
COLUMNS = (
    "date",
    "data",
    "kind",
    "d_in",
    "d_sae",
    "target_l0",
    "batch",
    "steps",
    "lr",
    "dead_part",
    "seed",
    "l0",
    "fvu",
    "dead",
    "silent",
    "f1",
    "mcc",
    "threads",
    "processor",
    "torch",
    "saescope",
    "commit",
)

EIGHTH = 1 / 8
"""the part that was the default when the learning rates were measured"""
SELECTING, PENALISED = ("topk", "batchtopk", "matryoshka"), ("jumprelu", "gated", "relu")
ALL = (*SELECTING, *PENALISED)


class Cell(NamedTuple):
    """One training."""

    data: str
    """harvest or world"""
    kind: str
    d_sae: int
    batch: int
    steps: int
    lr: float
    dead_part: float = EIGHTH
    """of the run's rows, after which a feature that has not fired is dead"""


def _cells(
    data: str,
    kinds: Iterable[str],
    steps: int,
    lrs: Iterable[float],
    *,
    d_sae: int = 0,
    batch: int = 256,
    dead_part: float = EIGHTH,
) -> Iterator[Cell]:
    width = d_sae or (1024 if data == "harvest" else 512)
    for kind in kinds:
        for lr in lrs:
            yield Cell(data, kind, width, batch, steps, lr, dead_part)


def _rules(data: str, kinds: Iterable[str], steps: int, *, d_sae: int = 0) -> Iterator[Cell]:
    """At the published rule for long runs, and at what a run takes by itself."""
    for cell in _cells(data, kinds, steps, (0.0,), d_sae=d_sae):
        yield cell._replace(lr=float(f"{base_lr(cell.d_sae):.2g}"))
        yield cell._replace(lr=default_lr(cell.d_sae, steps))


def _long(kinds: Iterable[str], steps: int) -> Iterator[Cell]:
    """At what a run takes by itself, at twice and at half as much."""
    rule = default_lr(512, steps)
    lrs = (rule, 2 * rule, rule / 2)
    yield from _cells("world", kinds, steps, lrs, dead_part=1 / 32)


def grid() -> list[Cell]:
    """The trainings, what tells most first."""
    usual, two = (2e-3, 4e-3, 8e-3), ("topk", "batchtopk")
    others = ("jumprelu", "matryoshka", "gated", "relu")
    found = [
        *_cells("world", two, 300, (*usual, 1.6e-2)),
        *_cells("world", others, 300, (4e-3, 8e-3)),
        *_cells("harvest", two, 300, (4e-3, 8e-3)),
        *_cells("world", ("topk",), 1000, (1e-3, *usual)),
        *_cells("world", ("topk",), 300, (4e-3, 8e-3), batch=1024),
        *_rules("world", ALL, 300),
        *_rules("world", two, 1000),
        *_rules("harvest", two, 300),
        *_cells("world", two, 300, (5.7e-3,), dead_part=1 / 32),
        *_cells("world", two, 1000, (3.1e-3,), dead_part=1 / 32),
        *_cells("harvest", two, 300, (4e-3,), dead_part=1 / 32),
        *_rules("world", ("topk",), 3000),
        *_rules("world", others, 1000),
        *_rules("harvest", two, 1000),
        *_long(("topk",), 10_000),
        *_long(("batchtopk", "jumprelu"), 10_000),
        *_long(("topk",), 30_000),
        *_long(("batchtopk", "jumprelu"), 30_000),
        *_rules("world", ("batchtopk",), 3000),
        *_rules("world", ("topk",), 300, d_sae=2048),
        *_cells("world", ("topk",), 3000, (3.6e-3,)),
        *_cells("harvest", others, 300, (8e-4, 4e-3)),
    ]
    return list(dict.fromkeys(found))


@dataclass(frozen=True, kw_only=True)
class LearningRates(Config):
    """Train at several learning rates, for several lengths."""

    harvest: str = "data/smollm2-135m-quick"
    """Folder of the quick demo's harvest."""
    minutes: float | None = None
    """End after so many; the next call goes on."""
    out: str = str(OUT)
    """The results."""
    seed: int = 0
    """Of weights and rows."""
    threads: int = 1
    """Threads of torch."""

    def __post_init__(self) -> None:
        check_range("threads", self.threads, low=1)
        check_range("seed", self.seed, low=0)
        if self.minutes is not None:
            check_range("minutes", self.minutes, above=0)


def work(config: LearningRates) -> None:
    """Train what is not in the file yet, and add it."""
    torch.set_num_threads(config.threads)
    harvest = open_complete(config.harvest)
    end = None if config.minutes is None else time.monotonic() + 60 * config.minutes
    done = {_key(row) for row in rows.read(Path(config.out), COLUMNS)}
    for cell in grid():
        key = {
            "data": config.harvest if cell.data == "harvest" else WORLD,
            "kind": cell.kind,
            "d_sae": cell.d_sae,
            "target_l0": L0[cell.data],
            "batch": cell.batch,
            "steps": cell.steps,
            "lr": cell.lr,
            "dead_part": cell.dead_part,
            "seed": config.seed,
        }
        key["data"] = Path(key["data"]).name  # wherever the harvest lies
        if _key(key) in done:
            continue
        if end is not None and time.monotonic() > end:
            say("the time is over; the same command goes on")
            return
        found = _trained(cell, harvest, config.seed)
        say(f"{cell}: {texts(('fvu', 'l0'), found)}, silent {found['silent']:.3f}")
        facts = rows.facts("cpu")
        row = {**key, **found, **{n: facts[n] for n in facts if n in COLUMNS}}
        rows.append(Path(config.out), [row], COLUMNS)


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    names = COLUMNS[1:3] + COLUMNS[4:11]
    values = (row[name] for name in names)
    return tuple(f"{v:.5g}" if isinstance(v, float) else str(v) for v in values)


def _trained(cell: Cell, harvest: ActivationStore, seed: int) -> dict[str, Any]:
    """Train, and measure on held-out rows."""
    run = _run(cell, harvest, seed)
    trainer = run.make_trainer(None)
    sae = trainer.run().fold()
    found = dict(trainer.last_held_out)
    scores = {}
    if isinstance(run, SyntheticRun):
        stream = SyntheticStream(run.world, batch_size=1, seed=seed)
        scored = score_true_features(
            sae, sae.W_dec.detach(), run.world.directions, stream.scored(SCORED)
        )
        scores = {"f1": scored.f1, "mcc": scored.mcc}
    return {
        "d_in": sae.d_in,
        "l0": found["l0"],
        "fvu": found["fvu"],
        "dead": found["dead_fraction"],
        "silent": _silent(trainer),
        **scores,
    }


def _silent(trainer: Trainer) -> float:
    return float((trainer.tokens_since_fired >= SILENT).float().mean())


def _run(cell: Cell, harvest: ActivationStore, seed: int) -> Run | SyntheticRun:
    kind, count = architecture(cell.kind).Config, cell.steps * cell.batch
    of = {"k": round(L0[cell.data])} if "k" in {each.name for each in fields(kind)} else {}
    trainer = TrainerConfig(
        batch_size=cell.batch,
        lr=cell.lr,
        target_l0=L0[cell.data],
        evaluate_every=cell.steps,
        dead_after_tokens=round(cell.dead_part * count),
    )
    on_harvest = cell.data == "harvest"
    config = TrainConfig.specialise({"sae": {"kind": cell.kind}})(
        harvest=str(harvest.path) if on_harvest else WORLD,
        out="build/learning_rate",  # nothing is written
        seed=seed,
        passes=(count + 0.5) / harvest.n_rows("train") if on_harvest else 3.0,
        samples=None if on_harvest else count,
        sae=kind(**{"d_sae": cell.d_sae, **of}),
        trainer=trainer,
    )
    return Run(config, harvest) if on_harvest else SyntheticRun(config)


if __name__ == "__main__":
    run(LearningRates, work)
