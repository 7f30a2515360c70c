"""Our SAEs and SAELens' on the same rows of a synthetic world: synth.json.

    python -m benchmarks.synth --world small --samples 1000000

For each architecture that both have, `saescope synth` trains ours, and SAELens, in its own
environment, its own with the settings that SynthSAEBench published, on the very same rows in the
same order. As its learning rate is for runs of 200 million rows, `--schedule ours` gives SAELens
the learning rate, warm-up and decay that ours takes. Each is scored by its own library on the same
further rows; every SAE of theirs that we can read is also scored by us, and every one of ours that
they can read by them: the largest difference between the two scorings is in the file. Runs again
from where it was interrupted.
"""

import json
import os
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.peers.environments import PEERS, python_of
from benchmarks.running import run
from sae.bench.rows import processor
from sae.commands.synth import SCORES, SynthConfig, synth, table
from sae.core.base import SparseAutoencoder
from sae.evaluation.true_features import score_true_features
from sae.formats import format_named
from sae.formats.load import load
from sae.synthetic.drawing import DrawnRows
from sae.synthetic.stream import SyntheticStream
from sae.synthetic.world import World, named_world
from sae.training.schedules import default_lr
from saescope.artefact import git_commit, library_versions, read_json, write_json
from saescope.config import Config
from saescope.errors import ArtefactError, SaescopeError
from saescope.progress import say

HERE = Path(__file__).parent
PEER = PEERS["SAELens"]
SCRIPT = HERE / "peers" / "in_saelens_synthetic.py"
COMPARED = (
    "true_l0", "l0", "dead_latents", "shrinkage", "explained_variance", "mcc", "uniqueness",
    "precision", "recall", "f1", "accuracy",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SynthBenchmark(Config):
    """Train ours and SAELens' on the same rows of a world."""

    world: str = "small"
    """The world."""
    samples: int = 1_000_000
    """Rows to train each on."""
    scored_rows: int = 100_000
    """Rows to score on."""
    architectures: tuple[str, ...] = (
        "batchtopk",
        "matryoshka",
        "topk",
        "matching_pursuit",
        "jumprelu",
        "relu",
        "gated",
    )
    """Those that both have."""
    schedule: Literal["published", "ours"] = "published"
    """Learning rate of SAELens over the run."""
    aimed_l0: float | None = None
    """L0 that SAELens' penalties are moved towards, if not that of ours: it ends below it."""
    seed: int = 0
    """Of weights and rows."""
    threads: int = 2
    """Threads of either library."""
    work: str = "build/synth"
    """Folder for the runs."""
    peers: str = "build/peers"
    """Folder of the peers' environments."""
    out: str = str(HERE / "results" / "synth.json")
    """The results."""


def work(config: SynthBenchmark) -> None:
    """Train and score all, and write the file."""
    torch.set_num_threads(config.threads)
    world = named_world(f"synth:{config.world}")
    folder = Path(config.work) / config.world
    ours = synth(
        SynthConfig(
            world=config.world,
            out=str(folder / "ours"),
            architectures=config.architectures,
            samples=config.samples,
            seeds=(config.seed,),
            scored_rows=config.scored_rows,
        )
    )
    protocol = read_json(folder / "ours" / SCORES)["protocol"]
    stream = SyntheticStream(world, batch_size=1024, seed=config.seed)
    rows = list(stream.scored(config.scored_rows))
    scored = _write_rows(folder / "scored.npz", world, rows)
    found: list[dict[str, Any]] = []
    for own in ours:
        kind = own["architecture"]
        found.append(
            {"library": "saescope", **own, **_scored_there(config, world, folder, own, scored)}
        )
        say(f"SAELens: {kind}")
        name = f"saelens-{kind}" + ("-ours" if config.schedule == "ours" else "")
        name += f"-aimed{config.aimed_l0:g}" if config.aimed_l0 else ""
        theirs = _trained_there(config, world, folder / name, kind, protocol, scored)
        found.append({"library": "SAELens", "run": name, "architecture": kind, **theirs})
        sae = _read(folder / name)
        if sae is not None:
            mine = _scored_here(sae, world, rows)
            found[-1]["largest_difference_of_scores"] = _difference(mine, theirs)
    for line in table(found):
        say(line)
    facts = {"cpu": processor(), "threads": config.threads, "commit": git_commit()}
    facts |= {"schedule": config.schedule, "aimed_l0": config.aimed_l0}
    result = {"protocol": protocol, **facts, "libraries": library_versions(), "runs": found}
    write_json(Path(config.out), result)


def _write_rows(path: Path, world: World, rows: list[DrawnRows]) -> Path:
    """The rows to score on, with their true codes, for the peer."""
    index, value = (torch.cat([getattr(r.codes, n) for r in rows]) for n in ("index", "value"))
    counts = torch.cat([r.codes.row_ptr.diff() for r in rows])
    np.savez(
        path,
        x=torch.cat([r.x for r in rows]).numpy(),
        directions=world.directions.numpy(),
        row_ptr=np.concatenate([[0], counts.cumsum(0).numpy()]),
        index=index.numpy(),
        value=value.numpy(),
    )
    return path


def _trained_there(
    config: SynthBenchmark, world: World, folder: Path, kind: str, protocol: dict[str, Any],
    scored: Path,
) -> dict[str, Any]:  # fmt: skip
    """Train with SAELens on the rows that ours was trained on; its scores."""
    results = folder.with_suffix(".json")
    batch = int(protocol["trainer"]["batch_size"])
    steps = config.samples // batch
    settings = {
        "architecture": kind, "k": config.aimed_l0 or protocol["l0"], "d_sae": protocol["d_sae"],
        "d_in": world.config.d_in, "batch": batch, "steps": steps,
        **_schedule(config, protocol, steps),
    }  # fmt: skip
    stream = SyntheticStream(world, batch_size=batch, seed=config.seed)
    return _run(config, settings, folder, scored, results, (stream, steps))


def _schedule(config: SynthBenchmark, protocol: dict[str, Any], steps: int) -> dict[str, Any]:
    """Peak learning rate of SAELens (0: the published one), its warm-up and its decay, in steps."""
    if config.schedule == "published":
        return {"lr": 0.0, "warmup_steps": 0, "decay_steps": 0}
    trainer = protocol["trainer"]
    return {
        "lr": trainer["lr"] or default_lr(protocol["d_sae"], steps),
        "warmup_steps": round(trainer["warmup_fraction"] * steps),
        "decay_steps": round(trainer["decay_fraction"] * steps),
    }


def _scored_there(
    config: SynthBenchmark, world: World, folder: Path, own: dict[str, Any], scored: Path
) -> dict[str, Any]:
    """By how much SAELens' scores of one of ours differ from ours, if it can read it."""
    exported = folder / f"exported-{own['run']}"
    if not exported.exists():
        exported.mkdir(parents=True)
        try:
            format_named("saelens").write(load(folder / "ours" / own["run"]), exported)
        except SaescopeError as error:
            exported.rmdir()
            say(f"{own['run']} cannot be written for SAELens: {error}")
            return {}
    theirs = _run(config, {"steps": 0}, exported, scored, exported.with_suffix(".json"), None)
    return {"largest_difference_of_scores": _difference(own, theirs)}


def _run(
    config: SynthBenchmark, settings: dict[str, Any], folder: Path, scored: Path, results: Path,
    rows: tuple[SyntheticStream, int] | None,
) -> dict[str, Any]:  # fmt: skip
    """What the script finds; it reads `rows` batches of a stream from its standard input."""
    if results.exists():
        return _renamed(read_json(results))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    given = {
        **settings, "folder": str(folder), "scored": str(scored), "results": str(results),
        "threads": config.threads, "seed": config.seed,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        file, log = Path(temporary) / "settings.json", Path(temporary) / "log.txt"
        file.write_text(json.dumps(given), encoding="utf-8")
        command = [str(python_of(PEER, Path(config.peers)).absolute()), str(SCRIPT), str(file)]
        with (
            log.open("wb") as said,
            subprocess.Popen(command, stdin=subprocess.PIPE, stderr=said, env=environment) as peer,
        ):
            assert peer.stdin is not None
            stream, steps = rows or (None, 0)
            with suppress(BrokenPipeError):  # its own error says why it reads no more
                for batch, _ in zip(stream or (), range(steps), strict=False):
                    peer.stdin.write(batch.x.numpy().tobytes())
                peer.stdin.close()
        if peer.returncode:
            why = log.read_text(encoding="utf-8", errors="replace")[-1500:]
            raise ArtefactError(f"SAELens failed: {why}", where=str(SCRIPT))
    return _renamed(read_json(results))


def _renamed(scores: dict[str, Any]) -> dict[str, Any]:
    """Scores by our names."""
    return {**scores, "l0": scores["sae_l0"], "f1": scores["f1_score"]}


def _read(folder: Path) -> SparseAutoencoder | None:
    try:
        return load(folder)
    except SaescopeError as error:
        say(f"{folder} is scored by SAELens alone: {error}")
        return None


def _scored_here(sae: SparseAutoencoder, world: World, rows: list[DrawnRows]) -> dict[str, Any]:
    return asdict(score_true_features(sae.eval(), sae.W_dec, world.directions, rows))


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Largest difference of a score."""
    return max(abs(float(ours[name]) - float(theirs[name])) for name in COMPARED)


if __name__ == "__main__":
    run(SynthBenchmark, work)
