"""Build and query times of a feature store with Zipf-like features: rows of results/store.csv.

    python benchmarks/store_queries.py [--sequences 8192] [--d-sae 8192] [--active 23]

The store is synthetic: features are drawn by a Zipf-Mandelbrot law, about `active` at each of
sequences * 128 positions. Query times are warm, of random features and positions, one by one.
"""

import argparse
import csv
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sae.bench.rows import processor
from saescope.artefact import git_commit, library_versions
from saescope.progress import say
from store import Between, FeatureFilter, FeatureStore, StoreWriter
from store.database import STORE_FILE
from store.results import Occurrences

CONTEXT = 128
VOCABULARY = 49_152
RESULTS = Path(__file__).parent / "results" / "store.csv"
COLUMNS = (
    "date", "op", "shape", "p50_ms", "p95_ms", "threads", "duckdb version", "cpu", "commit",
)  # fmt: skip
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_PART = 512
_SLOW = "all occurrences"
_WINDOW = 12


def batches(
    sequences: int, d_sae: int, active: int, seed: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Positions, features and activations: distinct features at each kept position."""
    rng = np.random.default_rng(seed)
    weight = 1 / (np.arange(d_sae) + 60.0)
    cumulated = np.cumsum(weight) / weight.sum()
    number = rng.permutation(d_sae).astype(np.int32)
    for first in range(0, sequences, _PART):
        count = min(_PART, sequences - first)
        position = np.arange(first * CONTEXT, (first + count) * CONTEXT, dtype=np.int64)
        uniform = rng.random((len(position), round(1.4 * active)), dtype=np.float32)
        drawn = np.minimum(np.searchsorted(cumulated, uniform), d_sae - 1)
        drawn.sort(axis=1)
        distinct = np.ones(drawn.shape, dtype=bool)
        distinct[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        distinct[position % CONTEXT == 0] = False
        row, column = distinct.nonzero()
        feature = number[drawn[row, column]]
        activation = rng.exponential(1.0, len(row)) * (1 + feature % 7) + 0.01
        yield position[row], feature, activation.astype(np.float32)


class PeakMemory(threading.Thread):
    """Watches this process' memory while a block runs; MiB, all pages and private ones only."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.resident = self.private = 0.0
        self._done = threading.Event()

    def run(self) -> None:
        """Read /proc ten times a second."""
        while not self._done.wait(0.1):
            status = dict(
                line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
            )
            self.resident = max(self.resident, int(status["VmRSS"].split()[0]) / 1024)
            self.private = max(self.private, int(status["RssAnon"].split()[0]) / 1024)

    def stop(self) -> None:
        """End the watch."""
        self._done.set()
        self.join()


def build(path: Path, sequences: int, d_sae: int, active: int) -> tuple[int, float, PeakMemory]:
    """Write the store; the number of activations, seconds in the writer, peak memory."""
    rng = np.random.default_rng(1)
    shape = (sequences, CONTEXT)
    keep = np.ones(shape, dtype=bool)
    keep[:, 0] = False
    document = (np.arange(sequences * CONTEXT) // 190).astype(np.int32)
    seconds = 0.0
    memory = PeakMemory()
    memory.start()
    with StoreWriter(path, meta={"name": "benchmark"}, d_sae=d_sae, context=CONTEXT) as writer:
        writer.add_vocabulary(f" token{i}" for i in range(VOCABULARY))
        tokens = (rng.zipf(1.2, shape) % VOCABULARY).astype(np.int32)
        split = np.zeros(sequences, dtype=np.int8)
        writer.add_sequences(0, tokens, document.reshape(shape), keep, split)
        numbers = np.arange(document[-1] + 1, dtype=np.int32)
        titles = [f"Title {n}" for n in numbers]
        table = {"document": numbers, "key": titles, "title": titles, "split": 0 * numbers}
        writer.add_documents(pa.table(table))
        for part in batches(sequences, d_sae, active):
            began = time.perf_counter()
            writer.add_activations(*part)
            seconds += time.perf_counter() - began
        _add_relatives(writer, d_sae, rng)
        began = time.perf_counter()
        writer.finish()
        seconds += time.perf_counter() - began
    memory.stop()
    return writer.n_activations, seconds, memory


def _add_relatives(writer: StoreWriter, d_sae: int, rng: np.random.Generator) -> None:
    feature, rank = np.repeat(np.arange(d_sae), 10), np.tile(np.arange(10), d_sae)
    for sign in (1, -1):
        token = rng.integers(0, VOCABULARY, len(feature))
        writer.add_logits(feature, np.full(len(feature), sign), rank, token, rng.random(len(rank)))
    other = rng.integers(0, d_sae, len(feature))
    writer.add_neighbours(feature, rank, other, rng.random(len(rank)))


def queries(features: FeatureStore) -> dict[str, Callable[[int, int], object]]:
    """What is timed: each takes a random feature and a random sequence."""

    def page(feature: int, _: int) -> None:
        features.feature(feature)
        features.histogram(feature)
        features.examples(feature, "top", _WINDOW)
        features.examples(feature, "interval", _WINDOW)
        features.logits(feature)
        features.neighbours(feature)
        features.coactivating(feature)
        features.previous_live(feature)
        features.next_live(feature)

    by_density = FeatureFilter(density_min=1e-5, state="live")
    return {
        "top 20 examples with windows": lambda f, _: features.examples(f, "top", _WINDOW),
        "interval examples with windows": lambda f, _: features.examples(f, "interval", _WINDOW),
        "features of a token": lambda _, s: features.features_of_position(s, 64),
        "features of a sequence": lambda _, s: features.features_of_sequence(s),
        "histogram": lambda f, _: features.histogram(f),
        "1000 strongest activations": lambda f, _: features.activations(f, 1000),
        "page of the feature table": lambda f, _: features.features(
            by_density, "density", descending=True, offset=f // 2
        ),
        "all queries of a feature page": page,
        **token_queries(features),
    }


def token_queries(features: FeatureStore) -> dict[str, Callable[[int, int], object]]:
    """Queries of tokens, pairs of features and documents; tokens are as common as in the text."""
    rng = np.random.default_rng(3)
    tokens = features.corpus.tokens
    ids = tokens[rng.integers(len(tokens), size=100)].tolist()
    found = [features.occurrences(token_id) for token_id in ids]
    n_documents = int(features.meta["n_documents"])

    def of(number: int) -> Occurrences:
        return found[number % len(found)]

    def other(feature: int) -> int:
        return (feature + 1) % features.d_sae

    return {
        "occurrences of a token": lambda _, s: features.occurrences(ids[s % len(ids)]),
        "occurrences of a phrase": lambda _, s: features.occurrences(f"token{ids[s % 100]} token1"),
        "features on a token": lambda _, s: features.features_on(of(s)),
        "features on a token, all occurrences": lambda _, s: features.features_on(
            of(s), exact=True
        ),
        "firing on a token": lambda f, s: features.firing_on(f, of(s)),
        "silent on a token": lambda f, s: features.silent_on(f, of(s)),
        "10 examples at given positions": lambda f, s: features.examples_at(
            f, of(s).position[:10], _WINDOW
        ),
        "A fires and B does not": lambda f, _: features.fires_without(f, other(f)),
        "A and B within 5 tokens": lambda f, _: features.fires_near(f, other(f)),
        "features of a document": lambda _, s: features.features_of_document(s % n_documents),
        "documents by title": lambda f, _: features.documents(f"title {f}"),
        "features between bounds": lambda f, _: features.features(
            FeatureFilter(between=(Between("mean", 1.0, 5.0), Between("n_documents", f))), "std"
        ),
        "SQL: strongest features": lambda _, __: features.sql(
            "SELECT feature, max FROM feature ORDER BY max DESC LIMIT 20"
        ),
        "SQL: one feature's positions by tenths": lambda f, _: features.sql(
            "SELECT floor(activation * 10) AS tenth, count(*) AS n FROM activation_by_feature"
            f" WHERE feature = {f} GROUP BY tenth ORDER BY tenth"
        ),
    }


def main() -> None:
    """Build, measure, append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sequences", type=int, default=8192)
    parser.add_argument("--d-sae", type=int, default=8192)
    parser.add_argument("--active", type=int, default=23)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--store", help="measure the queries of this one instead of building one")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu where other programs are running: one thread's time without waiting for its turn",
    )
    given = parser.parse_args()
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "threads": 1,
        "duckdb version": library_versions()["duckdb"],
        "cpu": processor(),
        "commit": git_commit() or "",
    }
    if given.store:
        _append(_measured(Path(given.store), given.repeats, given.clock, facts))
        return
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / STORE_FILE
        n, seconds, memory = build(path, given.sequences, given.d_sae, given.active)
        shape = f"{n} activations, d_sae {given.d_sae}, {given.sequences * CONTEXT} tokens"
        size = path.stat().st_size / 1e6
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        about = f"{shape}; {size:.0f} MB, peak {peak:.0f} MiB ({memory.private:.0f} private)"
        took = f"{1000 * seconds:.0f}"
        threads = min(os.cpu_count() or 1, 8)
        build_row = {"op": "build", "shape": about, "p50_ms": took, "p95_ms": took}
        rows.append({**facts, **build_row, "threads": threads})
        say(f"build: {seconds:.1f} s; {about}")
        rows += _measured(path, given.repeats, given.clock, facts)
    _append(rows)


def _measured(
    path: Path, repeats: int, clock: str, facts: Mapping[str, object]
) -> list[dict[str, object]]:
    with FeatureStore.open(path) as features:
        meta = features.meta
        shape = f"{meta['n_activations']} activations, d_sae {features.d_sae}, "
        shape += f"{meta['n_tokens']} tokens"
        if clock != "wall":
            shape += f"; {clock} time"
        rows = measure(features, repeats, CLOCKS[clock])
        return [{**facts, "shape": shape, **row} for row in rows]


def _append(rows: Sequence[Mapping[str, Any]]) -> None:
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as stream:
        writer: csv.DictWriter[str] = csv.DictWriter(stream, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def measure(
    features: FeatureStore, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> Iterator[dict[str, str]]:
    """Median and 95th percentile of each query, after a few to warm up."""
    sequences = int(features.meta["n_sequences"])
    for name, query in queries(features).items():
        rng = np.random.default_rng(2)
        times = []
        for index in range((20 if _SLOW in name else repeats) + 10):
            feature, sequence = rng.integers(features.d_sae), rng.integers(sequences)
            began = clock()
            query(int(feature), int(sequence))
            if index >= 10:
                times.append(1000 * (clock() - began))
        p50, p95 = np.percentile(times, [50, 95])
        say(f"{name}: p50 {p50:.2f} ms, p95 {p95:.2f} ms")
        yield {"op": name, "p50_ms": f"{p50:.2f}", "p95_ms": f"{p95:.2f}"}


if __name__ == "__main__":
    main()
