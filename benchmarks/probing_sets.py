r"""Sparse probing of one SAE on sets of labelled texts, set by set.

    python -m benchmarks.probing_sets --sae runs/smollm2-135m-topk-quick

runs `saescope eval --suite probing` and adds a row for each set, setting and number of features to
the results: the AUC of the SAE's features beside every other method's, means over divisions. One
that was interrupted goes on when the same command is given again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.running import run
from sae.bench import rows as results
from sae.commands.evaluate import EvaluateConfig, evaluate
from sae.probing.config import ProbingConfig
from sae.probing.representations import METHODS
from sae.probing.tables import table_paths
from saescope.artefact import read_json
from saescope.config import Config
from saescope.progress import say

COLUMNS = (
    "date", "run", "set", "setting", "k", *METHODS, "sae_interval", "sae_accuracy", "majority",
    "train", "test", "seeds", "texts", "protocol", "processor", "threads", "torch", "saescope",
    "commit",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ProbingSetsConfig(Config):
    """Probe an SAE on labelled texts, and keep the AUC of each set."""

    sae: str
    """Folder of the run, of one site of a language model."""
    sets: tuple[str, ...] = ("sae-probes",)
    """Labelled texts, as --probing.sets of saescope eval."""
    cache: str = "build/probing-texts"
    """Folder where activations of texts are kept."""
    work: str = "build/probing_sets.json"
    """File for the evaluation."""
    results: str = "benchmarks/results/probing_sets.csv"
    """File that rows are added to."""


def rows_of(table: Mapping[str, Any], common: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each set, setting and k, from the JSON beside an evaluation."""
    by_place: dict[tuple[str, str, int], dict[str, Any]] = {}
    raw = {}
    for row in table["by_set"]:
        auc = f"{row['auc']:.4f}"
        if row["method"] == "raw":
            raw[row["set"], row["setting"]] = auc
            continue
        place = by_place.setdefault((row["set"], row["setting"], row["k"]), {})
        place[row["method"]] = auc
        if row["method"] == "sae":
            place |= {name: row[name] for name in ("majority", "train", "test", "seeds")}
            place["majority"] = f"{row['majority']:.4f}"
            place["sae_accuracy"] = f"{row['accuracy']:.4f}"
            half = row["auc_interval"]
            place["sae_interval"] = "" if half is None else f"{half:.4f}"
    return [
        {**common, "set": name, "setting": setting, "k": k, **values, "raw": raw[name, setting]}
        for (name, setting, k), values in by_place.items()
    ]


def main(config: ProbingSetsConfig) -> None:
    """Evaluate, and add the rows."""
    probing = ProbingConfig(sets=config.sets, texts=1000, cache=config.cache)
    found = evaluate(
        EvaluateConfig(
            run=config.sae, suite=("probing",), probing=probing, out=config.work, replace=True
        )
    )
    facts = results.facts("cpu")
    names = ("date", "processor", "threads", "torch", "saescope", "commit")
    common = {
        **{name: facts[name] for name in names},
        "run": Path(config.sae).name,
        "texts": probing.texts,
        "protocol": found["protocol_hash"][:12],
    }
    rows = rows_of(read_json(table_paths(Path(config.work))[1]), common)
    results.append(Path(config.results), rows, COLUMNS)
    say(f"{found['probing']['sets']} sets, {len(rows)} rows in {config.results}")


if __name__ == "__main__":
    run(ProbingSetsConfig, main)
