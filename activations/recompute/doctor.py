"""`saescope doctor` on a harvest: check its files and repair them."""

from contextlib import nullcontext
from dataclasses import dataclass

from activations.storage.ledger import LEDGER, LEDGER_SINCE
from activations.storage.reader import KIND, SCHEMA, ActivationStore
from activations.storage.verify import Report, examine, n_files
from activations.storage.writer import HarvestWriter
from saescope.artefact import MANIFEST, DamagedError, read_manifest, write_bytes
from saescope.config import Config
from saescope.errors import ArtefactError, InputError
from saescope.locks import locked
from saescope.paths import AnyPath, as_path, exists, move, occupied
from saescope.progress import Progress, say
from saescope.system import system_errors


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Config):
    """Check every file of a harvest, and repair what is damaged."""

    path: str
    """Folder of the harvest, or its URL in an object store."""

    repair: bool = False
    """Compute damaged chunks again, from the same model and text, and put them back."""

    allow_rounding: bool = False
    """Put chunks back though this machine computes them with other rounding than the harvest's."""

    set_aside: bool = False
    """Move files that do not belong there, and leftovers, to a folder beside the harvest."""

    upgrade: bool = False
    """Bring a harvest of an older schema to the present one, as its chunks are now."""

    device: str | None = None
    """Where to compute: cpu, cuda or cuda:N; without it, where the harvest was."""

    trust_remote_code: bool = False
    """For a repair: run the code that comes with the harvest's model, if it needs it."""

    def __post_init__(self) -> None:
        if not self.path:
            raise InputError("empty", where="path", given=self.path, allowed="a folder")


def doctor(config: DoctorConfig) -> int:
    """Check a harvest, print what is wrong, and repair it if asked to; 0 if all is well, else 1.

    Raises ArtefactError if there is no harvest, a newer saescope wrote it, or (for a repair)
    another process writes to it.

    >>> doctor(DoctorConfig(path="data/smollm2-135m-wikipedia"))  # doctest: +SKIP
    data/smollm2-135m-wikipedia: 132 files of 7 windows checked, all well
    0
    """
    folder = as_path(config.path)
    changes = config.repair or config.set_aside or config.upgrade
    if not exists(folder / MANIFEST):
        raise ArtefactError(f"no harvest here ({MANIFEST} is missing)", where=config.path)
    with locked(folder, "doctor") if changes else nullcontext():
        try:
            store = ActivationStore.read(folder)
        except DamagedError as error:
            say(str(error))
            if not config.repair:
                return 1
            store = _with_rebuilt_ledger(folder, error)
        report = _examined(store)
        if report.faults and config.repair:
            store, report = _repaired(config, store, report)
        if config.set_aside:
            report = _set_aside(store, report)
        if config.upgrade and not report.faults:
            _upgraded(store)
        _advise(config, report)
        return 1 if report.faults else 0


def _examined(store: ActivationStore) -> Report:
    with Progress(f"checking {store.path}", n_files(store), "files") as progress:
        report = examine(store, progress.advance)
    state = "" if store.complete else ", which is not finished"
    found = f"{len(report.faults)} wrong" if report.faults else "all well"
    say(f"{report.checked:,} files of {len(store.windows):,} windows checked{state}: {found}")
    for fault in report.faults:
        say(f"  {fault.kind:<10}  {fault.path}: {fault.what}")
    for name in report.leftovers:
        say(f"  left over   {name}: of an interrupted run, which does no harm")
    for note in report.notes:
        say(f"  note        {note}")
    return report


def _repaired(
    config: DoctorConfig, store: ActivationStore, report: Report
) -> tuple[ActivationStore, Report]:
    """Repair what can be, say what was and what was not, and check again."""
    from activations.recompute.repair import Repair

    if not store.harvested:
        files = ", ".join(dict.fromkeys(store.manifest["brought"].values()))
        say(f"  not repaired: these activations were brought from {files}; bring them again")
        return store, report
    repair = Repair(store, report, config.allow_rounding, config.device, config.trust_remote_code)
    repair.run()
    for name in repair.done:
        say(f"  repaired    {name}")
    for name in repair.left:
        say(f"  not repaired: {name}")
    store = ActivationStore.read(store.path)
    return store, _examined(store) if repair.done else report


def _with_rebuilt_ledger(folder: AnyPath, error: DamagedError) -> ActivationStore:
    """The store once its ledger is as it was; the error again if it is not the ledger's."""
    from activations.recompute.repair import rebuild_ledger

    if as_path(error.where).name != LEDGER:
        raise ArtefactError(f"{error.what}; this cannot be repaired", where=error.where)
    manifest = read_manifest(folder, kind=KIND, schema=SCHEMA, sealed_since=LEDGER_SINCE)
    content = rebuild_ledger(folder, manifest)
    with system_errors(str(folder)):
        write_bytes(folder / LEDGER, content)
    say(f"  repaired    {LEDGER}")
    return ActivationStore.read(folder)


def _set_aside(store: ActivationStore, report: Report) -> Report:
    """Move strange files and leftovers to a folder beside the store, and check again."""
    strange = [fault.path for fault in report.faults if fault.kind == "foreign"]
    strange += [name for name in report.leftovers if occupied(store.path / name)]
    if not strange:
        return report
    number = 1
    while occupied(aside := store.path.with_name(f"{store.path.name}.set-aside-{number}")):
        number += 1
    for name in strange:
        move(store.path / name, aside / name)
        say(f"  moved       {name} to {aside}")
    return _examined(store)


def _upgraded(store: ActivationStore) -> None:
    if store.ledger.knows_checksums and store.manifest["schema"] == SCHEMA:
        say(f"schema {SCHEMA} already")
        return
    with system_errors(str(store.path)):
        HarvestWriter(store).upgrade()
    say(f"brought from schema {store.manifest['schema']} to {SCHEMA}")


def _advise(config: DoctorConfig, report: Report) -> None:
    kinds = {fault.kind for fault in report.faults}
    if kinds - {"foreign"} and not config.repair:
        say("saescope doctor --repair computes what is damaged again")
    if "foreign" in kinds and not config.set_aside:
        say("saescope doctor --set-aside moves what does not belong there to a folder beside it")
    if report.faults and config.upgrade:
        say("not brought to another schema, as something is wrong")
