"""`saescope doctor`: what is wrong with the files of anything that saescope wrote.

Harvests are looked at, and repaired, by `activations.recompute.doctor`; all else is made again
from them.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from activations.recompute import doctor as harvests
from sae.commands.examination import Examination, examine, kind_of_artefact
from sae.core.serialisation import CONFIG_FILE
from saescope.artefact import MANIFEST, read_json
from saescope.errors import ArtefactError, InputError
from saescope.leftovers import leftovers, remove_leftover
from saescope.paths import AnyPath, as_path, exists
from saescope.progress import say
from store.parquet.layout import KIND as PARQUET_STORE
from store.parquet.layout import is_parquet_store

_DEEPEST = 4
"""folders below the one given that are looked into for artefacts"""
_OF_HARVESTS = ("repair", "allow_rounding", "set_aside", "upgrade", "device")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(harvests.DoctorConfig):
    """Check every file of a harvest, run, SAE, store, or of all that are in a folder."""

    path: str
    """Folder or file of a harvest (or its URL), a run, a sweep, an SAE, a checkpoint, a lens, a
    feature store (also its URL) or its annotations; or a folder with several of these."""

    remove_leftovers: bool = False
    """Remove what killed commands left behind, in the folder and beside it."""


def doctor(config: DoctorConfig) -> int:
    """Check what is at a path, print what is wrong; 0 if all is well, else 1.

    Raises ArtefactError if there is nothing that saescope wrote, InputError if a repair is asked
    for of what is no harvest.

    >>> doctor(DoctorConfig(path="runs/smollm2-135m-topk"))  # doctest: +SKIP
    runs/smollm2-135m-topk: run, 6 files checked: all well
    0
    """
    path = as_path(config.path)
    if not isinstance(path, Path):
        return _remote(config, path)
    if not path.exists():
        raise ArtefactError("nothing is here", where=config.path)
    kind = kind_of_artefact(path)
    if kind is None or kind == "sweep":
        return _several(config, path)
    code = _one(config, path, kind)
    _leftovers(config, path)
    return code


def _one(config: DoctorConfig, path: AnyPath, kind: str) -> int:
    if kind == "harvest":
        return _harvest(config, path)
    asked = [name for name in _OF_HARVESTS if getattr(config, name)]
    if asked:
        raise InputError(
            f"only a harvest can be: this is a {kind}, which is made again from one",
            where=str(path),
            given=f"--{asked[0].replace('_', '-')}",
        )
    return _say(path, kind, examine(path, kind))


def _remote(config: DoctorConfig, path: AnyPath) -> int:
    if is_parquet_store(path):
        return _one(config, path, PARQUET_STORE)
    if _is_run(path) or exists(path / CONFIG_FILE):
        raise InputError(
            "is a run or an SAE, which is checked in a folder of this machine; copy it there",
            where=config.path,
        )
    return _harvest(config, path)


def _is_run(path: AnyPath) -> bool:
    found = read_json(path / MANIFEST) if exists(path / MANIFEST) else None
    return isinstance(found, dict) and found.get("kind") == "run"


def _harvest(config: DoctorConfig, path: AnyPath) -> int:
    names = [field.name for field in dataclasses.fields(harvests.DoctorConfig)]
    own = {name: getattr(config, name) for name in names}
    return harvests.doctor(harvests.DoctorConfig(**{**own, "path": str(path)}))


def _say(path: AnyPath, kind: str, found: Examination) -> int:
    result = f"{len(found.faults)} wrong" if found.faults else "all well"
    say(f"{path}: {kind}, {found.checked:,} files checked: {result}")
    for name, what_kind, what in found.faults:
        say(f"  {what_kind:<10}  {name}: {what}")
    for note in found.notes:
        say(f"  note        {note}")
    return 1 if found.faults else 0


def _several(config: DoctorConfig, folder: Path) -> int:
    """Check each artefact in a folder, and those in a sweep."""
    found = list(_artefacts(folder, _DEEPEST)) if folder.is_dir() else []
    if kind_of_artefact(folder) == "sweep":
        found.insert(0, (folder, "sweep"))
    if not found and not list(leftovers(folder)):
        raise ArtefactError("nothing that saescope wrote is here", where=config.path)
    codes = []
    for path, kind in found:
        try:
            codes.append(_one(config, path, kind))
        except ArtefactError as error:
            say(str(error))
            codes.append(1)
    wrong = sum(codes)
    say(f"{folder}: {len(found)} checked, {wrong} with something wrong" if found else str(folder))
    _leftovers(config, folder)
    return 1 if wrong else 0


def _artefacts(folder: Path, depth: int) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_symlink():
            continue
        kind = kind_of_artefact(path)
        if kind is not None:
            yield path, kind
        if path.is_dir() and kind in (None, "sweep") and depth > 1:
            yield from _artefacts(path, depth - 1)


def _leftovers(config: DoctorConfig, folder: Path) -> None:
    """Name what killed commands left; remove it if asked to."""
    total = 0
    for path in list(leftovers(folder)):
        size = sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
        said = f"{path}, {size / 1e6:,.1f} MB, of a command that was killed"
        if not config.remove_leftovers:
            total += 1
            say(f"  left over   {said}")
        elif remove_leftover(path):
            say(f"  removed     {said}")
    if total:
        say("saescope doctor --remove-leftovers removes what is left over; it does no harm")
