"""Everything that can be wrong with the files of a store, found and named."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activations.storage.chunk_files import chunk_path
from activations.storage.layout import (
    DOCUMENTS,
    GROUP,
    METADATA,
    PENDING,
    SEQUENCE_ARRAYS,
    array_names,
    documents_part,
    documents_window,
    expected_arrays,
    row_arrays,
    with_length,
)
from activations.storage.ledger import LEDGER, LEDGER_SINCE
from saescope.artefact import MANIFEST, DamagedError, read_json
from saescope.leftovers import is_leftover
from saescope.paths import AnyPath, below, exists, listing, objects, read_bytes

if TYPE_CHECKING:
    from activations.storage.reader import ActivationStore

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


def examine(store: "ActivationStore", advance: Callable[[int], None] = lambda _: None) -> Report:
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


def _place(correction: dict[str, Any]) -> str:
    if "chunk" in correction:
        return f"chunk {correction['chunk']} of {correction['array']}"
    return f"the list of documents of window {correction['list']}"


def n_files(store: "ActivationStore") -> int:
    """How many files `examine` reads and compares."""
    chunks = sum(len(store.chunks(split)) for split in ("train", "held_out"))
    return (
        chunks * len(row_arrays(store.manifest))
        + len(SEQUENCE_ARRAYS) * n_sequence_chunks(store)
        + len(store.windows)
        + len(array_names(store.manifest))
        + 1
    )


def n_sequence_chunks(store: "ActivationStore") -> int:
    """Committed chunks of each array [sequence, ...]."""
    return -(-store.n_sequences // int(store.manifest["sequences_per_window"]))


def _files(
    store: "ActivationStore",
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


def lengths(store: "ActivationStore") -> dict[str, int]:
    """How long Zarr should say that each array is."""
    chunks = sum(len(store.chunks(split)) for split in ("train", "held_out"))
    rows = chunks * int(store.manifest["chunk_rows"])
    found = dict.fromkeys(row_arrays(store.manifest), rows)
    return {**found, **dict.fromkeys(SEQUENCE_ARRAYS, store.n_sequences)}


def descriptions(store: "ActivationStore") -> dict[str, dict[str, Any]]:
    """What every zarr.json should say; "" is the group's."""
    described = store.manifest.get("arrays") or expected_arrays(store.manifest)
    found = {"": described[""]}
    for name, length in lengths(store).items():
        found[name] = with_length(described[name], length)
    return found


def _check_description(store: "ActivationStore", path: AnyPath, expected: dict[str, Any]) -> None:
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


def is_partial(path: AnyPath) -> bool:
    """Whether this is what a process that was killed while writing left behind."""
    return path.suffix == ".partial" or is_leftover(path)


def is_uncommitted(store: "ActivationStore", path: AnyPath) -> bool:
    """Whether a file has the name of a chunk, or list, of a window that is not committed."""
    parts = below(path, store.path)
    if len(parts) == 2 and parts[0] == DOCUMENTS:
        window = documents_window(parts[1])
        return window is not None and window >= len(store.windows)
    if len(parts) != 4 or parts[0] != GROUP or parts[2] != "c" or not parts[3].isdigit():
        return False
    return parts[1] in array_names(store.manifest) and int(parts[3]) >= _n_chunks(store, parts[1])


def _n_chunks(store: "ActivationStore", array: str) -> int:
    if array in SEQUENCE_ARRAYS:
        return n_sequence_chunks(store)
    return lengths(store)[array] // int(store.manifest["chunk_rows"])


def strangers(store: "ActivationStore") -> Iterator[AnyPath]:
    """Files and folders that no part of a store has; of a strange folder not what is inside."""
    counts = {name: _n_chunks(store, name) for name in array_names(store.manifest)}

    def belongs(parts: tuple[str, ...], is_folder: bool) -> bool:
        match parts:
            case (name,):
                files = (MANIFEST, LEDGER) if store.manifest["schema"] > 1 else (MANIFEST,)
                return name in ((DOCUMENTS, GROUP) if is_folder else files)
            case (top, name) if top == DOCUMENTS:
                window = documents_window(name)
                known = window is not None and window < len(store.windows)
                return known and name == documents_part(window or 0) and not is_folder
            case (_, name):
                return name in counts if is_folder else name == METADATA
            case (_, _, name):
                return name == ("c" if is_folder else METADATA)
            case (_, array, _, name):
                flat = array in flat_arrays
                known = name.isdigit() and str(int(name)) == name and int(name) < counts[array]
                return known and is_folder != flat
            case (_, _, _, _, name):
                return name == "0" and not is_folder
        return False

    rows = row_arrays(store.manifest)
    flat_arrays = {"split", *(name for name, each in rows.items() if not each.tail)}

    entries = listing(store.path)

    def walk(parts: tuple[str, ...]) -> Iterator[AnyPath]:
        for name, is_folder in entries(parts):
            inside = (*parts, name)
            if not belongs(inside, is_folder):
                yield store.path.joinpath(*inside)
            elif is_folder:
                yield from walk(inside)

    return walk(())


def left_by_creation(folder: AnyPath) -> list[AnyPath]:
    """What an interrupted creation left in an object store; a folder on disk appears at once."""
    if isinstance(folder, Path):
        return []
    return [path for path in objects(folder) if _begins(below(path, folder))]


def _begins(parts: tuple[str, ...]) -> bool:
    return parts == (LEDGER,) or (parts[0] == GROUP and parts[-1] == METADATA)


def holds_another(folder: AnyPath) -> bool:
    """Whether something is where a store is to be, besides what a creation left."""
    if isinstance(folder, Path):
        return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    return exists(folder) or len(objects(folder)) > len(left_by_creation(folder))


def _origin(store: "ActivationStore", path: AnyPath) -> str:
    """Where the content of a swapped chunk belongs, if it is one of this store."""
    crc = int.from_bytes(read_bytes(path)[-4:], "little")
    for array in row_arrays(store.manifest):
        found = store.ledger.chunk_with(array, crc)
        if found is not None:
            return f", but chunk {found} of {array}"
    return ""
