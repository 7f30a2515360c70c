"""Measure the members of a sweep, and draw FVU and delta CE against held-out L0.

    saescope sweep configs/sweep/pareto.toml
    python -m benchmarks.pareto --sweep runs/pareto

Rows are added to the results as members are finished; run again, it goes on. The chart and the
table in docs/reports/pareto.md are made from the rows.
"""

import csv
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.charts import write_chart
from benchmarks.running import run
from sae.commands.sweep import read_members
from sae.core.base import kind_of
from sae.data.harvests import held_out_rows, load_harvested_model, open_complete
from sae.evaluation.downstream import measure_downstream
from sae.evaluation.reconstruction import measure_reconstruction
from sae.formats.load import SAE_FOLDER, load
from sae.training.telemetry import read_metrics
from sae.training.trainer import METRICS
from saescope import __version__
from saescope.artefact import git_commit
from saescope.config import Config
from saescope.errors import check_range
from saescope.metrics import Metric, metric
from saescope.progress import say

FIELDS: tuple[str, ...] = (
    "member", "architecture", "target_l0", "seed", "d_sae", "steps", "l0", "fvu", "fvu_interval",
    "cosine", "norm_ratio", "dead_fraction", "silent_fraction", "rows", "delta_ce",
    "delta_ce_interval", "kl", "ce_recovered_mean", "tokens", "saescope", "torch", "machine",
    "commit", "measured",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ParetoConfig(Config):
    """Measure a sweep and chart it."""

    sweep: str = "runs/pareto"
    """Folder of the sweep."""
    results: str = "benchmarks/results/pareto.csv"
    """File that rows are added to."""
    docs: str = "docs/reports"
    """Folder of pareto.md and images/pareto_*.png."""
    tokens: int = 4096
    """Held-out tokens that the model is run on for delta CE."""
    threads: int = 2
    """Threads of torch."""

    def __post_init__(self) -> None:
        check_range("tokens", self.tokens, low=1)
        check_range("threads", self.threads, low=1)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows there are."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def measure_members(config: ParetoConfig) -> None:
    """Add a row for every member that is trained and has none."""
    folder, path = Path(config.sweep), Path(config.results)
    members: Mapping[str, Any] = read_members(folder)
    have = {row["member"] for row in read_rows(path)}
    ready = [m for m in members if m not in have and (folder / m / SAE_FOLDER).exists()]
    if not ready:
        return
    harvest = open_complete(members[ready[0]]["harvest"])
    model = load_harvested_model(harvest, harvest.manifest["model"]["dtype"])
    for number, member in enumerate(ready):
        say(f"measuring {member} ({number + 1} of {len(ready)})")
        settings, sae = members[member], load(folder / member)
        site = str(sae.metadata["site"])
        found = measure_reconstruction(sae, held_out_rows(harvest, site, None))
        held_out = torch.from_numpy(harvest.split == 1).nonzero()[:, 0]
        chosen = held_out[: max(1, config.tokens // harvest.context)].numpy()
        downstream = measure_downstream(
            model,
            site,
            lambda x, sae=sae: sae(x).x_hat,
            torch.from_numpy(harvest.statistics(site).mean),
            torch.from_numpy(harvest.tokens[chosen]).long(),
            torch.from_numpy(harvest.keep[chosen]),
        )
        last = read_metrics(folder / member / METRICS)[-1]
        row = {
            "member": member,
            "architecture": kind_of(sae.config),
            "target_l0": settings["trainer"]["target_l0"],
            "seed": settings["seed"],
            "d_sae": sae.d_sae,
            "steps": last["step"],
            **{name: getattr(found, name) for name in FIELDS if hasattr(found, name)},
            "dead_fraction": last["train"]["dead"] / sae.d_sae,
            "silent_fraction": found.dead_fraction,
            **{name: getattr(downstream, name) for name in FIELDS if hasattr(downstream, name)},
            "ce_recovered_mean": downstream.recovered_mean,
            "saescope": __version__,
            "torch": torch.__version__,
            "machine": platform.processor() or platform.machine(),
            "commit": git_commit(),
            "measured": datetime.now(UTC).date().isoformat(),
            "rows": found.rows,
        }
        _append(path, row)


def _append(path: Path, row: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        short = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        writer.writerow(short)


def summarise(rows: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Means over seeds, and their deviation, of each architecture at each target."""
    groups: dict[tuple[str, float], list[Mapping[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["architecture"], float(row["target_l0"])), []).append(row)
    summary = []
    for (architecture, target), members in sorted(groups.items()):
        entry: dict[str, Any] = {"architecture": architecture, "target": target, "n": len(members)}
        for name in ("l0", "fvu", "delta_ce", "dead_fraction", "silent_fraction"):
            values = [float(member[name]) for member in members]
            entry[name] = mean(values)
            entry[f"{name}_sd"] = stdev(values) if len(values) > 1 else None
        summary.append(entry)
    return summary


def write_docs(config: ParetoConfig) -> None:
    """docs/reports/pareto.md and its chart, from the rows."""
    rows = read_rows(Path(config.results))
    summary, docs = summarise(rows), Path(config.docs)
    x = f"held-out {metric('l0').label}"
    for measure in ("fvu", "delta_ce"):
        series = {
            kind: [(s["l0"], s[measure]) for s in summary if s["architecture"] == kind]
            for kind in sorted({s["architecture"] for s in summary})
        }
        write_chart(docs / "images" / f"pareto_{measure}.png", series, x=x, y=metric(measure).title)
    note = (Path(__file__).parent / "pareto_notes.md").read_text(encoding="utf-8")
    (docs / "pareto.md").write_text(f"{note}\n{table(summary)}", encoding="utf-8")
    say(f"{docs / 'pareto.md'}: {len(rows)} members")


def table(summary: Iterable[Mapping[str, Any]]) -> str:
    """The summary as a table in Markdown."""
    l0, fvu, delta_ce = (metric(name) for name in ("l0", "fvu", "delta_ce"))
    dead = metric("dead_fraction")
    columns = [
        "architecture",
        f"target {l0.label}",
        f"held-out {l0.label}",
        fvu.label,
        delta_ce.label,
        "dead",
        f"{dead.label}, held out",
        "seeds",
    ]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for s in summary:
        cells = [
            s["architecture"],
            f"{s['target']:g}",
            l0.shown(s["l0"]),
            _spread(s, fvu),
            _spread(s, delta_ce),
            dead.shown(s["dead_fraction"]),
            dead.shown(s["silent_fraction"]),
            str(s["n"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(entry: Mapping[str, Any], row: Metric) -> str:
    text, deviation = row.shown(entry[row.name]), entry[f"{row.name}_sd"]
    return text if deviation is None else f"{text} ± {row.shown(deviation)}"


def main(config: ParetoConfig) -> None:
    """Measure and chart."""
    torch.set_num_threads(config.threads)
    measure_members(config)
    write_docs(config)


if __name__ == "__main__":
    run(ParetoConfig, main)
