"""What a training run will take, said before anything starts: steps, memory, disk, time."""

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from sae.base import kind_of
from sae.training.setup import Run

_WARM, _MEASURED = 2, 5
_CHUNK_ROWS = 16384
_STATE = {"adam": 2, "signum": 1, "schedule_free_adam": 3, "schedule_free_signum": 2}
"""tensors of the parameters' size that each optimiser keeps"""
_FLOAT = 4


def describe(runs: Sequence[Run], *, at_once: int = 1) -> list[str]:
    """Lines for people on what training these runs takes; a few steps of each are measured.

    Nothing is written. Runs of equal architecture and size are measured once.
    """
    seconds: dict[object, tuple[float, float]] = {}
    lines, total_time, total_disk, memory = [], 0.0, 0, []
    for run in runs:
        if run.finished():
            lines.append(f"{run.folder}: already trained")
            continue
        sae = run.make_sae()
        parameters = sum(p.numel() for p in sae.parameters())
        trainer = run.config.trainer
        like = (kind_of(run.sae_config), sae.d_in, sae.d_out, sae.d_sae, trainer.batch_size)
        if like not in seconds:
            seconds[like] = _measured(run)
        step, window = seconds[like]
        took = run.total_steps * step + _windows(run) * window
        held = parameters * _FLOAT * (2 + _STATE[trainer.optimiser])
        batch = trainer.batch_size // trainer.accumulate
        working = batch * (2 * sae.d_sae + 6 * sae.d_in) * _FLOAT
        disk = parameters * _FLOAT * (2 + _STATE[trainer.optimiser])
        memory.append(held + working)
        total_time, total_disk = total_time + took, total_disk + disk
        lines.append(
            f"{run.folder}: {like[0]}, {sae.d_in} -> {sae.d_sae} ({parameters / 1e6:.1f} M "
            f"parameters), {run.total_steps:,} steps of {trainer.batch_size:,} rows "
            f"({run.total_steps * run.stream.tokens_per_batch:,} tokens); "
            f"{1000 * step:.0f} ms a step, {_duration(took)}"
        )
        if _computes(run):
            lines.append(
                f"    of it {_duration(_windows(run) * window)} in the model, which computes "
                f"{_windows(run):,.0f} windows of the harvest, {_duration(window)} each"
            )
    buffers = max((_stream_bytes(run) for run in runs), default=0)
    needed = sum(sorted(memory)[-at_once:]) + buffers
    folder = runs[0].folder if runs else Path()
    free = shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists()))
    lines += [
        f"memory   about {needed / 1e9:.2f} GB beside the libraries' 0.6 GB",
        f"disk     {total_disk / 1e9:.2f} GB in checkpoints, SAEs; {free.free / 1e9:.0f} GB free",
        f"time     {_duration(total_time)}, from {_MEASURED} steps at the start; penalised "
        "architectures grow faster as they grow sparser",
    ]
    if total_disk > free.free:
        lines.append("this does not fit on the disk")
    return lines


def _computes(run: Run) -> bool:
    """Whether activations come straight from the model, window by window."""
    return run.harvest.storage == "none" and run.config.objective != "end_to_end"


def _windows(run: Run) -> float:
    """Windows that the run reads, over all passes."""
    count = sum(window.split == "train" for window in run.harvest.windows)
    return count * run.total_steps / run.stream.batches_per_epoch


def _measured(run: Run) -> tuple[float, float]:
    """Wall time of a step and of computing a window, where activations are not stored (else 0).

    The step's is the median, on batches of the run's own, in a folder that is thrown away.
    """
    again = Run(run.config, run.harvest)
    with tempfile.TemporaryDirectory() as folder:
        trainer = again.make_trainer(Path(folder))
        batches = iter(again.stream)
        times, reading = [], []
        for _ in range(_WARM + _MEASURED):
            start = time.perf_counter()
            raw = next(batches)
            reading.append(time.perf_counter() - start)
            start = time.perf_counter()
            trainer.train_step(raw)
            times.append(time.perf_counter() - start)
    # a window is computed, after the model is loaded, when its first batch is asked for
    window = max(reading) if _computes(run) else 0.0
    return sorted(times[_WARM:])[_MEASURED // 2], window


def _stream_bytes(run: Run) -> int:
    read = [*run.sites, *([run.config.target_site] if run.config.target_site else [])]
    group = sum(8 * _CHUNK_ROWS * run.harvest.d_in(site) * 2 for site in read)
    if not _computes(run):
        return group
    # two windows of all sites are kept, one of each split
    facts = run.harvest.manifest
    rows = int(facts["chunk_rows"]) * int(facts["window_chunks"])
    return group + 2 * rows * sum(run.harvest.d_in(site) * 2 for site in run.harvest.sites)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
