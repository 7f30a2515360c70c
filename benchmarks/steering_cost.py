"""What steering costs: a batch of strengths in one pass, beside the same batch untouched.

    python -m benchmarks.steering_cost --sae runs/smollm2-135m-topk-quick

Texts of the model's own making are read in one pass, and continued with a KV cache by `generate` of
transformers; untouched, and within `sae.steer` with a list of as many strengths as there are texts,
entering and leaving the block counted. Rounds of all variants take turns, and begin with another
one each time. `ratio` is the median over rounds of steered / untouched within a round, by the
clock; `cpu_ratio` the same by processor seconds, which other processes change less; `least_ratio`
the quickest steered round by the clock / the quickest untouched one. `load` is how many processes
wanted to run, of the whole machine, on average of the minute before.
"""

import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from activations import Model, load_model
from benchmarks.running import run
from sae.bench import rows as results
from sae.core.base import SparseAutoencoder
from sae.formats.load import load
from sae.steering.steer import steer
from saescope.config import Config
from saescope.errors import check_range
from saescope.progress import say

COLUMNS = (
    "date", "task", "edit", "ratio", "cpu_ratio", "least_ratio", "plain_s", "steered_s",
    "plain_cpu_s", "cpu_s", "strengths", "context", "new_tokens", "rounds", "load", "model",
    "dtype", "run", "d_sae", "site", "processor", "threads", "torch", "python", "saescope",
    "commit",
)  # fmt: skip
_FEATURES = (5, 17)


@dataclass(frozen=True, kw_only=True)
class CostConfig(Config):
    """Time steering beside the untouched model."""

    sae: str
    """Folder of the run."""
    model: str = "smollm2-135m"
    """Its model."""
    dtype: str = "float32"
    """Precision of the model."""
    strengths: int = 8
    """Texts of the batch, each with a strength of its own."""
    context: int = 128
    """Tokens of a text that is read."""
    new_tokens: int = 16
    """Tokens that a text of a quarter of the context is continued by."""
    rounds: int = 15
    """Rounds that take turns."""
    threads: int = 1
    """Threads of torch."""
    results: str = "benchmarks/results/steering_cost.csv"
    """File that rows are added to."""

    def __post_init__(self) -> None:
        for name in ("strengths", "context", "new_tokens", "rounds", "threads"):
            check_range(name, getattr(self, name), low=1)


def edits(strengths: int) -> dict[str, dict[str, Any]]:
    """Arguments of `sae.steer` by the name of the variant; none for the untouched model."""
    first, second = _FEATURES
    amounts = [float(each) for each in range(1, strengths + 1)]
    return {
        "": {},
        "add": {"add": {first: amounts}},
        "clamp": {"clamp": {first: amounts}},
        "several": {"add": {first: amounts}, "scale": {second: amounts}, "project": {second: 0.0}},
    }


def tasks(model: Model, config: CostConfig) -> dict[str, Callable[[], object]]:
    """What is timed: a pass over the texts, and their continuation."""
    torch.manual_seed(0)
    shape = (config.strengths, config.context)
    tokens = torch.randint(100, model.d_vocab - 100, shape)
    begun = tokens[:, : max(1, config.context // 4)]
    count = {"max_new_tokens": config.new_tokens, "min_new_tokens": config.new_tokens}

    def proceed() -> object:
        mask = torch.ones_like(begun)
        with torch.no_grad():
            return model.hf.generate(begun, attention_mask=mask, do_sample=False, **count)

    return {"read": lambda: model.logits(tokens), "continue": proceed}


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(
    model: Model, sae: SparseAutoencoder, config: CostConfig
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """The times of each round, by task and variant."""
    variants = edits(config.strengths)
    names = list(variants)
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for task, work in tasks(model, config).items():

        def within(name: str, work: Callable[[], object] = work) -> None:
            given = variants[name]
            with steer(model, sae, **given) if given else nullcontext():
                work()

        for name in names:
            within(name)  # what is made on first use
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for number in range(config.rounds):
            start = number % len(names)
            for name in names[start:] + names[:start]:
                times[name].append(timed(lambda name=name: within(name)))
        found[task] = times
    return found


def main(config: CostConfig) -> None:
    """Time both tasks, and add a row for each edit."""
    torch.set_num_threads(config.threads)
    model, sae = load_model(config.model, dtype=config.dtype), load(config.sae)
    found, rows = measure(model, sae, config), []
    facts = {k: v for k, v in results.facts("cpu").items() if k in COLUMNS}
    for task, times in found.items():
        plain = times.pop("")
        for name, steered in times.items():
            pairs = list(zip(plain, steered, strict=True))
            ratios = [statistics.median(b[n] / a[n] for a, b in pairs) for n in (0, 1)]
            ratios.append(min(b for b, _ in steered) / min(a for a, _ in plain))
            medians = [statistics.median(x[n] for x in y) for n in (0, 1) for y in (plain, steered)]
            rows.append(
                {
                    "task": task,
                    "edit": name,
                    **dict(zip(COLUMNS[3:6], (f"{r:.3f}" for r in ratios), strict=True)),
                    **dict(zip(COLUMNS[6:10], (f"{s:.4f}" for s in medians), strict=True)),
                    **{n: getattr(config, n) for n in ("strengths", "context", "rounds", "dtype")},
                    "new_tokens": config.new_tokens if task == "continue" else 0,
                    "load": round(os.getloadavg()[0], 1),
                    "model": config.model,
                    "run": Path(config.sae).name,
                    "d_sae": sae.d_sae,
                    "site": sae.metadata["site"],
                    **facts,
                }
            )
            say(f"{task}, {name}: {ratios[0]:.2f} times ({ratios[1]:.2f} by processor)")
    results.append(Path(config.results), rows, COLUMNS)


if __name__ == "__main__":
    run(CostConfig, main)
