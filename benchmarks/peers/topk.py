"""Our TopK, SAELens' and dictionary_learning's on the same activations, in the same order.

    python -m benchmarks.peers.topk --harvest data/smollm2-135m-wikipedia

Run again after an interruption, it goes on with the trainings that are not finished.
"""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.peers.data import Data, export, floats
from benchmarks.peers.environments import PEERS, python_of
from benchmarks.peers.neutral import NeutralTopK, check_against_library
from benchmarks.peers.results import OWN, TUNED, append_row, report
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.evaluation.reconstruction import measure_reconstruction
from sae.normaliser import Normaliser, NormaliserKind
from sae.training.schedules import base_lr
from sae.training.trainer import Trainer, TrainerConfig
from saescope import __version__
from saescope.artefact import (
    atomic_path,
    git_commit,
    read_json,
    remove,
    sha256_json,
    write_json,
)
from saescope.config import Config, fail, parse
from saescope.errors import ArtefactError, SaescopeError, check_range
from saescope.progress import say

OURS = "saescope"
CHECK_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class PeersConfig(Config):
    """Compare TopK dictionaries of three libraries."""

    harvest: str = "data/smollm2-135m-wikipedia"
    """Folder of a finished harvest."""
    site: str | None = None
    """TransformerLens name of the site; may be left out if the harvest has only one."""
    work: str = "build/peers"
    """Folder for environments, exported activations and weights (about 5 GB)."""
    results: str = "benchmarks/results/peers_topk.csv"
    """File that rows are added to."""
    d_sae: int = 4096
    """Width of each dictionary."""
    k: int = 32
    """Features kept a token."""
    batch_size: int = 2048
    """Tokens a step."""
    steps: int | None = None
    """Steps of training; one pass over the harvest if not given."""
    learning_rates: tuple[float, ...] = (1.6e-3, 3.2e-3)
    """Tried with every library besides its own settings."""
    lr_multiplier: float = 8.0
    """Our own settings: factor on our rule for the learning rate."""
    normaliser: NormaliserKind = "unit_mean_square"
    """Our own settings: scale to train at."""
    dead_after_tokens: int = 250_000
    """Tokens without firing after which every library's AuxK takes a feature for dead."""
    seed: int = 0
    """Seed of the order of the batches and of the initial weights."""
    threads: int = 2
    """Threads of torch."""

    def __post_init__(self) -> None:
        for name in ("d_sae", "k", "batch_size", "threads"):
            check_range(name, getattr(self, name), low=1)
        if self.steps is not None:
            check_range("steps", self.steps, low=1)
        for lr in self.learning_rates:
            check_range("learning_rates", lr, above=0)
        check_range("dead_after_tokens", self.dead_after_tokens, low=self.batch_size)


@dataclass(frozen=True)
class Run:
    """One training: a library and a learning rate (None: the library's own settings)."""

    library: str
    lr: float | None

    @property
    def variant(self) -> str:
        """As the results name it."""
        return OWN if self.lr is None else TUNED


class StoredBatches:
    """The stored stream as the trainer reads it."""

    def __init__(self, stream: NDArray[np.uint16]) -> None:
        self.stream, self.position = stream, 0

    def __iter__(self) -> Iterator[Tensor]:
        while self.position < len(self.stream):
            self.position += 1
            yield floats(self.stream[self.position - 1])

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a place."""
        self.position = int(state["position"])


def planned(config: PeersConfig) -> list[Run]:
    """Every training, own settings first."""
    rates: list[float | None] = [None, *config.learning_rates]
    ours = base_lr(config.d_sae) * config.lr_multiplier
    return [
        Run(library, lr)
        for lr in rates
        for library in (OURS, *PEERS)
        # our own settings differ from a tuned run in nothing but the learning rate
        if not (library == OURS and lr is not None and np.isclose(lr, ours))
    ]


def compare(config: PeersConfig, data: Data) -> list[dict[str, Any]]:
    """Train what is not trained yet, measure it, add the rows; the row of every run."""
    torch.set_num_threads(config.threads)
    rows = []
    for run in planned(config):
        folder = _folder(config, data, run)
        if not (folder / "facts.json").exists():
            label = f"lr {run.lr:g}" if run.lr else OWN
            say(f"{run.library}, {label}: training")
            with atomic_path(folder) as temporary:
                temporary.mkdir()
                (_train_ours if run.library == OURS else _train_peer)(config, data, run, temporary)
            remove(folder / "run")
        rows.append(_row(config, data, run, folder))
        append_row(Path(config.results), rows[-1])
    return rows


def _folder(config: PeersConfig, data: Data, run: Run) -> Path:
    ours = [config.lr_multiplier, config.normaliser] if run.library == OURS else []
    settings = [data.name, config.d_sae, config.k, config.dead_after_tokens, config.seed, ours]
    label = f"{run.lr:g}" if run.lr else "own"
    name = f"{run.library}-{label}-{sha256_json(settings)[:12]}"
    return Path(config.work) / "runs" / name


def _train_ours(config: PeersConfig, data: Data, run: Run, folder: Path) -> None:
    stream = data.stream
    steps, batch_size, d_in = stream.shape
    torch.manual_seed(config.seed)
    sae = TopKSAE(TopKConfig(d_sae=config.d_sae, k=config.k), d_in)
    mean = torch.tensor(data.mean, dtype=torch.float64)
    sae.normaliser = Normaliser.fit(config.normaliser, mean=mean, mean_square=data.mean_square)
    trainer = Trainer(
        sae,
        StoredBatches(stream),
        TrainerConfig(
            batch_size=batch_size,
            lr=run.lr,
            lr_multiplier=config.lr_multiplier,
            dead_after_tokens=config.dead_after_tokens,
            evaluate_every=steps,
            checkpoint_every=steps,
        ),
        total_steps=steps,
        held_out=lambda: data.held_out_rows(4096),
        folder=folder / "run",
    )
    started = time.perf_counter()
    trainer.run()
    seconds = time.perf_counter() - started
    check = floats(data.held_out[:CHECK_ROWS])
    with torch.no_grad():
        output = sae(check)
    folded = {name: value.detach().numpy() for name, value in sae.fold().state_dict().items()}
    np.savez(
        folder / "weights.npz",
        W_enc=folded["W_enc_T"].T,
        b_enc=folded["b_enc"],
        W_dec=folded["W_dec"],
        b_dec=folded["b_dec"],
        check_features=output.codes.dense().numpy(),
        check_reconstruction=output.x_hat.numpy(),
    )
    facts = {
        "version": __version__,
        "torch": torch.__version__,
        "lr": trainer.lr,
        "normaliser": config.normaliser,
        "warmup_steps": round(trainer.config.warmup_fraction * steps),
        "decay_steps": round(trainer.config.decay_fraction * steps),
        "seconds": seconds,
    }
    write_json(folder / "facts.json", facts)


def _train_peer(config: PeersConfig, data: Data, run: Run, folder: Path) -> None:
    peer = PEERS[run.library]
    steps = len(data.stream)
    # SAELens recommends no warm-up of the learning rate; dictionary_learning's 1000 steps and our
    # own are scaled to the run's length
    warmup = 0 if run.library == "SAELens" and run.lr is None else round(0.05 * steps)
    settings = {
        "stream": str((data.folder / "stream.npy").resolve()),
        "held_out": str((data.folder / "held_out.npy").resolve()),
        "out": str(folder.resolve()),
        "steps": steps,
        "d_sae": config.d_sae,
        "k": config.k,
        "lr": run.lr,
        "warmup_steps": warmup,
        "decay_steps": round(0.2 * steps),
        "dead_after_tokens": config.dead_after_tokens,
        "seed": config.seed,
        "threads": config.threads,
        "check_rows": CHECK_ROWS,
    }
    write_json(folder / "settings.json", settings)
    python = python_of(peer, Path(config.work))
    log = Path(config.work) / f"{run.library}.log"
    # nothing of ours on its path, nothing looked up or reported outside
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "OMP_WAIT_POLICY": "passive",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
    }
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run(
            [str(python.absolute()), "-P", str(peer.script), str(folder / "settings.json")],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    if done.returncode:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise ArtefactError(f"training failed: {' '.join(last)}", where=f"{run.library}, {log}")


def _row(config: PeersConfig, data: Data, run: Run, folder: Path) -> dict[str, Any]:
    facts = read_json(folder / "facts.json")
    weights = folder / "weights.npz"
    check_against_library(weights, config.k, floats(data.held_out[:CHECK_ROWS]))
    measured = measure_reconstruction(NeutralTopK.load(weights, config.k), data.held_out_rows)
    steps, batch_size, d_in = data.stream.shape
    say(
        f"{run.library}, {run.variant}, lr {facts['lr']:g}: L0 {measured.l0:.2f}, "
        f"FVU {measured.fvu:.4f} ± {measured.fvu_interval:.4f}, dead {measured.dead_fraction:.2%}"
    )
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "library": run.library,
        "version": facts["version"],
        "variant": run.variant,
        "data": data.name,
        "d_in": d_in,
        "d_sae": config.d_sae,
        "k": config.k,
        "tokens": steps * batch_size,
        "batch": batch_size,
        "lr": f"{facts['lr']:g}",
        "normaliser": facts["normaliser"],
        "warmup_steps": facts["warmup_steps"],
        "decay_steps": facts["decay_steps"],
        "dead_after_tokens": config.dead_after_tokens,
        "seed": config.seed,
        "held_out_rows": measured.rows,
        "l0": f"{measured.l0:.3f}",
        "fvu": f"{measured.fvu:.5f}",
        "fvu_interval": f"{measured.fvu_interval:.5f}",
        "cosine": f"{measured.cosine:.5f}",
        "dead_fraction": f"{measured.dead_fraction:.5f}",
        "training_seconds_not_a_speed_benchmark": round(facts["seconds"]),
        "torch": facts["torch"],
        "cpu": _cpu(),
        "commit": git_commit() or "",
    }


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; the exit code."""
    try:
        config = parse(
            PeersConfig,
            sys.argv[1:] if arguments is None else arguments,
            program="python -m benchmarks.peers.topk",
            description="Our TopK, SAELens' and dictionary_learning's on the same activations.",
            positional="harvest",
        )
        data = export(
            Path(config.work),
            harvest=config.harvest,
            site=config.site,
            batch_size=config.batch_size,
            seed=config.seed,
            steps=config.steps,
        )
        for line in report(compare(config, data), (OURS, *PEERS)):
            say(line)
    except SaescopeError as error:
        return fail(error)
    except KeyboardInterrupt:
        say("interrupted; run the same command again to go on")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
