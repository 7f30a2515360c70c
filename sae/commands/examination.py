"""Every file of what saescope writes besides harvests: whether it is what was written."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from activations.models.packaged import SEALS, check_packaged
from activations.storage.layout import GROUP
from activations.storage.ledger import LEDGER
from sae.analysis import lens
from sae.analysis.attention.results_file import ATTENTION_FILE, read_attention
from sae.commands.diff_models import MODEL_DIFF, read_model_diff
from sae.commands.evaluation_files import (
    UNFINISHED_FILE,
    check_evaluation_file,
    evaluation_files,
)
from sae.commands.sweep import MEMBERS, read_members
from sae.core.serialisation import CONFIG_FILE, WEIGHTS_FILE, described_sae
from sae.evaluation.floors_file import RELIABILITY_FILE, read_reliability
from sae.evaluation.unfinished_file import read_unfinished, unfinished_file
from sae.formats import recognise
from sae.formats.load import SAE_FOLDER, load
from sae.training import checkpoint
from sae.training.run_folder import read_run
from sae.training.snapshots import find_snapshots
from sae.training.telemetry import read_metrics
from sae.training.trainer import CHECKPOINT, METRICS
from saescope.artefact import MANIFEST, DamagedError, read_json, read_manifest
from saescope.errors import ArtefactError, SaescopeError
from saescope.leftovers import is_leftover
from saescope.paths import AnyPath, below, file_sizes
from saescope.seals import FILES, SEAL, check_file, seal_of_bytes
from store.annotation_base import SUFFIX
from store.annotations import annotations_file
from store.database import STORE_FILE
from store.examination import examine_annotations, examine_store
from store.parquet.layout import KIND as PARQUET_STORE

UNFINISHED_RELIABILITY = unfinished_file(Path(RELIABILITY_FILE)).name
_BESIDE_WEIGHTS = ("README.md",)
_SINKS = ("tensorboard", "wandb")


class Examination:
    """What is found wrong; paths are relative to the artefact."""

    def __init__(self, path: AnyPath) -> None:
        self.path = path
        self.checked = 0
        self.faults: list[tuple[str, str, str]] = []
        """file, kind (missing, truncated, damaged or foreign), and what is wrong, in words"""
        self.notes: list[str] = []

    @contextmanager
    def of(self, file: Path) -> Iterator[None]:
        """Within the block a file is read; an error that says it is damaged becomes a fault."""
        self.checked += 1
        try:
            yield
        except DamagedError as error:
            where = Path(error.where)
            self.fault(
                where if where.is_relative_to(str(self.path)) else file, error.kind, error.what
            )
        except SaescopeError as error:
            self.fault(file, "damaged", str(error).removeprefix(f"{file}: "))
        except OSError as error:
            self.fault(file, "unreadable", error.strerror or str(error))

    def fault(self, file: AnyPath, kind: str, what: str) -> None:
        """Note that a file is not as it should be."""
        name = "/".join(below(file, self.path)) if file != self.path else file.name
        if (name, kind, what) not in self.faults:
            self.faults.append((name, kind, what))

    def strangers(self, folder: Path, known: Iterable[str]) -> None:
        """Note everything in a folder that is not known there."""
        names = set(known)
        for path in sorted(folder.iterdir()):
            lock = path.name.startswith(".") and path.name.endswith(".lock")
            if path.name not in names and not lock and not is_leftover(path):
                self.fault(path, "foreign", "does not belong here")


def kind_of_artefact(path: Path) -> str | None:
    """What saescope wrote at a path, by the names of files there; None if it is nothing known."""
    if path.is_file():
        if path.name.endswith(SUFFIX):
            return "annotations"
        return "store" if path.suffix == ".duckdb" else None
    names = {member.name for member in path.iterdir()} if path.is_dir() else set()
    if STORE_FILE in names:
        return "store"
    if SEALS in names:
        return "packaged model"
    if WEIGHTS_FILE in names:
        return "lens" if MANIFEST in names and CONFIG_FILE not in names else "SAE"
    if {checkpoint.STATE, checkpoint.TENSORS} & names:
        return "checkpoint"
    if MEMBERS in names:
        return "sweep"
    if {METRICS, CHECKPOINT.parts[0]} & names or {MANIFEST, SAE_FOLDER} <= names:
        return "run"
    if {GROUP, LEDGER} & names:
        return "harvest"
    return _by_manifest(path / MANIFEST) if MANIFEST in names else _foreign(path)


def _by_manifest(path: Path) -> str | None:
    try:
        kind = read_json(path)["kind"]
    except (ArtefactError, TypeError, KeyError):
        return "harvest"
    return str(kind) if kind in (*_KINDS, "harvest") else None


def _foreign(path: Path) -> str | None:
    try:
        recognise(path)
    except SaescopeError:
        return None
    return "SAE"


def examine(path: AnyPath, kind: str) -> Examination:
    """Read and check every file of an artefact of this kind (no harvest), and look for others."""
    found = Examination(path)
    _KINDS[kind](found, path)
    return found


def _sae(found: Examination, folder: Path) -> None:
    if (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file():
        before = len(found.faults)
        with found.of(folder / CONFIG_FILE):
            described = described_sae(folder)
            if SEAL not in described:
                found.notes.append("of an older version, which recorded no checksums")
        found.checked += 1
        if len(found.faults) == before:
            with found.of(folder / WEIGHTS_FILE):
                load(folder)
        own = (CONFIG_FILE, WEIGHTS_FILE, *_BESIDE_WEIGHTS, ATTENTION_FILE)
        _attention(found, folder)
        found.strangers(folder, [*own, *evaluation_files(folder)])
    elif (folder / CONFIG_FILE).is_file() or (folder / WEIGHTS_FILE).is_file():
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                found.fault(folder / name, "missing", "the file is missing")
    else:
        with found.of(folder):
            sae = load(folder)
            found.notes.append(f"of {sae.metadata.get('format')}, which records no checksums")
    _evaluation(found, folder)


def _evaluation(found: Examination, folder: Path) -> None:
    for file in evaluation_files(folder):
        with found.of(folder / file):
            check_evaluation_file(folder / file)
        if file == UNFINISHED_FILE:
            found.notes.append("an evaluation was interrupted, and goes on with saescope eval")


def _checkpoint(found: Examination, folder: Path) -> dict[str, Any] | None:
    state: dict[str, Any] | None = None
    with found.of(folder / checkpoint.STATE):
        state = checkpoint.state_of(folder)
    if state is None:
        return None
    files = list(state.get(FILES, {checkpoint.TENSORS: None}))
    for name in files:
        with found.of(folder / name):
            checkpoint.check(folder, state, [name])
    if FILES not in state:
        found.notes.append("a checkpoint of an older version, which recorded no checksums")
        with found.of(folder / checkpoint.TENSORS):
            checkpoint.load(folder)
    found.strangers(folder, [checkpoint.STATE, *files])
    return state


def _run(found: Examination, folder: Path) -> None:
    with found.of(folder / MANIFEST):
        read_run(folder)
    state, last = None, folder / CHECKPOINT
    if last.exists():
        state = _checkpoint(found, last)
    if last.parent.exists():
        snapshots = [last.parent / each.path.name for each in find_snapshots(folder)]
        for path in snapshots:
            _sae(found, path)
        found.strangers(last.parent, [last.name, *(path.name for path in snapshots)])
    _metrics(found, folder / METRICS, None if state is None else state.get("metrics"))
    if (folder / SAE_FOLDER).exists():
        _sae(found, folder / SAE_FOLDER)
    else:
        found.notes.append("is not finished")
    _evaluation(found, folder)
    if (folder / MODEL_DIFF).exists():
        with found.of(folder / MODEL_DIFF):
            read_model_diff(folder)
    _attention(found, folder)
    beside = (MODEL_DIFF, ATTENTION_FILE)
    known = [MANIFEST, METRICS, CHECKPOINT.parts[0], SAE_FOLDER, *beside, *_SINKS]
    found.strangers(folder, [*known, *evaluation_files(folder)])


def _attention(found: Examination, folder: Path) -> None:
    if (folder / ATTENTION_FILE).exists():
        with found.of(folder / ATTENTION_FILE):
            read_attention(folder / ATTENTION_FILE)


def _metrics(found: Examination, path: Path, sealed: dict[str, Any] | None) -> None:
    if not path.exists() and sealed is None:
        return
    with found.of(path):
        if not path.exists():
            check_file(path, sealed)
        read_metrics(path)
        if sealed is not None and seal_of_bytes(path.read_bytes()[: sealed["bytes"]]) != sealed:
            what = "lines that were there when the checkpoint was taken are missing"
            raise DamagedError(what, where=str(path), kind="truncated")


def _packaged(found: Examination, folder: Path) -> None:
    with found.of(folder / SEALS):
        found.strangers(folder, [SEALS, *check_packaged(folder)])


def _lens(found: Examination, folder: Path) -> None:
    with found.of(folder / MANIFEST):
        read_manifest(folder, kind=lens.KIND, schema=lens.SCHEMA, sealed_since=lens.SEALED_SINCE)
    if not found.faults:
        with found.of(folder / lens.WEIGHTS):
            lens.TunedLens.load(folder)
    found.strangers(folder, [MANIFEST, lens.WEIGHTS])


def _sweep(found: Examination, folder: Path) -> None:
    with found.of(folder / MEMBERS):
        for name in read_members(folder):
            if not (folder / name).exists():
                found.notes.append(f"{name} is not trained yet")
    if (folder / RELIABILITY_FILE).exists():
        with found.of(folder / RELIABILITY_FILE):
            read_reliability(folder / RELIABILITY_FILE)
    unfinished = folder / UNFINISHED_RELIABILITY
    if unfinished.exists():
        with found.of(unfinished):
            read_unfinished(unfinished)
        found.notes.append("--reliability was interrupted, and goes on with saescope eval")


def _store(found: Examination, path: Path) -> None:
    file = path / STORE_FILE if path.is_dir() else path
    found.checked += 1
    for what in examine_store(file):
        found.fault(file, "damaged", what)
    _annotations(found, file)
    if path.is_dir():
        notes = annotations_file(file).name
        journals = [f"{notes}{end}" for end in ("-journal", "-wal", "-shm")]
        found.strangers(path, [STORE_FILE, notes, *journals])


def _parquet_store(found: Examination, path: AnyPath) -> None:
    found.checked += len(file_sizes(path))
    for what in examine_store(path):
        found.fault(path, "damaged", what)
    _annotations(found, path)


def _annotations(found: Examination, path: AnyPath) -> None:
    store = path
    if path.suffix == ".sqlite":
        name = path.name.removesuffix(SUFFIX)
        # of a store in Parquet, a folder NAME, or of one in a file NAME.duckdb
        store = (
            path.with_name(name)
            if (path.parent / name).is_dir()
            else path.with_name(f"{name}.duckdb")
        )
    notes = annotations_file(store)
    if notes.exists():
        found.checked += 1
        for what in examine_annotations(store):
            found.fault(notes, "damaged", what)


_KINDS: dict[str, Callable[[Examination, Any], object]] = {
    "SAE": _sae,
    "checkpoint": _checkpoint,
    "run": _run,
    "lens": _lens,
    "packaged model": _packaged,
    "sweep": _sweep,
    "store": _store,
    PARQUET_STORE: _parquet_store,
    "annotations": _annotations,
}
