"""Estimates of what training runs take, before they start: steps, memory, disk, time."""

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from sae.core.base import SparseAutoencoder, kind_of
from sae.core.batch import RawBatch
from sae.training.finish import FinishStream
from sae.training.run import Run
from sae.training.trainer import Trainer
from saescope.artefact import sha256_json
from saescope.config import to_dict
from saescope.progress import duration
from saescope.system import free_bytes

_WARM, _MEASURED = 2, 5
_FINISH = 2
"""steps of a finish, which take seconds in a model of some size"""
_CHUNK_ROWS = 16384
_STATE = {"adam": 2, "signum": 1, "schedule_free_adam": 3, "schedule_free_signum": 2}
"""tensors of the parameters' size that each optimiser keeps"""
_FLOAT = 4
_SCRATCH = 2**24
"""floats of the encoder's product that are there at once"""
_ENTRY = 96
"""bytes an active feature of a row takes in a step: index, value, both by feature, gradients"""


@dataclasses.dataclass(frozen=True)
class _Step:
    """Time and memory of one step of a run."""

    seconds: float
    working: int
    """bytes beside the parameters, their gradients and the optimiser's state"""
    window: float
    """seconds to compute a window, where activations are not stored; else 0"""
    finish: float = 0.0
    """seconds of a step of the finish, where there is one; else 0"""


def describe(runs: Sequence[Run], *, at_once: int = 1) -> list[str]:
    """Lines of text on what training these runs takes; a few steps of each are timed.

    Nothing is written. Runs whose SAE and trainer are alike are measured once.
    """
    steps: dict[str, _Step] = {}
    lines, total_time, total_disk, memory = [], 0.0, 0, []
    for run in runs:
        if run.finished():
            lines.append(f"{run.folder}: already trained")
            continue
        sae, trainer = run.make_sae(), run.config.trainer
        parameters = sum(p.numel() for p in sae.parameters())
        like = sha256_json(
            [
                to_dict(run.sae_config),
                sae.d_in,
                sae.d_out,
                to_dict(trainer),
                to_dict(run.config.finish),
            ]
        )
        if like not in steps:
            steps[like] = _measured(run)
        step = steps[like]
        last = run.finish_steps
        took = (run.total_steps - last) * step.seconds + last * step.finish
        took += _windows(run) * step.window
        kept = parameters * _FLOAT * (2 + _STATE[trainer.optimiser])
        memory.append(kept + step.working)
        rate = run.trainer_config.peak_lr(run.sae_config, run.total_steps)
        snapshots = trainer.snapshots + len(trainer.snapshot_tokens)
        total_time += took
        total_disk += kept + parameters * _FLOAT * snapshots
        lines.append(
            f"{run.folder}: {kind_of(run.sae_config)}, {sae.d_in} -> {sae.d_sae} "
            f"({parameters / 1e6:.1f} M parameters), {run.total_steps:,} steps of "
            f"{trainer.batch_size:,} rows ({run.total_steps * run.stream.tokens_per_batch:,} "
            f"tokens); {1000 * step.seconds:.0f} ms a step, {duration(took)}; "
            f"learning rate {rate:.2g}, from {trainer.lr_from()}"
        )
        lines += _of_it(run, step)
    buffers = max((_stream_bytes(run) for run in runs), default=0)
    needed = sum(sorted(memory)[-at_once:]) + buffers
    folder = runs[0].work_folder if runs else Path()
    free = free_bytes(folder)
    lines += [
        f"memory   about {needed / 1e9:.2f} GB beside the libraries' 0.6 GB",
        f"disk     {total_disk / 1e9:.2f} GB in checkpoints, SAEs; {free / 1e9:.0f} GB free",
        f"time     {duration(total_time)}, from up to {_MEASURED} steps at the start; penalised "
        "architectures grow faster as they grow sparser",
    ]
    if total_disk > free:
        lines.append("this does not fit on the disk")
    return lines


def _of_it(run: Run, step: _Step) -> list[str]:
    """Lines on the time that goes into the model."""
    lines, last = [], run.finish_steps
    if last:
        lines.append(
            f"    of it {duration(last * step.finish)} in the finish: {last:,} steps through the "
            f"model, {1000 * step.finish:,.0f} ms each; learning rate {run.finish_rate.lr:.2g}"
        )
    if _computes(run):
        lines.append(
            f"    of it {duration(_windows(run) * step.window)} in the model, which computes "
            f"{_windows(run):,.0f} windows of the harvest, {duration(step.window)} each"
        )
    return lines


def _computes(run: Run) -> bool:
    """Whether activations come straight from the model, window by window."""
    return run.harvest.storage == "none" and run.config.objective != "end_to_end"


def _windows(run: Run) -> float:
    """Windows that the run reads, over all passes."""
    count = sum(window.split == "train" for window in run.harvest.windows)
    return count * (run.total_steps - run.finish_steps) / run.stream.batches_per_epoch


def _measured(run: Run) -> _Step:
    """Time a few steps on the run's own batches, in a temporary folder."""
    again = Run(run.config, run.harvest)
    last = run.finish_steps
    count = min(_WARM + _MEASURED, run.total_steps - last)
    with tempfile.TemporaryDirectory() as folder:
        trainer = again.make_trainer(Path(folder))
        waits, times, l0 = _timed(trainer, iter(again.stream), count)
        finish = 0.0
        if isinstance(again.stream, FinishStream):  # its batches are computed as they are asked for
            found = _timed(trainer, iter(again.stream.sequences), min(_FINISH, last))
            finish = min(wait + took for wait, took in zip(*found[:2], strict=True))
    # a window is computed, after the model is loaded, when its first batch is asked for
    window = max(waits) if _computes(run) else 0.0
    warmed = times[min(_WARM, count - 1) :]
    seconds = sorted(warmed)[len(warmed) // 2] if warmed else 0.0
    return _Step(seconds, _working(trainer.sae, trainer, l0), window, finish)


def _timed(
    trainer: Trainer, batches: Iterator[RawBatch], steps: int
) -> tuple[list[float], list[float], float]:
    """Seconds to get each of some batches, and to train on it; the largest L0."""
    waits, times, l0 = [], [], 0.0
    for _ in range(steps):
        start = time.perf_counter()
        raw = next(batches)
        waits.append(time.perf_counter() - start)
        start = time.perf_counter()
        l0 = max(l0, trainer.train_step(raw)["l0"])
        times.append(time.perf_counter() - start)
    return waits, times, l0


def _working(sae: SparseAutoencoder, trainer: Trainer, l0: float) -> int:
    """Bytes of a step's intermediate values: of rows, of codes, and of a block of the product."""
    rows = trainer.config.batch_size // trainer.config.accumulate
    dense = trainer.numerics.kernels == "reference"
    product = 3 * rows * sae.d_sae if dense else min(rows * sae.d_sae, _SCRATCH)
    return int(_FLOAT * (product + 6 * rows * (sae.d_in + sae.d_out)) + _ENTRY * rows * l0)


def _stream_bytes(run: Run) -> int:
    read = [*run.sites, *run.targets]
    group = sum(8 * _CHUNK_ROWS * run.harvest.d_in(site) * 2 for site in read)
    if not _computes(run):
        return group
    # two windows of all sites are kept, one of each split
    facts = run.harvest.manifest
    rows = int(facts["chunk_rows"]) * int(facts["window_chunks"])
    return group + 2 * rows * sum(run.harvest.d_in(site) * 2 for site in run.harvest.sites)
