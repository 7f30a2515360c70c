r"""Sparse probing by sae-probes and by us: the same SAE, texts, division and choice of features.

    python -m benchmarks.probing --sae runs/smollm2-135m-topk-quick

sae-probes runs in an environment of its own, with the SAE exported to SAELens' format. Ours takes
the same texts, repeated ones included, with the BOS that TransformerLens puts in front, the
library's division, chooses features as the library does (difference of means, each feature over
its mean where it is not 0) and the penalty too (AUC on the last training texts, columns as they
are). What is compared is then our activations, codes, solver and AUC: column `auc`. `auc_probe` is
that of our own probe (standardised columns, five folds) on the same features, `auc_smd` that on
features chosen by standardised mean difference, as `saescope eval` does it. `repeated` is the share
of the test texts that are in the training part too.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import sparse

from activations import load_model
from activations.models.files import folder_of
from benchmarks.peers.environments import PROBES
from benchmarks.running import run, run_peer
from sae.bench import rows as results
from sae.commands.convert import ConvertConfig, convert
from sae.data.placement import placement_of
from sae.formats.load import load
from sae.probing.logistic import fit, minimise
from sae.probing.representations import features_of
from sae.probing.scores import auc
from sae.probing.selection import columns, standardised_mean_difference, strongest
from sae.probing.text_rows import TextModel
from saescope.assets import read_member
from saescope.config import Config
from saescope.errors import check_range
from saescope.paths import remove
from saescope.progress import say

COLUMNS = (
    "date", "library", "version", "set", "k", "train", "test", "repeated", "auc_library", "auc",
    "difference", "same_features", "auc_probe", "auc_smd", "commit",
)  # fmt: skip
SETS = (
    "41_truthqa_tf",
    "117_us_state_FL",
    "118_us_state_CA",
    "119_us_state_TX",
    "130_temp_cat_Frequency",
    "131_temp_cat_Typical Time",
    "132_temp_cat_Event Ordering",
    "133_context_type_Causality",
    "134_context_type_Belief_states",
    "135_context_type_Event_duration",
)
"""the library's smallest ones of short texts"""
LONGEST = 1024
"""tokens of a text, in the library"""


@dataclass(frozen=True, kw_only=True)
class ProbingBenchmarkConfig(Config):
    """Probe an SAE with sae-probes and with saescope, and compare their AUC set by set."""

    sae: str
    """Folder of the run or SAE, of one site of a language model."""
    model: str = "smollm2-135m"
    """The model that it was trained on."""
    sets: tuple[str, ...] = SETS
    """Sets of sae-probes."""
    ks: tuple[int, ...] = (1, 2, 5, 16)
    """Numbers of features."""
    threads: int = 2
    """Threads of torch, in the library."""
    work: str = "build/peers"
    """Folder for the environment and for what is written."""
    results: str = "benchmarks/results/probing.csv"
    """File that rows are added to."""

    def __post_init__(self) -> None:
        check_range("threads", self.threads, low=1)


@dataclass(frozen=True, kw_only=True)
class AsTransformerLens(TextModel):
    """Texts as TransformerLens' tokenizer gives them: with a BOS where the model's has one at all,
    even if its own tokenizer adds none."""

    bos: int

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text after BOS."""
        ids = self.model.tokenize_batch(texts)
        return [[self.bos, *each][-self.max_tokens :] for each in ids]


def texts_of(name: str) -> list[str]:
    """The texts of a set in their order, repeated ones included."""
    content = read_member("sae-probes", f"sae_probes/data/cleaned_data/{name}.csv.zst")
    with pa.CompressedInputStream(pa.BufferReader(content), "zstd") as stream:
        table = csv.DictReader(io.StringIO(stream.read().decode(), newline=""))
    return [row["prompt"] for row in table]


def as_the_library_chooses(features: sparse.csr_array, y: np.ndarray) -> np.ndarray:
    """Difference of means of each feature over its mean where it is not 0."""
    mean = np.asarray(abs(features).sum(0))
    count = np.bincount(features.indices, minlength=len(mean))
    mean = mean / (count + 1e-6)
    difference = features[y].mean(0) - features[~y].mean(0)
    return np.asarray(difference) / (mean + 1e-6)


def as_the_library_fits(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Scores of rows `at` by a fit to x [rows, k], C chosen by AUC on its last rows."""
    held = min(int(0.2 * len(y)), 100)
    early, late = slice(0, len(y) - held), slice(len(y) - held, None)

    def scores(rows: slice, strength: float, shown: np.ndarray) -> np.ndarray:
        theta = minimise(x[rows], y[rows], np.ones((1, len(y[rows]))), strength)[0]
        return shown @ theta[:-1] + theta[-1]

    strengths = np.logspace(5, -5, 10)
    reached = [auc(scores(early, each, x[late]), y[late]) for each in strengths]
    return scores(slice(None), strengths[int(np.argmax(reached))], at)


def ours(features: sparse.csr_array, of_set: dict[str, Any], ks: Sequence[int]) -> list[dict]:
    """Our AUC by k, with the library's division and either choice of features."""
    train, test = np.array(of_set["train"]), np.array(of_set["test"])
    y = np.array(of_set["labels"]) == 1
    x = features[train]
    found = []
    by_library = as_the_library_chooses(x, y[train])
    by_smd = standardised_mean_difference(x, y[train])
    for k in ks:
        row: dict[str, Any] = {"k": k}
        for name, score in (("auc_probe", by_library), ("auc_smd", by_smd)):
            chosen = strongest(score, k)
            dense = columns(features, chosen)
            probe = fit(dense[train], y[train], seed=0)
            row[name] = auc(probe.score(dense[test]), y[test])
            if name == "auc_probe":
                row["features"] = set(chosen.tolist())
                row["auc"] = auc(as_the_library_fits(dense[train], y[train], dense[test]), y[test])
        found.append(row)
    return found


def rows_of(name: str, of_set: dict[str, Any], own: list[dict], common: dict) -> list[dict]:
    """Rows of the results, a row a k; each is printed."""
    texts = texts_of(name)
    in_training = {texts[index] for index in of_set["train"]}
    repeated = sum(texts[index] in in_training for index in of_set["test"])
    found = []
    for theirs, each in zip(of_set["by_k"], own, strict=True):
        library = theirs["test_auc"]
        found.append(
            {
                **common,
                "set": name,
                "k": each["k"],
                "train": len(of_set["train"]),
                "test": len(of_set["test"]),
                "repeated": f"{repeated / len(of_set['test']):.4f}",
                "auc_library": f"{library:.6f}",
                "auc": f"{each['auc']:.6f}",
                "difference": f"{each['auc'] - library:+.6f}",
                "same_features": len(each["features"] & set(theirs["indices"])),
                "auc_probe": f"{each['auc_probe']:.6f}",
                "auc_smd": f"{each['auc_smd']:.6f}",
            }
        )
        say(
            f"{name} k={each['k']}: sae-probes {library:.4f}, ours {each['auc']:.4f}, "
            f"with our probe {each['auc_probe']:.4f}, features by SMD {each['auc_smd']:.4f}"
        )
    return found


def main(config: ProbingBenchmarkConfig) -> None:
    """Run both on every set; rows in the results, and the largest difference."""
    folder = Path(config.work).absolute() / "probing"
    remove(folder)
    folder.mkdir(parents=True)
    convert(ConvertConfig(source=config.sae, out=str(folder / "sae"), to="saelens"))
    placement = placement_of(load(config.sae))
    site = placement.read[0]
    settings = {
        "model": str(folder_of(config.model, None)[0]),
        "sae": str(folder / "sae"),
        "site": site,
        "sets": list(config.sets),
        "ks": list(config.ks),
        "folder": str(folder),
        "threads": config.threads,
    }
    found = run_peer(PROBES, PROBES.script, settings, Path(config.work), folder)
    model = load_model(config.model, dtype="float32")
    shown = AsTransformerLens(
        model=model, site=site, representation="last", max_tokens=LONGEST, bos=found["bos"]
    )
    common = {
        "date": datetime.now(UTC).date().isoformat(),
        "library": PROBES.name,
        "version": found["version"],
        "commit": results.facts("cpu")["commit"],
    }
    written = []
    for name, of_set in found["sets"].items():
        texts = texts_of(name)[: len(of_set["labels"])]
        rows = shown.rows(texts)
        features = features_of(placement.sae.encode_sparse, rows, len(texts))
        written += rows_of(name, of_set, ours(features, of_set, config.ks), common)
    results.append(Path(config.results), written, COLUMNS)
    largest = max(abs(float(row["difference"])) for row in written)
    say(f"largest difference of AUC on {len(config.sets)} sets: {largest:.4f}")
    remove(folder)


if __name__ == "__main__":
    run(ProbingBenchmarkConfig, main)
