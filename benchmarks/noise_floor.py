"""The smallest difference that each metric tells between two runs of the quick demo's recipe.

    python -m benchmarks.noise_floor

Trains a training file with each seed, of the start and of the order of the rows, measures all runs
as `saescope eval RUN... --reliability` does, and adds a row for each metric to the results. One
that was interrupted goes on when the same command is given again. `--page` writes the table of
docs/reference/evaluation.md from the last rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.running import run
from sae.bench import rows as results
from sae.commands.evaluate_runs import EvaluateRunsConfig, evaluate_runs
from sae.commands.train import train
from sae.evaluation.floors_file import read_reliability
from sae.evaluation.written import rows_of
from sae.training.config import TrainConfig
from saescope.artefact import write_bytes
from saescope.config import Config, load
from saescope.metrics import Metric
from saescope.progress import say

COLUMNS = (
    "date", "recipe", "metric", "better", "mean", "seed_sd", "sample_sd", "paired_sd", "told_from",
    "values", "seeds", "rows", "sequences", "protocol_hash", "processor", "threads", "torch",
    "python", "saescope", "commit",
)  # fmt: skip
_START, _END = "<!-- table: benchmarks.noise_floor -->", "<!-- end of table -->"


@dataclass(frozen=True, kw_only=True)
class NoiseFloorConfig(Config):
    """Measure which differences between runs of one recipe are told."""

    train: str = "configs/train/topk-quick.toml"
    """The training file."""
    harvest: str = "data/smollm2-135m-quick"
    """The harvest."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of the start and of the order of rows, a run each."""
    suite: tuple[str, ...] = ("core,geometry",)
    """Suites of metrics."""
    tokens: int = 2048
    """Held-out tokens that the model is run on."""
    quick: bool = False
    """Whether suites are measured with --quick."""
    metric_seeds: int = 5
    """Seeds of metrics that have one of their own."""
    threads: int = 1
    """Threads of torch."""
    work: str = "build/noise_floor"
    """Folder for the runs."""
    results: str = "benchmarks/results/noise_floor.csv"
    """File that rows are added to."""
    page: str | None = None
    """Page whose table is written from the results, which are not measured again."""


def rows(
    recipe: str, found: Mapping[str, Any], known: Mapping[str, Metric]
) -> Iterator[dict[str, Any]]:
    """A row of the results for each metric, from what reliability.json has."""
    protocol = found["protocol"]
    for name, each in found["floors"].items():
        yield {
            "recipe": recipe,
            "metric": name,
            "better": known[name].better,
            "mean": _figure(each["mean"]),
            "seed_sd": _figure(each["seed_sd"]),
            "sample_sd": _figure(each["measurement_sd"]),
            "paired_sd": _figure(each["paired_sd"]),
            "told_from": _figure(each["smallest_difference"]),
            "values": " ".join(map(_figure, each["values"])),
            "seeds": " ".join(str(one["seed"]) for one in found["runs"]),
            "rows": protocol.get("rows", ""),
            "sequences": protocol.get("sequences", ""),
            "protocol_hash": found["protocol_hash"],
        }


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def main(config: NoiseFloorConfig) -> None:
    """Train, measure and add the rows; or write the page."""
    if config.page is not None:
        write_page(Path(config.page), results.read(Path(config.results), COLUMNS))
        return
    torch.set_num_threads(config.threads)
    base = replace(load(TrainConfig, config.train), harvest=config.harvest)
    folder = Path(config.work)
    runs = [str(folder / f"seed-{seed}") for seed in config.seeds]
    for seed, out in zip(config.seeds, runs, strict=True):
        train(replace(base, seed=seed, data_seed=seed, out=out))
    path = folder / "reliability.json"
    evaluate_runs(
        EvaluateRunsConfig(
            run=runs[0],
            runs=tuple(runs[1:]),
            reliability=True,
            suite=config.suite,
            tokens=config.tokens,
            quick=config.quick,
            metric_seeds=config.metric_seeds,
            out=str(path),
            replace=True,
        )
    )
    found = read_reliability(path)
    facts = {k: v for k, v in results.facts("cpu").items() if k in COLUMNS}
    table = [{**row, **facts} for row in rows(Path(config.train).stem, found, rows_of(found))]
    results.append(Path(config.results), table, COLUMNS)
    say(f"{len(table)} metrics of {len(runs)} seeds in {config.results}")


def write_page(page: Path, table: Sequence[Mapping[str, str]]) -> None:
    """Write a page's table again."""
    before, _, rest = page.read_text(encoding="utf-8").partition(_START)
    after = rest.partition(_END)[2]
    lines = "\n".join(page_lines(table))
    write_bytes(page, f"{before}{_START}\n\n{lines}\n{_END}{after}".encode())


def page_lines(table: Sequence[Mapping[str, str]]) -> list[str]:
    """The table of the page: the last row of each metric, with its floor as a share of its mean."""
    last = {row["metric"]: row for row in table}
    lines = [
        "| metric | mean | seed sd | sample sd | paired sd | told from | of the mean |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in last.items():
        mean, told = float(row["mean"]), float(row["told_from"])
        # a mean about 0 is no scale to measure by
        share = f"{told / abs(mean):.1%}" if told <= 10 * abs(mean) else "-"
        figures = [
            f"{float(row[key]):.3g}" if row[key] else "-"
            for key in ("seed_sd", "sample_sd", "paired_sd", "told_from")
        ]
        lines.append(f"| `{name}` | {mean:.4g} | {' | '.join(figures)} | {share} |")
    return lines


if __name__ == "__main__":
    run(NoiseFloorConfig, main)
