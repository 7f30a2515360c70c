r"""Exact search in sparse codes beside exact search in the dense embeddings they stand for.

    python -m benchmarks.sparse_index

Both find the nearest row of each query by inner product: the index of `sae.analysis.sparse_index`
by the lists of the query's features, dense rows by one product of matrices (BLAS) for all queries
together. Codes are drawn: k features a row, feature number r with a chance that falls as r^-zipf,
as features of SAEs do; a search costs more where some are frequent. Times take turns, and processor
seconds are kept beside wall seconds. A row a way.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.running import run
from sae.analysis.sparse_index import SparseIndex, unit
from sae.bench import rows as results
from sae.bench.timing import Times, interleaved
from sae.kernels.codes import SparseCodes
from saescope.config import Config
from saescope.errors import check_range
from saescope.progress import say

COLUMNS = (
    "date",
    "way",
    "rows",
    "queries",
    "d_in",
    "d_sae",
    "k",
    "zipf",
    "bytes",
    "milliseconds_a_query",
    "cpu_milliseconds_a_query",
    "rounds",
    "processor",
    "threads",
    "torch",
    "python",
    "saescope",
    "commit",
)
_CHUNK = 4096
"""rows whose features are drawn together"""


@dataclass(frozen=True, kw_only=True)
class SparseIndexBenchmark(Config):
    """Time exact search in sparse codes and in dense rows."""

    rows: int = 100_000
    """Rows that are searched."""
    queries: int = 64
    """Queries of a round."""
    d_in: int = 384
    """Width of the dense rows."""
    d_sae: int = 1536
    """Features, four times the width as in the paper."""
    ks: tuple[int, ...] = (8, 16, 32)
    """Features a row."""
    zipf: float = 0.5
    """Exponent of the law of features' frequencies."""
    rounds: int = 5
    """Timed rounds."""
    threads: int = 1
    """Threads of torch, for the dense search; the index has one."""
    results: str = "benchmarks/results/sparse_index.csv"
    """File that rows are added to."""

    def __post_init__(self) -> None:
        for name in ("rows", "queries", "d_in", "d_sae", "rounds", "threads"):
            check_range(name, getattr(self, name), low=1)
        check_range("zipf", self.zipf, low=0)
        for k in self.ks:
            check_range("ks", k, low=1, high=self.d_sae)


def drawn(rows: int, k: int, config: SparseIndexBenchmark, seed: int) -> SparseCodes:
    """Codes of unit length with k features a row, without repeats, by their frequencies."""
    draw = torch.Generator().manual_seed(seed)
    weight = -config.zipf * torch.arange(1, config.d_sae + 1).log()
    chosen = []
    for start in range(0, rows, _CHUNK):
        size = (min(_CHUNK, rows - start), config.d_sae)
        # the largest of log-weights with Gumbel noise: draws without replacement
        noise = -torch.rand(size, generator=draw).clamp_min(1e-20).log().neg().log()
        chosen.append((weight + noise).topk(k, dim=1).indices)
    value = torch.rand(rows, k, generator=draw) + 0.5
    return unit(SparseCodes.from_fixed(torch.cat(chosen), value, config.d_sae))


def nearest(queries: Tensor, rows: Tensor) -> Tensor:
    """The row of the largest product with each query."""
    return (queries @ rows.T).argmax(1)


def main(config: SparseIndexBenchmark) -> None:
    """Time both ways, and add the rows."""
    torch.set_num_threads(config.threads)
    draw = torch.Generator().manual_seed(0)
    dense = functional.normalize(torch.randn(config.rows, config.d_in, generator=draw), dim=1)
    asked = functional.normalize(torch.randn(config.queries, config.d_in, generator=draw), dim=1)
    queries = {k: drawn(config.queries, k, config, 2) for k in config.ks}
    indices = {k: _checked(drawn(config.rows, k, config, 1), queries[k]) for k in config.ks}
    calls = {"dense": lambda: nearest(asked, dense)}
    calls |= {
        str(k): lambda k=k: np.asarray(indices[k].search(queries[k], 1)[1]) for k in config.ks
    }
    times = interleaved(calls, rounds=config.rounds)
    made = [_row(config, "dense", None, dense.nbytes, times["dense"])]
    made += [_row(config, "index", k, index.bytes, times[str(k)]) for k, index in indices.items()]
    path = Path(config.results)
    results.append(path, made, COLUMNS)
    for row in made:
        say(f"{row['way']:<6} k {row['k']}: {row['milliseconds_a_query']} ms a query")
    say(f"{path}: {len(made)} rows")


def _checked(rows: SparseCodes, queries: SparseCodes) -> SparseIndex:
    """The index of rows, which finds what brute force finds among the first of them."""
    few, first = SparseCodes.from_dense(queries.dense()[:2]), _first(rows)
    largest = (few.dense() @ first.dense().T).amax(1).numpy()
    found = SparseIndex(first).search(few, 1)[0][:, 0]
    np.testing.assert_allclose(found, largest, rtol=1e-5)
    return SparseIndex(rows)


def _first(rows: SparseCodes) -> SparseCodes:
    """The first rows, as many as are dense in little memory."""
    end = min(rows.batch, _CHUNK)
    return rows.select(torch.arange(len(rows.index)) < int(rows.row_ptr[end]))


def _row(
    config: SparseIndexBenchmark, way: str, k: int | None, size: int, times: Times
) -> Mapping[str, Any]:
    found = times.columns()
    facts = {key: value for key, value in results.facts("cpu").items() if key in COLUMNS}
    settings = {name: getattr(config, name) for name in ("rows", "queries", "d_in", "zipf")}
    return {
        **facts,
        **settings,
        "d_sae": config.d_sae if k else "",
        "way": way,
        "k": k or "",
        "bytes": size,
        "milliseconds_a_query": f"{1000 * found['median_s'] / config.queries:.3f}",
        "cpu_milliseconds_a_query": f"{1000 * found['cpu_s'] / config.queries:.3f}",
        "rounds": found["rounds"],
    }


if __name__ == "__main__":
    run(SparseIndexBenchmark, main)
