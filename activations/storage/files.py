"""Which files belong to a store, committed or left by an interruption, and which do not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from activations.storage.chunk_files import crc32c
from activations.storage.layout import (
    DOCUMENTS,
    GROUP,
    METADATA,
    SEQUENCE_ARRAYS,
    array_names,
    documents_part,
    documents_window,
    expected_arrays,
    row_arrays,
    with_length,
)
from activations.storage.ledger import LEDGER, Checksums
from activations.storage.reader import ActivationStore
from saescope.artefact import MANIFEST
from saescope.leftovers import is_leftover
from saescope.paths import AnyPath, below, exists, listing, objects, read_bytes


def n_sequence_chunks(store: ActivationStore) -> int:
    """Committed chunks of each array [sequence, ...]."""
    return -(-store.n_sequences // int(store.manifest["sequences_per_window"]))


def lengths(store: ActivationStore) -> dict[str, int]:
    """How long Zarr should say that each array is."""
    chunks = sum(len(store.chunks(split)) for split in ("train", "held_out"))
    rows = chunks * int(store.manifest["chunk_rows"])
    found = dict.fromkeys(row_arrays(store.manifest), rows)
    return {**found, **dict.fromkeys(SEQUENCE_ARRAYS, store.n_sequences)}


def descriptions(store: ActivationStore) -> dict[str, dict[str, Any]]:
    """What every zarr.json should say; "" is the group's."""
    described = store.manifest.get("arrays") or expected_arrays(store.manifest)
    found = {"": described[""]}
    for name, length in lengths(store).items():
        found[name] = with_length(described[name], length)
    return found


def is_partial(path: AnyPath) -> bool:
    """Whether this is what a process that was killed while writing left behind."""
    return path.suffix == ".partial" or is_leftover(path)


def is_uncommitted(store: ActivationStore, path: AnyPath) -> bool:
    """Whether a file has the name of a chunk, or list, of a window that is not committed."""
    parts = below(path, store.path)
    if len(parts) == 2 and parts[0] == DOCUMENTS:
        window = documents_window(parts[1])
        return window is not None and window >= len(store.windows)
    if len(parts) != 4 or parts[0] != GROUP or parts[2] != "c" or not parts[3].isdigit():
        return False
    return parts[1] in array_names(store.manifest) and int(parts[3]) >= _n_chunks(store, parts[1])


def _n_chunks(store: ActivationStore, array: str) -> int:
    if array in SEQUENCE_ARRAYS:
        return n_sequence_chunks(store)
    return lengths(store)[array] // int(store.manifest["chunk_rows"])


def strangers(store: ActivationStore) -> Iterator[AnyPath]:
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


def checksums(store: ActivationStore, window: int) -> Checksums:
    """Of what a window's files hold now. Raises DamagedError."""
    store.read_documents(window)
    documents = read_bytes(store.path / DOCUMENTS / documents_part(window))
    found, per_chunk = store.windows[window], int(store.manifest["sequences_per_window"])
    chunks = [chunk.index for chunk in found.chunks(int(store.manifest["chunk_rows"]))]
    rows = {
        array: [crc32c(store.read_rows(array, chunk)) for chunk in chunks]
        for array in row_arrays(store.manifest)
    }
    sequences = {
        array: [crc32c(store.read_piece(array, window, p)) for p in found.pieces(per_chunk)]
        for array in SEQUENCE_ARRAYS
    }
    return Checksums(rows, sequences, crc32c(documents))
