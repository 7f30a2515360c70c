"""How fast activations are harvested, and in how much memory: rows of results/harvest.csv.

    python -m benchmarks.harvest
    python -m benchmarks.harvest --tiny      (all of it on a few tokens, to see that it runs)

The same tokens through the same model in the same batches: a bare Hugging Face forward that stops
at the deepest site's block; our harvest without its disk; the whole of it; both at three sites at
once; and SAELens' cached-activations runner in its own environment. Round by round, each of them in
turn, in each precision. Then, in a process of its own, the memory of a harvest of several windows.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activations.corpora.documents import CorpusConfig
from activations.corpora.sequences import PackingCounts, Sequences
from activations.harvesting.compute import run_window
from activations.harvesting.config import HarvestConfig
from activations.harvesting.corpus_reader import CorpusReader
from activations.harvesting.pipeline import fill
from activations.harvesting.plan import planned_facts
from activations.models.config import ModelConfig
from activations.models.files import folder_of
from activations.models.language import Model
from activations.models.load import load_model
from activations.storage.writer import HarvestWriter
from benchmarks.peers.environments import HERE, PEERS
from benchmarks.running import run, run_peer
from sae.bench import rows as measured
from saescope import __version__, memory
from saescope.config import Config
from saescope.errors import ArtefactError, check_range
from saescope.paths import remove
from saescope.progress import Progress, say, silent

BARE, OURS, SAELENS, MEMORY = "transformers", "saescope", "SAELens", "memory"
FORWARD, COMPUTED, WRITTEN = "forward", "computed", "written"
RUNNER = "cached-activations runner"
TINY_TOKENS, TINY_ROWS = 2048, 256
COLUMNS: tuple[str, ...] = (
    "date", "library", "version", "setting", "sites", "model", "dtype", "batch", "context",
    "tokens", "tokens_per_s", "least_tokens_per_s", "cpu_us_per_token", "ratio_to_forward",
    "rounds", "first_window_mib", "peak_mib", "windows", "threads", "processor", "torch", "commit",
)  # fmt: skip
Who = tuple[str, str, int, str]
"""library, setting, number of sites, precision"""


@dataclass(frozen=True, kw_only=True)
class HarvestBenchConfig(Config):
    """Time the harvest and what else stores activations, and measure its memory."""

    results: str = "benchmarks/results/harvest.csv"
    """File that rows are added to."""
    work: str = "build/peers"
    """Folder for environments, harvests (removed again) and logs."""
    model: str = "smollm2-135m"
    """The model."""
    source: str = "wikipedia"
    """The text."""
    block: int = 9
    """Block of the deepest site; the other two of three are at a third and two thirds of it."""
    tokens: int = 65_536
    """Tokens that are harvested each time."""
    context: int = 128
    """Positions of a sequence."""
    batch: int = 32
    """Sequences in a forward pass."""
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    """Precisions of the model."""
    rounds: int = 5
    """Times each of them is timed; one more of ours and of the bare forward before them is not."""
    windows: int = 5
    """Windows of the default size over which memory is measured; 0: it is not."""
    saelens: bool = True
    """Whether SAELens is compared with (its environment takes some minutes to make, once)."""
    threads: int = 2
    """Threads of torch, in every library."""
    tiny: bool = False
    """2048 tokens, small windows and one round, to see that everything runs."""

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "rounds", "threads"):
            check_range(name, getattr(self, name), low=1)
        for name in ("block", "windows"):
            check_range(name, getattr(self, name), low=0)

    @property
    def folder(self) -> Path:
        """Of what is harvested."""
        return Path(self.work) / "harvest"

    def sites(self, number: int) -> tuple[str, ...]:
        """The deepest site, or three."""
        blocks = [self.block] if number == 1 else [self.block // 3, 2 * self.block // 3, self.block]
        return tuple(f"blocks.{block}.hook_resid_post" for block in dict.fromkeys(blocks))

    def harvest(self, dtype: str, number: int, tokens: int) -> HarvestConfig:
        """Our harvest of so many tokens at so many sites."""
        small: dict[str, Any] = {"chunk_rows": TINY_ROWS, "window_chunks": 2} if self.tiny else {}
        return HarvestConfig(
            model=ModelConfig(spec=self.model, dtype=dtype),
            corpus=CorpusConfig(source=self.source), sites=self.sites(number),
            out=str(self.folder / "store"), max_tokens=tokens, held_out_fraction=0.0,
            batch_sequences=self.batch, context=self.context, **small,
        )  # fmt: skip


class _Stopped(Exception):
    """No error: the forward pass came to the end of the block."""


def forward(model: Model, block: int, batches: Sequence[Tensor]) -> Tensor:
    """Bare forward passes up to a block's output; the last one's [sequence, position, d_model]."""
    found: list[Tensor] = []

    def stop(_module: object, _args: object, output: Any) -> None:
        found[:] = [output if isinstance(output, Tensor) else output[0]]
        raise _Stopped

    blocks: Any = model.hf.get_submodule(blocks_of(model))
    handle = blocks[block].register_forward_hook(stop)
    try:
        with torch.no_grad():
            for tokens in batches:
                with suppress(_Stopped):
                    model.hf.base_model(input_ids=tokens, use_cache=False)
    finally:
        handle.remove()
    return found[0]


def blocks_of(model: Model) -> str:
    """Name of the module that has the model's blocks."""
    return str(model.adapter.get_component_mapping()["blocks"].name)


def text_of(config: HarvestConfig, model: Model, facts: dict[str, Any]) -> list[Sequences]:
    """The windows' sequences, as the harvest has them."""
    return list(
        CorpusReader.of(config).packed(
            "train", model, per_group=facts["sequences_per_window"], counts=PackingCounts(),
            limit=facts["planned_sequences"]["train"],
        )
    )  # fmt: skip


class Ours:
    """Our harvest at some sites, with or without its disk."""

    def __init__(self, config: HarvestConfig, model: Model) -> None:
        self.config, self.model = config, model
        self.facts = planned_facts(config, model)
        self.text = text_of(config, model, self.facts)

    def compute(self) -> None:
        """The windows' rows, thrown away."""
        with silent(), Progress("harvest", 1, "tokens") as progress:
            for group in self.text:
                run_window(
                    "train", group, 0, self.model, self.config.sites, self.config, (0, 0, 0),
                    progress,
                )  # fmt: skip

    def write(self) -> None:
        """All of it, from the text to a finished store on disk."""
        out = Path(self.config.out)
        with silent():
            fill(self.config, self.model, HarvestWriter.create(out, self.facts))


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and seconds of processor, that something takes."""
    start, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - used


def saelens(config: HarvestBenchConfig, dtype: str, tokens: Path, d_in: int) -> dict[str, Any]:
    """SAELens' runner over the tokens of a file. Raises ArtefactError if it fails."""
    settings = {
        "tokens": str(tokens.absolute()), "model": str(folder_of(config.model, None)[0]),
        "dtype": dtype, "site": config.sites(1)[0], "d_in": d_in, "batch": config.batch,
        "threads": config.threads, "folder": str((config.folder / "saelens").absolute()),
    }  # fmt: skip
    script = HERE / "in_saelens_harvest.py"
    return run_peer(PEERS[SAELENS], script, settings, Path(config.work), config.folder)


def _check_alike(found: Tensor, norms: Sequence[float], dtype: str) -> None:
    """Raise ArtefactError if another library has other activations of the first sequence."""
    own = found[0, : len(norms)].float().norm(dim=1)
    off = float(((own - torch.tensor(norms)).abs() / own).max())
    if off > (0.05 if dtype == "bfloat16" else 0.001):
        raise ArtefactError(
            f"other activations than ours: norms differ by up to {off:.1%}", where=SAELENS
        )


def measure(config: HarvestBenchConfig) -> None:
    """Time all of them, round by round, and measure memory; rows are added to the results."""
    torch.set_num_threads(config.threads)
    config.folder.mkdir(parents=True, exist_ok=True)
    versions = {BARE: version("transformers"), OURS: __version__}
    found: list[dict[str, Any]] = []
    for dtype in config.dtypes:
        times, tokens = _measure(config, dtype, versions)
        found += _rows(config, times, tokens, versions)
        if config.windows:
            found.append(_memory(config, dtype))
        remove(config.folder / "store")
    measured.append(Path(config.results), found, COLUMNS)


def _measure(
    config: HarvestBenchConfig, dtype: str, versions: dict[str, str]
) -> tuple[dict[Who, list[tuple[float, float]]], int]:
    model = load_model(config.model, dtype=dtype)
    assert isinstance(model, Model)
    wanted = TINY_TOKENS if config.tiny else config.tokens
    one, three = (Ours(config.harvest(dtype, number, wanted), model) for number in (1, 3))
    tokens = np.concatenate([group.tokens for group in one.text])
    given = config.folder / "tokens.npy"
    np.save(given, tokens)
    batches = list(torch.from_numpy(tokens).split(config.batch))
    works: dict[Who, Callable[[], object]] = {
        (BARE, FORWARD, 1, dtype): partial(forward, model, config.block, batches)
    }
    for number, ours in ((1, one), (3, three)):
        works[OURS, COMPUTED, number, dtype] = ours.compute
        works[OURS, WRITTEN, number, dtype] = ours.write
    times: dict[Who, list[tuple[float, float]]] = {who: [] for who in works}
    for turn in range(1 if config.tiny else config.rounds + 1):
        for who, work in works.items():
            remove(Path(one.config.out))
            taken = timed(work)
            if turn or config.tiny:  # the first warms everything
                times[who].append(taken)
        if config.saelens and (turn or config.tiny):
            peer = saelens(config, dtype, given, model.d_in(config.sites(1)[0]))
            _check_alike(forward(model, config.block, batches[:1]), peer["first_norms"], dtype)
            versions[SAELENS] = peer["version"]
            share = tokens.size / peer["tokens"]
            taken = (share * peer["seconds"], share * peer["processor_seconds"])
            times.setdefault((SAELENS, RUNNER, 1, dtype), []).append(taken)
        say(f"{dtype}: round {turn} of {config.rounds}")
    return times, tokens.size


def _known(config: HarvestBenchConfig) -> dict[str, Any]:
    facts = measured.facts("cpu")
    known = {name: facts[name] for name in ("date", "threads", "processor", "torch", "commit")}
    return {**known, "model": config.model, "batch": config.batch, "context": config.context}


def _rows(
    config: HarvestBenchConfig, times: dict[Who, list[tuple[float, float]]], tokens: int,
    versions: dict[str, str],
) -> list[dict[str, Any]]:  # fmt: skip
    known, found = _known(config), []
    bare = next(each for who, each in times.items() if who[0] == BARE)
    base = statistics.median(wall for wall, _ in bare)
    for (library, setting, sites, dtype), each in times.items():
        seconds = statistics.median(wall for wall, _ in each)
        say(
            f"{library:<13}{setting:<26}{sites} site(s) {dtype:<9}{tokens / seconds:9,.0f} tokens/s"
            f"{base / seconds:7.3f} of the forward"
        )
        found.append({
            **known, "library": library, "version": versions[library], "setting": setting,
            "sites": sites, "dtype": dtype, "tokens": tokens,
            "tokens_per_s": round(tokens / seconds),
            "least_tokens_per_s": round(tokens / max(wall for wall, _ in each)),
            "cpu_us_per_token":
                f"{1e6 * statistics.median(used for _, used in each) / tokens:.1f}",
            "ratio_to_forward": f"{base / seconds:.3f}", "rounds": len(each),
        })  # fmt: skip
    return found


def _memory(config: HarvestBenchConfig, dtype: str) -> dict[str, Any]:
    """Peak memory above the model's, after the first window and at the end of a harvest."""
    remove(config.folder / "store")
    chosen = {
        name: getattr(config, name)
        for name in (
            *("work", "model", "source", "block", "batch", "context", "windows", "threads"),
            "tiny",
        )
    }
    out = config.folder / "memory.json"
    settings = {**chosen, "dtype": dtype, "results": str(out)}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.harvest_memory", json.dumps(settings)],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise ArtefactError(f"failed: {done.stderr.strip()[-600:]}", where="harvest_memory")
    peaks = json.loads(out.read_text(encoding="utf-8"))["peaks_mib"]
    first, last = peaks[0], peaks[-1]
    say(f"memory {dtype}: {first:.0f} MiB above the model's after a window, {last:.0f} at the end")
    return {
        **_known(config), "library": OURS, "version": __version__, "setting": MEMORY, "sites": 1,
        "dtype": dtype, "first_window_mib": round(first), "peak_mib": round(last),
        "windows": len(peaks),
    }  # fmt: skip


if __name__ == "__main__":
    memory.keep_freed_memory()  # as saescope's command line does, and peers by their environment
    run(HarvestBenchConfig, measure)
