"""Writing a harvest: one window at a time, flushed to the disk before the manifest names it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activations.storage.chunk_files import chunk_path, crc32c, read_chunk, write_chunk
from activations.storage.documents import write_documents
from activations.storage.files import (
    checksums,
    is_partial,
    is_uncommitted,
    left_by_creation,
    strangers,
)
from activations.storage.layout import (
    DOCUMENTS,
    GROUP,
    METADATA,
    SEQUENCE_ARRAYS,
    SPLITS,
    create_arrays,
    described_arrays,
    document_schema,
    row_arrays,
    with_length,
)
from activations.storage.ledger import LEDGER, Checksums, Chunk, Ledger, Window, window_line
from activations.storage.reader import KIND, SCHEMA, ActivationStore
from activations.storage.row_formats import SiteSums
from activations.storage.window_data import WindowData, filled_up
from saescope.artefact import (
    MANIFEST,
    fsync_path,
    new_folder,
    write_json,
    write_manifest,
)
from saescope.paths import AnyPath, below, cut, move, remove
from saescope.system import system_errors

_WRITTEN_ANEW = (
    *("kind", "schema", "created", "versions", "commit", "parent", "sha256"),
    *("windows", "ledger"),
)
"""What the manifest has besides the facts."""


class HarvestWriter:
    """Appends windows to a store; what is committed survives any interruption.

    A window's files are written and flushed first, then the ledger, and the manifest last. A window
    that the manifest does not count does not exist: `trim` removes what an interruption left of
    it. Whoever writes holds the store's lock (`saescope.locks.locked`).
    """

    def __init__(self, store: ActivationStore) -> None:
        manifest = store.manifest
        self.path = store.path
        self._facts = {key: value for key, value in manifest.items() if key not in _WRITTEN_ANEW}
        self._chunk_rows = int(manifest["chunk_rows"])
        self._per_window = int(manifest["sequences_per_window"])
        self._ledger = store.ledger
        self._lengths: dict[str, int] = {}
        last = store.windows[-1] if store.windows else Window(SPLITS[0], 0, 0, 0, 0)
        self._chunks = last.first_chunk + len(last.chunks(self._chunk_rows))
        self._sequences = last.first_sequence + last.sequences
        self._written: list[AnyPath] = []

    @classmethod
    def create(cls, path: AnyPath, facts: dict[str, Any]) -> "HarvestWriter":
        """Make an empty store; it is there once its manifest is, which comes with all else or last.

        In an object store, what an interruption left of an earlier attempt goes first.
        """
        sums = {
            site: {"count": 0, "sum": [0.0] * width, "sum_square": 0.0}
            for site, width in facts["sites"].items()
        }
        positions = {split: {} for split in SPLITS}
        facts = {**facts, "corpus": None, "sums": sums, "positions": positions, "complete": False}
        for leftover in left_by_creation(path):
            remove(leftover)
        with system_errors(str(path)), new_folder(path, MANIFEST) as temporary:
            (temporary / DOCUMENTS).mkdir()
            (temporary / LEDGER).touch()
            create_arrays(temporary / GROUP, facts)
            facts["arrays"] = described_arrays(temporary / GROUP, facts)
            _write_manifest(temporary, facts, Ledger())
        return cls(ActivationStore.open(path))

    @property
    def store(self) -> ActivationStore:
        """The store as committed so far."""
        return ActivationStore.open(self.path)

    def trim(self) -> None:
        """Remove what an interrupted run left behind the last committed window.

        A store of an older schema is brought to the present one. Raises ArtefactError for one with
        a damaged chunk, or if the disk is full.
        """
        with system_errors(str(self.path)):
            if not self._ledger.knows_checksums:
                self.upgrade()
            if self._ledger.excess:
                cut(self.path / LEDGER, self._ledger.size)
            self._resize(chunks=self._chunks, sequences=self._sequences)
            store = self.store
            for path in list(strangers(store)):
                if is_partial(path) or is_uncommitted(store, path):
                    remove(path)

    def upgrade(self) -> None:
        """Record the checksums of what a store of an older schema holds, in a ledger."""
        store = self.store
        self._facts["arrays"] = described_arrays(self.path / GROUP, self._facts)
        self._ledger = Ledger()
        cut(self.path / LEDGER, 0)
        for number, window in enumerate(store.windows):
            self._ledger.append(self.path, window_line(window, checksums(store, number)))
        self._write_manifest(**_made(store))

    def write(self, data: WindowData) -> None:
        """Append a window. Raises ArtefactError if the disk is full; nothing is committed then."""
        with system_errors(str(self.path)):
            window, rows, sequences = self._write_arrays(data)
            documents = self._write_documents(data)
            if data.split == "train":
                self._add_sums(data.sums)
            self._add_positions(data)
            if data.cursor is not None:
                self._facts["places"] = {**self._facts.get("places", {}), data.split: data.cursor}
            line = window_line(window, Checksums(rows, sequences, documents))
            self._ledger.append(self.path, line)
            self._write_manifest()
            self._chunks += len(window.chunks(self._chunk_rows))
            self._sequences += window.sequences

    def begin(self, part: dict[str, Any]) -> None:
        """Append a corpus: what is written from now on is of it, and the store incomplete."""
        appended = [*self._facts.get("appended", []), {**part, "counts": None}]
        self._facts |= {"appended": appended, "complete": False}
        with system_errors(str(self.path)):
            self._write_manifest()

    def finish(self, corpus: dict[str, Any]) -> None:
        """Mark the store as complete, with the facts of the last corpus that were counted."""
        if appended := self._facts.get("appended"):
            self._facts["appended"] = [*appended[:-1], {**appended[-1], "counts": corpus}]
        else:
            self._facts["corpus"] = corpus
        self._facts.pop("places", None)
        self._facts["complete"] = True
        with system_errors(str(self.path)):
            self._write_manifest()

    def _write_manifest(self, **made: Any) -> None:
        _write_manifest(self.path, {**self._facts, **made}, self._ledger)

    def correct(self, line: bytes) -> None:
        """Commit that a chunk now holds something else than was committed first."""
        made = _made(self.store)
        with system_errors(str(self.path)):
            self._ledger.append(self.path, line)
            self._write_manifest(**made)

    def _resize(self, *, chunks: int, sequences: int) -> None:
        """Make Zarr see this many chunks of rows, and sequences.

        Not by Zarr itself, which goes through all chunks to do it.
        """
        rows = chunks * self._chunk_rows
        for name, described in self._facts["arrays"].items():
            length = sequences if name in SEQUENCE_ARRAYS else rows
            if name and self._lengths.get(name) != length:
                path = self.path / GROUP / name / METADATA
                write_json(path, with_length(described, length))
                self._lengths[name] = length

    def _write_arrays(
        self, data: WindowData
    ) -> tuple[Window, dict[str, list[int]], dict[str, list[int]]]:
        """Write all chunks of a window; with the checksums for the ledger."""
        window = Window(
            split=data.split,
            first_chunk=self._chunks,
            rows=len(data.order),
            first_sequence=self._sequences,
            sequences=len(data.tokens),
        )
        chunks = window.chunks(self._chunk_rows)
        self._written = []
        split = np.full(window.sequences, SPLITS.index(data.split), np.int8)
        arrays = {
            "tokens": data.tokens,
            "document": data.document,
            "keep": data.keep,
            "split": split,
        }
        sequences = {name: self._write_sequences(name, window, v) for name, v in arrays.items()}
        rows = self._put_rows(data, chunks)
        self._resize(
            chunks=window.first_chunk + len(chunks),
            sequences=window.first_sequence + window.sequences,
        )
        self._flush(self._written)
        return window, rows, sequences

    def _put_rows(self, data: WindowData, chunks: Sequence[Chunk]) -> dict[str, list[int]]:
        """Write the chunks of a window's rows, or move those that are in files; their crc32c."""
        arrays = row_arrays(self._facts)
        if data.staged is not None:
            for name, array in arrays.items():
                for number, chunk in enumerate(chunks):
                    ndim = 1 + len(array.tail)
                    path = chunk_path(self.path / GROUP, name, chunk.index, ndim)
                    move(chunk_path(data.staged.folder, name, number, ndim), path)
                    self._written.append(path)
            return {name: data.staged.crcs[name] for name in arrays}
        rows: dict[str, list[int]] = {name: [] for name in arrays}
        for number, name, values in data.chunks(self._chunk_rows):
            rows[name].append(self._write_chunk(name, chunks[number].index, values))
        return rows

    def _write_chunk(self, name: str, index: int, values: NDArray[Any]) -> int:
        """Write one chunk of rows, filled up where they end; its crc32c."""
        path = chunk_path(self.path / GROUP, name, index, values.ndim)
        self._written.append(path)
        return write_chunk(path, filled_up(name, values, self._chunk_rows))

    def _write_sequences(self, name: str, window: Window, values: NDArray[Any]) -> list[int]:
        """Write a window's part of an array [sequence, ...]; the crc32c of each piece."""
        found, rest = [], values
        for piece in window.pieces(self._per_window):
            part, rest = rest[: piece.sequences], rest[piece.sequences :]
            found.append(crc32c(part))
            path = chunk_path(self.path / GROUP, name, piece.chunk, values.ndim)
            if piece.start:
                # a chunk that holds committed sequences is replaced at once, not written over
                shape = (self._per_window, *part.shape[1:])
                what = f"chunk {piece.chunk} of {name}"
                before = read_chunk(path, what, SEQUENCE_ARRAYS[name], shape, None)
                part = np.concatenate([before[: piece.start], part])
            self._written.append(path)
            whole = filled_up(name, part, self._per_window)
            write_chunk(path, whole, replaces=piece.start > 0)
        return found

    def _flush(self, written: list[AnyPath]) -> None:
        """Force chunk files, and the folders that name them, to the disk."""
        root = self.path / GROUP
        if not isinstance(root, Path):
            return
        inside = [below(file, root) for file in written]
        folders = {root.joinpath(*names[:n]) for names in inside for n in range(len(names))}
        for path in (*written, *folders):
            fsync_path(path)

    def _write_documents(self, data: WindowData) -> int:
        number, schema = len(self._ledger.windows), document_schema(self._facts)
        return write_documents(self.path, number, data.split, data.described, schema)

    def _add_sums(self, sums: Mapping[str, SiteSums]) -> None:
        before = self._facts["sums"]
        self._facts["sums"] = before | {
            site: {
                "count": before[site]["count"] + new.count,
                "sum": (np.array(before[site]["sum"]) + new.total).tolist(),
                "sum_square": before[site]["sum_square"] + new.square,
            }
            for site, new in sums.items()
        }

    def _add_positions(self, data: WindowData) -> None:
        """Count positions, in a store that has done so from its beginning."""
        if (before := self._facts.get("positions")) is None:
            return
        known = before[data.split]
        added = {name: known.get(name, 0) + n for name, n in data.positions.items()}
        self._facts["positions"] = {**before, data.split: {**known, **added}}


def _made(store: ActivationStore) -> dict[str, Any]:
    """When, and by which versions, a store was made: not to be changed by those that repair it."""
    return {name: store.manifest[name] for name in ("created", "versions", "commit")}


def _write_manifest(folder: AnyPath, facts: dict[str, Any], ledger: Ledger) -> None:
    write_manifest(
        folder, kind=KIND, schema=SCHEMA, parent=None, sealed=True, ledger=ledger.committed, **facts
    )
