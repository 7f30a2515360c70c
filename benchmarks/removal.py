"""What ablating and clamping features measures on an SAE, beside the controls.

    python -m benchmarks.removal --sae runs/smollm2-135m-topk-quick

Runs the suites scr, tpp and unlearning of `saescope eval` (docs/reference/removal.md), and adds
their means with 95% intervals to the results: a row for each method, number of features and value.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.running import run
from sae.bench.rows import append, facts
from sae.commands.evaluate import evaluate
from sae.commands.evaluate_config import EvaluateConfig
from sae.probing.config import ProbingConfig
from saescope.artefact import read_json
from saescope.config import Config
from saescope.errors import check_range
from saescope.progress import say

FACTS = ("date", "processor", "threads", "torch", "python", "saescope", "commit")
COLUMNS = (
    "sae", "suite", "texts", "method", "n", "clamp", "seeds", "value", "mean", "interval",
    "protocol", *FACTS,
)  # fmt: skip
"""texts: the pair or group, all for the mean over them, and for unlearning the test; seeds:
divisions, or draws; interval: half of the 95% one"""


@dataclass(frozen=True, kw_only=True)
class RemovalBenchmark(Config):
    """Measure an SAE by SCR, TPP and unlearning."""

    sae: str = "runs/smollm2-135m-topk-quick"
    """The SAE."""
    full: bool = False
    """All texts and divisions, not those of --quick."""
    threads: int = 1
    """Threads of torch."""
    work: str = "build/removal"
    """Folder for the evaluation and for activations of texts."""
    results: str = "benchmarks/results/removal.csv"
    """File that rows are added to."""

    def __post_init__(self) -> None:
        check_range("threads", self.threads, low=1)


def rows_of(folder: Path) -> Iterator[dict[str, Any]]:
    """The means in an evaluation's tables."""
    for suite, of in (("scr", "pair"), ("tpp", "group")):
        table = read_json(folder / f"evaluation.{suite}.json")
        seeds = len({row["seed"] for row in table["results"]})
        for row in table["scores"]:
            about = {"suite": suite, "texts": row[of] or "all", "method": row["method"]}
            yield {
                **about, "n": row["n"], "seeds": seeds, "value": suite, "mean": row[suite],
                "interval": row[f"{suite}_interval"],
            }  # fmt: skip
    for row in read_json(folder / "evaluation.unlearning.json")["results"]:
        for value in ("forget_rise", "retain_rise", "retain_kl"):
            yield {
                "suite": "unlearning", "texts": row["texts"], "method": row["method"],
                "n": row["n"], "clamp": row["strength"], "seeds": len(row["features"]),
                "value": value, "mean": row[value], "interval": row[f"{value}_interval"],
            }  # fmt: skip


def main(config: RemovalBenchmark) -> None:
    """Measure, and add the rows."""
    torch.set_num_threads(config.threads)
    work = Path(config.work)
    found = evaluate(
        EvaluateConfig(
            run=config.sae,
            suite=("scr", "tpp", "unlearning"),
            quick=not config.full,
            out=str(work / "evaluation.json"),
            replace=True,
            probing=ProbingConfig(cache=str(work / "texts")),
        )
    )
    known = facts("cpu")
    common = {
        "sae": Path(config.sae).name,
        "protocol": found["protocol_hash"],
        **{name: known[name] for name in FACTS},
    }
    rows = [{**common, **row} for row in rows_of(work)]
    append(Path(config.results), rows, COLUMNS)
    say(f"{config.results}: {len(rows)} rows")


if __name__ == "__main__":
    run(RemovalBenchmark, main)
