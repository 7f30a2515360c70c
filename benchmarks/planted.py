"""What every architecture finds of planted dictionaries: planted.csv, docs/reports/recovery.md.

    OMP_NUM_THREADS=1 python -m benchmarks.planted

Each row is one training. Run again after an interruption, it goes on with what is not there yet;
rows of another recipe stay, and the page is made of this one's. About 10 minutes on one thread.
"""

import csv
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, cast, get_args

import torch

from benchmarks.planted_page import page
from benchmarks.planted_training import (
    Recipe,
    absorption,
    controls,
    planted_for,
    rarest,
    recipe_of,
    train,
)
from benchmarks.running import run
from sae.architectures import list_architectures
from sae.bench.rows import processor
from sae.evaluation.planted import PlantedConfig, PlantedDictionary, Structure
from saescope import __version__
from saescope.artefact import git_commit, write_bytes
from saescope.config import Config
from saescope.errors import check_choice, check_range
from saescope.metrics import texts
from saescope.progress import say

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reports" / "recovery.md"
KEY = (
    "kind", "data", "seed", "d_in", "true", "active", "d_sae", "target_l0", "steps", "batch", "lr",
    "options",
)  # fmt: skip
COLUMNS = (
    "date", *KEY, "l0", "fvu", "dead", "recovery", "recovered_share", "matched", "rarest",
    "untrained", "pca", "nmf", "absorption", "absorption_fraction", "parent_missed",
    "parent_missed_alone", "parents_found", "saescope", "torch", "cpu", "commit",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PlantedBenchmark(Config):
    """Train architectures on planted dictionaries."""

    kinds: tuple[str, ...] = ()
    """Architectures; all if not given."""
    data: tuple[str, ...] = get_args(Structure)
    """Structures of the planted features."""
    seeds: int = 3
    """Seeds, each of another dictionary and other initial weights."""
    steps: int = 600
    """Steps of each training."""
    threads: int = 1
    """Threads of torch."""

    def __post_init__(self) -> None:
        for kind in self.kinds:
            check_choice("no such architecture", "kinds", kind, list_architectures())
        for name in self.data:
            check_choice("no such structure", "data", name, get_args(Structure))
        for name in ("seeds", "steps", "threads"):
            check_range(name, getattr(self, name), low=1)


class Table:
    """Rows of a CSV file, added to one at a time."""

    def __init__(self, name: str, columns: tuple[str, ...], key: tuple[str, ...]) -> None:
        self.path = ROOT / "benchmarks" / "results" / name
        self.columns, self.key = columns, key
        self.rows: list[dict[str, str]] = []
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as stream:
                self.rows = list(csv.DictReader(stream))

    def row(self, key: dict[str, Any], measured: Callable[[], dict[str, float]]) -> dict[str, str]:
        """The row of this key; measured and added if it is not there."""
        wanted = {name: str(value) for name, value in key.items()}
        for row in self.rows:
            if all(row[name] == wanted[name] for name in self.key):
                return row
        row = {**wanted, **_facts(), **{name: f"{x:.4f}" for name, x in measured().items()}}
        self.rows.append({name: row.get(name, "") for name in self.columns})
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_bytes(self.path, text.getvalue().encode())
        return self.rows[-1]


def architecture_rows(config: PlantedBenchmark) -> list[dict[str, str]]:
    """Every architecture on every structure with every seed."""
    table = Table("planted.csv", COLUMNS, KEY)
    found = []
    for data, kind, seed in product(
        config.data, config.kinds or tuple(list_architectures()), range(config.seeds)
    ):
        planted = PlantedConfig(structure=cast(Structure, data), seed=seed)
        recipe = recipe_of(kind, steps=config.steps)
        key = {
            "kind": kind, "data": data, "seed": seed, "d_in": planted.d_in,
            "true": planted.features, "active": planted.active, "d_sae": recipe.d_sae,
            "target_l0": recipe.l0, "steps": recipe.steps, "batch": recipe.batch_size,
            "lr": recipe.lr,
            "options": " ".join(f"{name}={value}" for name, value in recipe.options.items()),
        }  # fmt: skip
        row = table.row(key, partial(_measured, kind, planted, recipe))
        metrics = texts(("l0", "fvu"), {name: float(row[name]) for name in ("l0", "fvu")})
        say(f"{data} {kind} {seed}: recovery {row['recovery']}, {metrics}")
        found.append(row)
    return found


@cache
def _controls(planted: PlantedConfig, d_sae: int) -> dict[str, float]:
    return controls(PlantedDictionary(planted), d_sae)


def _measured(kind: str, config: PlantedConfig, recipe: Recipe) -> dict[str, float]:
    planted = planted_for(kind, config)
    with tempfile.TemporaryDirectory() as folder:
        found = train(kind, planted, recipe, Path(folder), seed=config.seed)
    absorbed = {}
    if len(planted.families):
        measured = absorption(found, planted)
        absorbed = {
            "absorption": measured.rate,
            "absorption_fraction": measured.fraction,
            "parent_missed": measured.missed,
            "parent_missed_alone": measured.missed_alone,
            "parents_found": measured.found,
        }
    return {
        "l0": found.held_out["l0"],
        "fvu": found.held_out["fvu"],
        "dead": found.held_out["dead_fraction"],
        "recovery": found.recovery.mean,
        "recovered_share": found.recovery.found,
        "matched": found.recovery.matched,
        "rarest": rarest(found, planted),
        "untrained": found.untrained,
        **_controls(planted.config, recipe.d_sae),
        **absorbed,
    }


def _facts() -> dict[str, str]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "saescope": __version__,
        "torch": torch.__version__,
        "cpu": processor(),
        "commit": git_commit() or "",
    }


def write(config: PlantedBenchmark) -> None:
    """Run what is not there yet and write the page."""
    torch.set_num_threads(config.threads)
    rows = architecture_rows(config)
    if not config.kinds:
        write_bytes(PAGE, page(rows).encode())
        say(f"{PAGE.relative_to(ROOT)} written")


if __name__ == "__main__":
    run(PlantedBenchmark, write)
