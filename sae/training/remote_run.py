"""Runs in an object store, which a run's trainer works on in a folder of this machine.

Objects are written whole or not at all, one by one, and cannot be renamed. So that a kill at any
instant leaves a run that goes on:

- `metrics.jsonl` is put anew before each checkpoint, so that no checkpoint has lines that it lacks;
- a checkpoint is put beside the last one, its state.json as the end of it, and then copied into
  its place; if that was cut short, whoever goes on with the run copies it once more;
- of an SAE config.json is put last, and without that it is not there.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sae.core.serialisation import CONFIG_FILE
from sae.formats.load import SAE_FOLDER
from sae.training import process_group
from sae.training.checkpoint import STATE
from sae.training.snapshots import find_snapshots
from sae.training.trainer import CHECKPOINT, METRICS
from sae.training.trainer_config import TrainerConfig
from saescope.artefact import MANIFEST
from saescope.cache import cache_dir
from saescope.errors import InputError
from saescope.locks import locked
from saescope.paths import AnyPath, below, copy, download, exists, objects, remove, upload
from saescope.system import system_errors

if TYPE_CHECKING:
    from upath import UPath

_NEXT = CHECKPOINT.parent / ".next"
"""a checkpoint that is to take the place of the last one"""


class RemoteRun:
    """A run in an object store, and the folder here that whoever holds its lock works on it in."""

    def __init__(self, url: "UPath") -> None:
        digest = hashlib.sha256(str(url).encode()).hexdigest()[:32]
        self.url, self.folder = url, cache_dir() / "runs" / digest / url.name
        self._snapshots: set[int] = set()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training it within the block; at its end the folder goes.

        Raises ArtefactError if one does.
        """
        with locked(self.url, "training"):
            try:
                yield
            finally:
                self._discard()

    def finished(self) -> bool:
        """Whether its SAE is there."""
        return exists(self.url / SAE_FOLDER / CONFIG_FILE)

    def fetch(self) -> None:
        """Bring the folder here to what a killed process left in the store; none if nothing.

        Raises ArtefactError if the store cannot be reached or the disk is full.
        """
        self._discard()
        self._commit()
        last = list(CHECKPOINT.parts)
        with system_errors(self.folder):
            self.folder.mkdir(parents=True)
            for path in objects(self.url):
                parts = below(path, self.url)
                if parts in ((MANIFEST,), (METRICS,)) or list(parts[:-1]) == last:
                    download(path, self.folder.joinpath(*parts))

    def _discard(self) -> None:
        with system_errors(self.folder):
            remove(self.folder.parent)

    def put_checkpoint(self) -> None:
        """Put what was measured, the new snapshots, and the checkpoint in the last one's place."""
        upload(self.folder / METRICS, self.url / METRICS)
        for snapshot in find_snapshots(self.folder):
            if snapshot.tokens not in self._snapshots:
                self._put(below(snapshot.path, self.folder), last=CONFIG_FILE)
                self._snapshots.add(snapshot.tokens)
        self._put(CHECKPOINT.parts, to=_NEXT.parts, last=STATE)
        self._commit()

    def put_sae(self) -> None:
        """Put the trained SAE, with which the run is finished."""
        self._put((SAE_FOLDER,), last=CONFIG_FILE)

    def _put(self, parts: tuple[str, ...], *, last: str, to: tuple[str, ...] | None = None) -> None:
        """Put the files of a folder, that of a name at the end."""
        source, target = self.folder.joinpath(*parts), self.url.joinpath(*(to or parts))
        for file in sorted(source.iterdir(), key=lambda file: (file.name == last, file.name)):
            upload(file, target / file.name)

    def _commit(self) -> None:
        """Have the next checkpoint take the last one's place, if it is whole; else remove it."""
        here, last = self.url.joinpath(*_NEXT.parts), self.url.joinpath(*CHECKPOINT.parts)
        files = objects(here)
        ending = [path for path in files if path.name == STATE]
        if ending:
            for path in files:
                copy(path, last / path.name)
            names = {path.name for path in files}
            for path in objects(last):
                if path.name not in names:
                    remove(path)
        for path in [*ending, *(path for path in files if path not in ending)]:
            remove(path)  # without its state.json it is not whole


def remote_run(out: AnyPath, harvest: AnyPath, config: TrainerConfig) -> RemoteRun | None:
    """The run, if it is to be in an object store; None for a folder of this machine.

    Raises InputError for several processes that train it together, for telemetry that writes files,
    and for a run in the harvest that it reads, or the reverse.
    """
    if isinstance(out, Path):
        return None
    process_group.refuse_together("training one run into an object store", where="out")
    if config.telemetry != "none":
        raise InputError(
            "writes files into the run's folder, which an object store is not",
            where="trainer.telemetry",
            given=config.telemetry,
            allowed="none, or a folder of this machine as out",
        )
    _check_apart(out, harvest)
    return RemoteRun(out)


def _check_apart(url: "UPath", harvest: AnyPath) -> None:
    if isinstance(harvest, Path) or harvest.protocol != url.protocol:
        return
    one, other = (f"{each.path.rstrip('/')}/" for each in (url, harvest))
    if one.startswith(other) or other.startswith(one):
        raise InputError(
            "what is written may not lie in what is read, nor the reverse; choose another name",
            where=str(url),
            given=str(harvest),
        )
