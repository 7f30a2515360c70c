"""Check every file of a store, and name what is wrong."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from activations.storage.chunk_files import chunk_path
from activations.storage.files import (
    descriptions,
    is_partial,
    is_uncommitted,
    n_sequence_chunks,
    strangers,
)
from activations.storage.layout import (
    DOCUMENTS,
    GROUP,
    METADATA,
    PENDING,
    SEQUENCE_ARRAYS,
    array_names,
    documents_part,
    row_arrays,
)
from activations.storage.ledger import LEDGER, LEDGER_SINCE
from activations.storage.reader import ActivationStore
from saescope.artefact import DamagedError, read_json
from saescope.errors import ArtefactError
from saescope.paths import AnyPath, below, exists, read_bytes

_COMPARED = (
    *("shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs"),
    *("zarr_format", "node_type"),
)
"""What is compared of Zarr's description of an array where the manifest does not have it whole."""


@dataclass(frozen=True)
class Fault:
    """A file of a store that is not as it should be."""

    path: str
    """relative to the store"""
    kind: str
    """missing, truncated, damaged, swapped, unreadable or foreign"""
    what: str
    array: str | None = None
    """the array (a site, row_token, tokens, ...) or "documents", where it belongs to one"""
    chunk: int | None = None
    """of the array; of documents, the window"""


@dataclass
class Report:
    """What an examination found."""

    checked: int = 0
    """files read and compared"""
    faults: list[Fault] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    """what an interrupted run left behind, which does no harm; a resumed one uses or removes it"""
    notes: list[str] = field(default_factory=list)


def examine(store: ActivationStore, advance: Callable[[int], None] = lambda _: None) -> Report:
    """Read and check every committed file of a store, and look for others.

    `advance` is called with the number of files checked since the last call.
    """
    report = Report()

    def check(
        path: AnyPath, array: str | None, chunk: int | None, *reads: Callable[[], Any]
    ) -> None:
        report.checked += 1
        advance(1)
        try:
            for read in reads:
                read()
        except DamagedError as error:
            name = "/".join(below(path, store.path))
            what = error.what + (_origin(store, path) if error.kind == "swapped" else "")
            report.faults.append(Fault(name, error.kind, what, array, chunk))

    for path, array, chunk, reads in _files(store):
        check(path, array, chunk, *reads)
    for path in strangers(store):
        name = "/".join(below(path, store.path))
        waits = path == store.path / PENDING or is_uncommitted(store, path)
        if is_partial(path) or (not store.complete and waits):
            report.leftovers.append(name)
        else:
            what = "does not belong to this harvest"
            report.faults.append(Fault(name, "foreign", what))
    if store.ledger.excess:
        if store.complete:
            what = f"has {store.ledger.excess:,} bytes that do not belong to it"
            report.faults.append(Fault(LEDGER, "damaged", what))
        else:
            report.leftovers.append(f"the end of {LEDGER}")
    if not store.ledger.knows_checksums:
        report.notes.append(
            f"schema {store.manifest['schema']} does not record the checksums of chunks: one in "
            "the place of another cannot be found (--upgrade records them as they are now)"
        )
    report.notes += [
        f"{_place(entry)} was repaired with values that differ from those first committed: "
        f"{entry['why']['reason']}"
        for entry in store.ledger.corrections
    ]
    return report


def verify(store: ActivationStore) -> int:
    """Read and check every file of a store; how many there were.

    Raises ArtefactError that names each one that is missing, damaged, swapped or foreign. `examine`
    gives the same as a list, `saescope doctor` prints it.
    """
    report = examine(store)
    if report.faults:
        lines = "; ".join(f"{fault.path}: {fault.what}" for fault in report.faults)
        raise ArtefactError(lines, where=str(store.path))
    return report.checked


def _place(correction: dict[str, Any]) -> str:
    if "chunk" in correction:
        return f"chunk {correction['chunk']} of {correction['array']}"
    return f"the list of documents of window {correction['list']}"


def n_files(store: ActivationStore) -> int:
    """How many files `examine` reads and compares."""
    chunks = sum(len(store.chunks(split)) for split in ("train", "held_out"))
    return (
        chunks * len(row_arrays(store.manifest))
        + len(SEQUENCE_ARRAYS) * n_sequence_chunks(store)
        + len(store.windows)
        + len(array_names(store.manifest))
        + 1
    )


def _files(
    store: ActivationStore,
) -> Iterator[tuple[AnyPath, str | None, int | None, list[Callable[[], Any]]]]:
    """Every file that should be there: (path, array, chunk, how to read and check it)."""
    group = store.path / GROUP
    for name, described in descriptions(store).items():
        path = group / name / METADATA
        yield path, name, None, [lambda p=path, d=described: _check_description(store, p, d)]
    per_chunk = int(store.manifest["sequences_per_window"])
    pieces: dict[int, list[tuple[int, Any]]] = {}
    for window, found in enumerate(store.windows):
        for piece in found.pieces(per_chunk):
            pieces.setdefault(piece.chunk, []).append((window, piece))
    for array in SEQUENCE_ARRAYS:
        for chunk, inside in pieces.items():
            reads = [lambda a=array, w=w, p=p: store.read_piece(a, w, p) for w, p in inside]
            yield store.sequence_chunk_path(array, chunk), array, chunk, list(reads)
    for window in range(len(store.windows)):
        path = store.path / DOCUMENTS / documents_part(window)
        yield path, "documents", window, [lambda w=window: store.read_documents(w)]
    for split in ("train", "held_out"):
        for chunk in store.chunks(split):
            for array, described in row_arrays(store.manifest).items():
                path = chunk_path(group, array, chunk.index, 1 + len(described.tail))
                yield (
                    path,
                    array,
                    chunk.index,
                    [lambda a=array, n=chunk.index: store.read_rows(a, n)],
                )


def _check_description(store: ActivationStore, path: AnyPath, expected: dict[str, Any]) -> None:
    if not exists(path):
        raise DamagedError("Zarr's description is missing", where=str(path), kind="missing")
    found = read_json(path)
    if not isinstance(found, dict):
        raise DamagedError("Zarr's description is not one", where=str(path))
    names: Any = _COMPARED
    if store.manifest["schema"] >= LEDGER_SINCE:
        names = {**expected, **found}
    for name in names:
        one, other = found.get(name), expected.get(name)
        growing = name == "shape" and not store.complete  # a window was being written
        if growing and isinstance(one, list) and one[1:] == expected["shape"][1:]:
            continue
        if one != other:
            what = f"Zarr's description is damaged: {name} is {one!r}, not {other!r}"
            raise DamagedError(what, where=str(path))


def _origin(store: ActivationStore, path: AnyPath) -> str:
    """Where the content of a swapped chunk belongs, if it is one of this store."""
    crc = int.from_bytes(read_bytes(path)[-4:], "little")
    for array in row_arrays(store.manifest):
        found = store.ledger.chunk_with(array, crc)
        if found is not None:
            return f", but chunk {found} of {array}"
    return ""
