"""Snapshots: SAEs that a run keeps along the way, each in a folder that `sae.load` reads.

    runs/x/checkpoints/tokens-000000204800/    config.json, weights.safetensors

A snapshot is the SAE that would have been released had training ended there: weights averaged and
thresholds set. It has no optimiser's state; what a run goes on from is `checkpoints/last`.
"""

import re
from pathlib import Path
from typing import NamedTuple

from sae.core.base import SparseAutoencoder
from sae.core.serialisation import CONFIG_FILE
from sae.training import sharded_checkpoint
from sae.training.trainer_config import TrainerConfig
from saescope.errors import InputError
from saescope.paths import AnyPath, exists, subfolders
from saescope.progress import say

FOLDER = "checkpoints"
_NAME = re.compile(r"tokens-(\d{12,})")
_EARLIEST = 1000
"""the first of logarithmically spaced snapshots is at a run's steps over this"""


class Snapshot(NamedTuple):
    """An SAE that a run kept along the way."""

    tokens: int
    """tokens that it had been trained on"""
    path: AnyPath


def find_snapshots(run: AnyPath) -> list[Snapshot]:
    """The snapshots in a run's folder, earliest first."""
    kept = run / FOLDER
    found = []
    for path in kept.glob("tokens-*") if isinstance(kept, Path) else subfolders(kept):
        match = _NAME.fullmatch(path.name)
        if match and exists(path / CONFIG_FILE):
            found.append(Snapshot(int(match[1]), path))
    return sorted(found, key=lambda each: each.tokens)


def log_spaced_steps(count: int, total_steps: int) -> list[int]:
    """So many steps at equal ratios, from a thousandth of a run towards its end, which is not one.

    Where there are fewer steps than that, neighbouring ones are taken. Raises InputError if the run
    has not as many steps.

    >>> log_spaced_steps(4, 10_000), log_spaced_steps(4, 10)
    ([10, 56, 316, 1778], [1, 2, 3, 6])
    """
    first = max(1, total_steps // _EARLIEST)
    if count > total_steps - first:
        raise InputError(
            "more snapshots than steps before the last",
            where="trainer.snapshots",
            given=count,
            allowed=f"up to {total_steps - first}",
        )
    steps: list[int] = []
    for n in range(count):
        spaced = round(first * (total_steps / first) ** (n / count))
        steps.append(max(spaced, steps[-1] + 1) if steps else first)
    return steps


class Snapshots:
    """When a run keeps its SAE, and where.

    Raises InputError for more snapshots than the run has steps or tokens, or for any where there is
    no folder to write them to.
    """

    def __init__(self, config: TrainerConfig, folder: Path | None, total_steps: int) -> None:
        self.folder = folder
        self.steps = frozenset(log_spaced_steps(config.snapshots, total_steps))
        self.tokens = config.snapshot_tokens
        if folder is None and (self.steps or self.tokens):
            name, given = "snapshots", config.snapshots or self.tokens
            raise InputError("needs a folder", where=f"trainer.{name}", given=given)
        most = total_steps * config.batch_size
        if self.tokens and self.tokens[-1] > most:
            raise InputError(
                "more tokens than the run has",
                where="trainer.snapshot_tokens",
                given=self.tokens[-1],
                allowed=f"up to {most}",
            )

    def due(self, step: int, before: int, tokens: int) -> bool:
        """Whether to keep the SAE after a step, which brought the tokens from `before` to these."""
        return step in self.steps or any(before < each <= tokens for each in self.tokens)

    def say_missed(self, tokens: int) -> None:
        """At the end, after so many tokens: print which snapshots were not to be had."""
        missed = [each for each in self.tokens if each > tokens]
        if missed:
            say(f"trainer.snapshot_tokens {missed}: the run had {tokens:,} tokens")

    def save(self, sae: SparseAutoencoder, *, step: int, tokens: int) -> None:
        """Write an SAE as it is to be released; one that a killed process wrote is replaced.

        Raises ArtefactError if the disk is full.
        """
        if self.folder is None:
            return
        sae.metadata |= {"tokens_trained": tokens, "step": step}
        path = self.folder / FOLDER / f"tokens-{tokens:012d}"
        sharded_checkpoint.release(sae, path, replace=True)
