"""The folder of a run: its manifest, and whether a configuration is that of the run in it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae import distributed
from sae.architectures import architecture
from sae.core.config import without_added
from sae.training.trainer import METRICS
from saescope.artefact import MANIFEST, check_seal, read_manifest, write_manifest
from saescope.errors import InputError
from saescope.leftovers import is_leftover
from saescope.paths import AnyPath, exists, occupied

_SCHEMA = 2
_SEALED_SINCE = 2
_MAY_DIFFER = ("harvest", "out", "plan", "lens")
"""settings that may differ between a run and its continuation; what is in the harvest and in the
lens counts by its hash"""
_TRAINER_MAY_DIFFER = ("kernels", "deterministic")
"""the same of the trainer's; what was used is in the checkpoints"""
_NEW = {
    "snapshots": (0, None),
    "snapshot_tokens": ((), [], None),
    "target_l0_start": (None,),
    "target_l0_fraction": (0.7,),
}
"""the trainer's settings that older runs have not, which did what these values say"""
_SINKS = ("wandb", "tensorboard")
"""folders that measurements may go to before the manifest is written"""


def read_run(folder: AnyPath) -> dict[str, Any]:
    """A run's manifest; ArtefactError if it is missing, damaged or newer."""
    found = read_manifest(folder, kind="run", schema=_SCHEMA)
    # older versions sealed no manifest of a run on rows in memory, whatever its schema
    sealed = found["schema"] >= _SEALED_SINCE and "rows" not in found["config"]
    check_seal(found, must=sealed, where=str(folder / MANIFEST))
    return found


def read_if_there(folder: AnyPath) -> dict[str, Any] | None:
    """The manifest of the run in a folder; None if there is none yet.

    Raises InputError if the folder holds anything but what an interrupted start left of a run,
    ArtefactError if the manifest is damaged or newer.
    """
    if exists(folder / MANIFEST):
        return read_run(folder)
    if not isinstance(folder, Path):
        if occupied(folder):
            raise InputError("holds no run; choose another name", where=str(folder))
    elif folder.is_dir():
        found = [path for path in folder.iterdir() if not is_leftover(path)]
        early = {METRICS, *_SINKS}
        if not all(p.name in early and (p.is_dir() or not p.stat().st_size) for p in found):
            raise InputError(
                "exists and holds no run; choose another folder, or one in it", where=str(folder)
            )
    elif os.path.lexists(folder):
        raise InputError("is no folder; choose another name", where=str(folder))
    return None


def write(
    folder: AnyPath,
    settings: Mapping[str, Any],
    *,
    parent: str,
    tag: str,
    site: str | None,
    numerics: Mapping[str, Any],
    learning_rate: Mapping[str, Any],
) -> None:
    """Write the manifest of a run, unless it is there.

    Args:
        settings: the resolved configuration.
        parent: hash of what it is trained on.
        tag: hash of what makes it this run and no other.
        site: the first that it reads, where it reads a harvest.
        numerics: the kernels and precision that it began with.
        learning_rate: its peak, and what that follows from.
    """
    if exists(folder / MANIFEST):
        return
    write_manifest(
        folder,
        kind="run",
        schema=_SCHEMA,
        config=dict(settings),
        parent=parent,
        sealed=True,
        tag=tag,
        site=site,
        processes=distributed.size(),
        numerics=numerics,
        learning_rate=learning_rate,
    )


def identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in which two runs must agree to be the same run."""
    kept = {**settings, **dict.fromkeys(_MAY_DIFFER)}
    kept["trainer"] = {
        key: value
        for key, value in without_new(settings["trainer"]).items()
        if key not in _TRAINER_MAY_DIFFER
    }
    if (kept.get("sae") or {}).get("kind"):
        kept["sae"] = without_added(architecture(kept["sae"]["kind"]).Config, kept["sae"])
    for name in ("ranks", "device"):  # they change nothing; older runs have none
        kept.pop(name, None)
    if not (kept.get("finish") or {}).get("objective"):  # older runs have none
        kept.pop("finish", None)
    for name in ("order", "samples", "target_sites"):  # nor these
        if not kept.get(name):
            kept.pop(name, None)
    return kept


def without_new(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer's settings without those that older runs have not, where they change nothing."""
    return {k: v for k, v in trainer.items() if not (k in _NEW and v in _NEW[k])}


def another_run(
    folder: AnyPath, before: Mapping[str, Any], settings: Mapping[str, Any]
) -> InputError:
    """The error that a folder holds a run of other settings; it names those that differ."""
    old = identity(before)
    differing = [name for name, value in identity(settings).items() if old.get(name) != value]
    return InputError(
        f"holds another run (differs in: {', '.join(differing) or 'the harvest'}); choose "
        "another out, or remove it",
        where=str(folder),
    )
