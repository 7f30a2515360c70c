"""How fast activations are read for training: rows of results/loader.csv.

    python -m benchmarks.loader
    python -m benchmarks.loader --tiny      (all of it on a few rows, to see that it runs)

The same synthetic rows (bfloat16, from a warm cache) in shuffled batches of float32: by our loader
in its orders and storages (and in batches of bfloat16, as they are stored), from safetensors shards
read whole in a random order and shuffled four at a time, as one would write it by hand, and by
SAELens' cached activation store in its own environment. Round by round, each of them in turn.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from activations import ActivationLoader, ActivationStore
from activations.loading.epoch_order import Order
from activations.loading.loader import BatchDtype
from activations.storage.row_formats import SiteRows, StorageKind
from activations.storage.window_data import WindowData
from activations.storage.writer import HarvestWriter
from benchmarks.peers.environments import HERE, PEERS
from benchmarks.running import run, run_peer
from sae.bench import rows as measured
from saescope import __version__, memory
from saescope.artefact import atomic_path, sha256_json
from saescope.config import Config
from saescope.errors import check_range
from saescope.paths import remove
from saescope.progress import say

SITE, CONTEXT, MIXED = "site", 128, 4
PASSES = 4
"""over the rows at a time: beginning takes as long as a tenth of a pass"""
SAELENS, SHARDS, OURS = "SAELens", "safetensors", "saescope"
BUFFER = {"n_batches_in_buffer": 64, "store_batch_size_prompts": 32}
"""SAELens' sequences in its buffer and sequences read at once; the default of 20 for the first is
less than a batch of 4096 tokens, which it refuses"""
COLUMNS: tuple[str, ...] = (
    "date", "library", "version", "setting", "storage", "batches", "rows", "d_in", "batch",
    "mix_chunks", "tokens_per_s", "least_tokens_per_s", "gb_per_s", "ratio_to_saescope", "rounds",
    "threads", "processor", "torch", "commit",
)  # fmt: skip

Who = tuple[str, str, str, str]
"""library, setting, how the rows are stored, and in what batches are given"""


@dataclass(frozen=True, kw_only=True)
class LoaderBenchConfig(Config):
    """Time the loader and what else reads activations from a disk."""

    results: str = "benchmarks/results/loader.csv"
    """File that rows are added to."""
    work: str = "build/peers"
    """Folder for environments, inputs and logs."""
    rows: int = 262_144
    """Rows that are read, in chunks of 16384."""
    d_in: int = 768
    """Their width."""
    batch: int = 4096
    """Rows a batch."""
    rounds: int = 5
    """Times that each is timed (over four passes, SAELens one); one more before them is not."""
    saelens: bool = True
    """Whether SAELens is compared with (its environment takes some minutes to make, once)."""
    threads: int = 2
    """Threads of torch, in every library."""
    tiny: bool = False
    """4096 narrow rows and two rounds, to see that everything runs."""

    def __post_init__(self) -> None:
        for name in ("rows", "d_in", "batch", "rounds", "threads"):
            check_range(name, getattr(self, name), low=1)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Rows, width, batch, rows of a chunk."""
        return (4096, 32, 256, 256) if self.tiny else (self.rows, self.d_in, self.batch, 16384)


def make_store(folder: Path, x: Tensor, storage: StorageKind, chunk_rows: int) -> ActivationStore:
    """A harvest of these rows [n, d_in], in windows of eight chunks."""
    if folder.exists():
        found = ActivationStore.open(folder)
        if found.complete:
            return found
        remove(folder)
    d_in, payload = x.shape[1], CONTEXT - 1
    sequences = 8 * chunk_rows // payload
    facts = {
        "config": {"context": CONTEXT, "out": None, "storage": storage},
        "model": {"name": "synthetic", "weights_hash": ""},
        "sites": {SITE: d_in},
        "chunk_rows": chunk_rows,
        "window_chunks": 8,
        "sequences_per_window": sequences,
        "planned_sequences": {},
    }
    writer, first = HarvestWriter.create(folder, facts), 0
    for part in x.split(sequences * payload):
        count = -(-len(part) // payload)
        rows = SiteRows(SITE, len(part), d_in, storage)
        rows.append(part)
        keep = np.ones((count, CONTEXT), bool)
        keep[:, 0] = False
        places = np.flatnonzero(keep)
        keep.reshape(-1)[places[len(part) :]] = False
        writer.write(
            WindowData(
                split="train",
                tokens=np.zeros((count, CONTEXT), np.int32),
                document=np.zeros((count, CONTEXT), np.int32),
                keep=keep,
                described=[],
                row_token=first * CONTEXT + places[: len(part)],
                rows=rows.arrays,
                order=np.random.default_rng(first).permutation(len(part)),
                sums={SITE: rows.sums()},
            )
        )
        first += count
    writer.finish({})
    return writer.store


def make_shards(folder: Path, x: Tensor, chunk_rows: int) -> list[Path]:
    """The rows as safetensors files of so many each."""
    if not folder.exists():
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            for number, part in enumerate(x.split(chunk_rows)):
                save_file({SITE: part.contiguous()}, temporary / f"{number:05d}.safetensors")
    return sorted(folder.iterdir())


def shard_batches(paths: list[Path], batch: int, seed: int) -> Iterator[Tensor]:
    """Passes over shards: some at a time in memory, their rows shuffled together."""
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(len(paths), generator=generator) for _ in range(PASSES)]
    order = torch.cat(passes).tolist()
    left = torch.empty(0)
    for start in range(0, len(order), MIXED):
        x = torch.cat([load_file(paths[n])[SITE] for n in order[start : start + MIXED]])
        places = torch.randperm(len(x), generator=generator)
        for part in places.split(batch):
            found = x[part].float()
            left = found if not len(left) else torch.cat([left, found])
            if len(left) >= batch:
                yield left[:batch]
                left = left[batch:]


def timed(passes: Callable[[int], Iterator[Tensor]], number: int) -> float:
    """Tokens a second of some passes, one after the other."""
    start, count = time.perf_counter(), 0
    for x in passes(number):
        count += len(x)
    return count / (time.perf_counter() - start)


def ours(
    store: ActivationStore, batch: int, order: Order, dtype: BatchDtype = "float32"
) -> Callable[[int], Iterator[Tensor]]:
    """Passes of our loader, the same one: `spread` has checked every chunk after the first."""
    loader = ActivationLoader(
        store, SITE, batch_size=batch, epochs=PASSES, order=order, dtype=dtype, mix_chunks=MIXED
    )
    return lambda _: iter(loader)


def saelens(config: LoaderBenchConfig, folder: Path, x: Tensor, dtype: str) -> dict[str, Any]:
    """Two timed passes of SAELens' store: version, torch, tokens_per_s.

    Raises ArtefactError if its environment cannot be made, or it fails.
    """
    rows, _, batch, _ = config.shape
    path = folder / "rows.npy"
    if not path.exists():
        np.save(path, x.to(torch.float16).numpy())
    settings = {
        "rows": str(path), "folder": str(folder / f"saelens-{dtype}"), "dtype": dtype,
        "context": CONTEXT, "d_in": x.shape[1], "tokens": rows // CONTEXT * CONTEXT,
        "batch": batch, "passes": 1, "threads": config.threads, **BUFFER,
    }  # fmt: skip
    script = HERE / "in_saelens_loader.py"
    return run_peer(PEERS[SAELENS], script, settings, Path(config.work), folder)


def measure(config: LoaderBenchConfig) -> None:
    """Time all of them, round by round; rows are added to the results."""
    torch.set_num_threads(config.threads)
    rows, d_in, batch, chunk_rows = config.shape
    folder = Path(config.work) / "loader" / sha256_json(config.shape)[:12]
    folder.mkdir(parents=True, exist_ok=True)
    x = torch.randn(rows, d_in, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    store = make_store(folder / "bfloat16", x, "bfloat16", chunk_rows)
    small = make_store(folder / "int8", x, "int8", chunk_rows)
    shards = make_shards(folder / "shards", x, chunk_rows)
    readers: dict[Who, Callable[[int], Iterator[Tensor]]] = {
        (OURS, "spread", "bfloat16", "float32"): ours(store, batch, "spread"),
        (OURS, "spread", "bfloat16", "bfloat16"): ours(store, batch, "spread", "bfloat16"),
        (OURS, "chunks", "bfloat16", "float32"): ours(store, batch, "chunks"),
        (OURS, "chunks", "bfloat16", "bfloat16"): ours(store, batch, "chunks", "bfloat16"),
        (OURS, "spread", "int8", "float32"): ours(small, batch, "spread"),
        (SHARDS, f"{MIXED} at a time", "bfloat16", "float32"): lambda n: shard_batches(
            shards, batch, n
        ),
    }
    rates: dict[Who, list[float]] = {who: [] for who in readers}
    versions = {SHARDS: version("safetensors"), OURS: __version__}
    for number in range(config.rounds + 1):
        for who, one in readers.items():
            rate = timed(one, number)
            if number:  # the first warms the cache
                rates[who].append(rate)
        for dtype in ("float16", "float32") if config.saelens and number else ():
            found = saelens(config, folder, x, dtype)
            versions[SAELENS] = found["version"]
            setting = f"{BUFFER['n_batches_in_buffer']} sequences"
            rates.setdefault((SAELENS, setting, dtype, "float32"), []).extend(found["tokens_per_s"])
    _write(config, rates, versions)


def _write(
    config: LoaderBenchConfig,
    rates: dict[Who, list[float]],
    versions: dict[str, str],
) -> None:
    facts = measured.facts("cpu")
    rows, d_in, batch, _ = config.shape
    base = statistics.median(rates[OURS, "spread", "bfloat16", "float32"])
    found = []
    for (library, setting, storage, given), each in rates.items():
        rate = statistics.median(each)
        say(f"{library:<12}{setting:<14}{storage:<10}{given:<10}{rate / 1e6:8.3f} M tokens/s")
        known = {name: facts[name] for name in ("date", "threads", "processor", "torch", "commit")}
        found.append({
            **known, "library": library, "version": versions[library],
            "setting": setting, "storage": storage, "batches": given, "rows": rows, "d_in": d_in,
            "batch": batch,
            "mix_chunks": "" if library == SAELENS else MIXED, "tokens_per_s": round(rate),
            "least_tokens_per_s": round(min(each)), "gb_per_s": f"{rate * d_in * 2 / 1e9:.3f}",
            "ratio_to_saescope": f"{rate / base:.3f}", "rounds": len(each),
        })  # fmt: skip
    measured.append(Path(config.results), found, COLUMNS)


if __name__ == "__main__":
    memory.keep_freed_memory()  # as saescope's command line does, and peers by their environment
    run(LoaderBenchConfig, measure)
