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
    seconds: dict[object, float] = {}
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
            seconds[like] = _seconds_a_step(run)
        took = run.total_steps * seconds[like]
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
            f"{1000 * seconds[like]:.0f} ms a step, {_duration(took)}"
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


def _seconds_a_step(run: Run) -> float:
    """Median wall time of a step, on batches of the run's own, in a folder that is thrown away."""
    again = Run(run.config, run.harvest)
    with tempfile.TemporaryDirectory() as folder:
        trainer = again.make_trainer(Path(folder))
        batches = iter(again.stream)
        times = []
        for _ in range(_WARM + _MEASURED):
            raw = next(batches)
            start = time.perf_counter()
            trainer.train_step(raw)
            times.append(time.perf_counter() - start)
    return sorted(times[_WARM:])[_MEASURED // 2]


def _stream_bytes(run: Run) -> int:
    read = [*run.sites, *([run.config.target_site] if run.config.target_site else [])]
    return sum(8 * _CHUNK_ROWS * run.harvest.d_in(site) * 2 for site in read)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
