"""How each metric ranks SAEs that are worse than a trained one by construction.

    saescope eval RUN --controls --suite core,geometry,description_length
    python -m benchmarks.controls --demo RUN/controls.json

Measures an SAE trained on a planted world, the oracle that has the world's own directions, and
their controls, by every family that needs activations alone, and adds a row for each metric to a
table; with `--demo` also one for each metric that `saescope eval --controls` measured of an SAE of
a language model, of several files if its suites were measured apart. `trained_ranks` says how the
metric ranks the controls against the trained SAE, `oracle_ranks` against the oracle. The table in
docs/reference/evaluation.md is the last rows of each world (`--page` writes it).
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.planted_training import recipe_of, train
from benchmarks.running import run
from sae.bench import rows as results
from sae.core.base import SparseAutoencoder
from sae.evaluation import families
from sae.evaluation.controls import controls
from sae.evaluation.controls_file import read_controls
from sae.evaluation.planted import PlantedConfig, PlantedDictionary
from sae.evaluation.ranks import (
    CONTROLS,
    ORACLE,
    TRAINED,
    ranking,
    ranking_in_words,
)
from sae.evaluation.rows import pass_over
from sae.evaluation.written import rows_of
from saescope.artefact import write_bytes
from saescope.config import Config
from saescope.metrics import Metric
from saescope.progress import say

PLANTED, DEMO = "planted", "smollm2-135m-topk-quick"
SAES = (ORACLE, TRAINED, *CONTROLS)
COLUMNS = (
    "date",
    "world",
    "metric",
    "better",
    *SAES,
    "trained_ranks",
    "oracle_ranks",
    "rows",
    "protocol_hash",
    "processor",
    "threads",
    "torch",
    "python",
    "saescope",
    "commit",
)
ROWS = 4000
_START, _END = "<!-- table: benchmarks.controls -->", "<!-- end of table -->"


@dataclass(frozen=True, kw_only=True)
class ControlsConfig(Config):
    """Measure how metrics rank controls."""

    demo: tuple[str, ...] = ()
    """Files of controls of the quick demo's SAE, each of other suites; without any only the planted
    world is measured."""
    steps: int = 400
    """Training steps on the planted world."""
    seed: int = 0
    """Of the world, the SAE and the controls."""
    threads: int = 1
    """Threads of torch."""
    results: str = "benchmarks/results/controls.csv"
    """File that rows are added to."""
    page: str | None = None
    """Page whose table is written again from the results."""


def oracle_of(trained: SparseAutoencoder, world: PlantedDictionary) -> SparseAutoencoder:
    """The trained SAE with the world's own directions, on both sides, and no bias."""
    found = trained.clone()
    with torch.no_grad():
        dict(found.named_parameters())["W_dec"].copy_(world.directions)
        found.W_enc_T.copy_(world.directions)
        found.b_enc.zero_()
        found.b_dec.zero_()
    return found


def planted(config: ControlsConfig) -> dict[str, dict[str, Any]]:
    """All values of the oracle, an SAE trained on a planted world and its controls."""
    world = PlantedDictionary(PlantedConfig(offset=0.0, seed=config.seed))
    training, held_out = (world.sample(ROWS, stream=n).x for n in (11, 12))
    recipe = recipe_of("topk", d_sae=world.config.features, steps=config.steps, batch_size=256)
    with tempfile.TemporaryDirectory() as folder:
        trained = train("topk", world, recipe, Path(folder), seed=config.seed).sae
    chosen = [each.measure for each in families().values() if each.needs == "activations"]

    def values(sae: SparseAutoencoder) -> dict[str, Any]:
        counted, sums = pass_over(
            sae,
            lambda: held_out.split(1000),
            chosen,
            training=lambda count: lambda: training[:count].split(1000),
        )
        return {name: value for one in sums for name, value in one.values(counted).items()}

    of_trained = dict(controls(trained, training, seed=config.seed))
    saes = {ORACLE: oracle_of(trained, world), TRAINED: trained, **of_trained}
    return {name: values(sae) for name, sae in saes.items()}


def rows(
    world: str, values: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, Metric]
) -> Iterator[dict[str, Any]]:
    """A row of the table for each metric that the trained SAE has a figure of."""
    for name, row in metrics.items():
        if values[TRAINED].get(name) is None:
            continue
        oracle = ""
        if ORACLE in values:
            as_trained = {**values, TRAINED: values[ORACLE]}
            oracle = ranking_in_words(row, ranking(row, as_trained))
        yield {
            "world": world,
            "metric": name,
            "better": row.better,
            **{sae: figure(values.get(sae, {}).get(name)) for sae in SAES},
            "trained_ranks": ranking_in_words(row, ranking(row, values)),
            "oracle_ranks": oracle,
        }


def figure(value: float | None) -> str:
    """A figure as it is written into the table."""
    return "" if value is None else f"{value:.6g}"


def main(config: ControlsConfig) -> None:
    """Measure, add the rows, and write the page's table if that is asked for."""
    torch.set_num_threads(config.threads)
    known = {row.name: row for family in families().values() for row in family.metrics}
    facts = {k: v for k, v in results.facts("cpu").items() if k in COLUMNS}
    found = [{**row, "rows": ROWS, **facts} for row in rows(PLANTED, planted(config), known)]
    for path in config.demo:
        measured = read_controls(Path(path))
        protocol = measured["protocol"]
        of_demo = {"rows": protocol.get("rows", ""), "protocol_hash": measured["protocol_hash"]}
        ranked = {name: rows_of(measured)[name] for name in measured["ranks"]}
        found += [{**row, **of_demo, **facts} for row in rows(DEMO, measured["values"], ranked)]
    path = Path(config.results)
    results.append(path, found, COLUMNS)
    for row in found:
        say(f"{row['world']:<24} {row['metric']:<24} {row['trained_ranks']}")
    if config.page is not None:
        page = Path(config.page)
        before, _, rest = page.read_text(encoding="utf-8").partition(_START)
        table = "\n".join(page_lines(results.read(path, COLUMNS)))
        after = rest.partition(_END)[2]
        write_bytes(page, f"{before}{_START}\n\n{table}\n{_END}{after}".encode())


def page_lines(table: Sequence[Mapping[str, str]]) -> list[str]:
    """The table of the page: each metric that has a better way, in both worlds."""
    last = {(row["world"], row["metric"]): row for row in table}
    names = dict.fromkeys(row["metric"] for row in table if row["better"] != "neither")
    lines = [
        "| metric | planted world | quick demo SAE |",
        "|---|---|---|",
    ]
    for name in names:
        cells = [
            row["trained_ranks"] if (row := last.get((world, name))) else "not measured"
            for world in (PLANTED, DEMO)
        ]
        lines.append(f"| `{name}` | {cells[0]} | {cells[1]} |")
    return lines


if __name__ == "__main__":
    run(ControlsConfig, main)
