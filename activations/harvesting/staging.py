"""Windows that are computed and on disk but not committed yet, as their turn has not come.

Where a window's chunks belong follows from the rows of all windows before it. So ranks leave what
they compute in `pending/` inside the store, a folder a window that appears whole or not at all, and
rank 0 moves its files to where they belong when the windows before it are committed. The folder's
name has a sha256 of the settings and of the window's text: what another harvest, or another text,
left there has another name.
"""

import hashlib
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from activations.harvesting.windows import MissingWindow
from activations.storage.chunk_files import chunk_path, read_chunk, write_chunk
from activations.storage.layout import (
    DOCUMENTS,
    PENDING,
    SEQUENCE_ARRAYS,
    documents_part,
    row_arrays,
)
from activations.storage.reader import ActivationStore
from activations.storage.row_formats import SiteSums
from activations.storage.window_data import StagedRows, WindowData, filled_up
from saescope.artefact import atomic_path, read_json, sha256_json, write_json
from saescope.errors import ArtefactError
from saescope.leftovers import is_leftover
from saescope.paths import AnyPath, exists, listing, remove
from saescope.system import system_errors

_RECORD = "window.json"
_SEQUENCES = ("tokens", "document", "keep")
_DECISIVE = (
    *("config", "model", "sites", "batch_sequences", "chunk_rows", "sequences_per_window"),
    "outliers",
)
"""What of the manifest, besides the text, a window's content follows from."""


class Staging:
    """The windows of an unfinished harvest that wait to be committed."""

    def __init__(self, store: ActivationStore) -> None:
        self._store = store.path
        self.folder = self._store / PENDING
        self._context = store.context
        self._arrays = row_arrays(store.manifest)
        self._chunk_rows = int(store.manifest["chunk_rows"])
        self._identity = sha256_json([store.manifest.get(name) for name in _DECISIVE])

    def name(self, window: MissingWindow) -> str:
        """What the window's folder is called."""
        group = window.group
        digest = hashlib.sha256(f"{self._identity} {window.split} {window.seed}".encode())
        facts = (window.first_sequence, window.measured, group.described)
        digest.update(repr(facts).encode(errors="surrogatepass"))
        digest.update(group.tokens.tobytes() + group.document.tobytes())
        return f"window-{window.number:06d}-{digest.hexdigest()[:16]}"

    def has(self, name: str) -> bool:
        """Whether a window waits; it does until it is committed."""
        return exists(self.folder / name / _RECORD)

    def needs(self, name: str, number: int) -> bool:
        """Whether a window neither waits nor is committed."""
        if self.has(name):
            return False
        # reading what is committed takes longer the more it is; most windows have no list yet
        if not exists(self._store / DOCUMENTS / documents_part(number)):
            return True
        return number >= len(ActivationStore.read(self._store).windows)

    def put(self, name: str, data: WindowData) -> None:
        """Leave a window there, flushed to the disk; it appears whole.

        In an object store it is there once its record is, which is written last.
        Raises ArtefactError if the disk is full.
        """
        target = self.folder / name
        if isinstance(target, Path):
            if not target.parent.exists():
                return  # the harvest has been finished by others
            whole = atomic_path(target)
        else:
            whole = nullcontext(target)
        with system_errors(str(self._store)), whole as temporary:
            crcs: dict[str, list[int]] = {array: [] for array in self._arrays}
            for number, array, values in data.chunks(self._chunk_rows):
                path = chunk_path(temporary, array, number, values.ndim)
                crcs[array].append(write_chunk(path, filled_up(array, values, self._chunk_rows)))
            for array in _SEQUENCES:
                crcs[array] = [write_chunk(temporary / array, getattr(data, array))]
            record = {
                "split": data.split,
                "sequences": len(data.tokens),
                "rows": len(data.order),
                "crcs": crcs,
                "described": data.described,
                "sums": {
                    site: [sums.count, sums.total.tolist(), sums.square]
                    for site, sums in data.sums.items()
                },
                "positions": data.positions,
                "place": data.cursor,
            }
            write_json(temporary / _RECORD, {"sha256": sha256_json(record), **record})

    def get(self, name: str) -> WindowData:
        """A window that waits, its rows left in their files. Raises ArtefactError if damaged."""
        folder = self.folder / name
        record = self._record(folder)
        crcs = record["crcs"]
        shape = (record["sequences"], self._context)
        tokens, document, keep = (
            read_chunk(folder / a, f"{a} of {name}", SEQUENCE_ARRAYS[a], shape, crcs[a][0])
            for a in _SEQUENCES
        )
        return WindowData(
            split=record["split"],
            tokens=tokens,
            document=document,
            keep=keep,
            described=record["described"],
            row_token=np.empty(0, np.int64),
            rows={},
            order=np.arange(record["rows"]),
            sums={
                site: SiteSums(count, np.array(total, np.float64), square)
                for site, (count, total, square) in record["sums"].items()
            },
            positions=record["positions"],
            cursor=record["place"],
            staged=StagedRows(folder, {array: crcs[array] for array in self._arrays}),
        )

    def _record(self, folder: AnyPath) -> dict[str, Any]:
        record = read_json(folder / _RECORD)
        if record.pop("sha256", None) != sha256_json(record):
            raise ArtefactError("its content does not match its own sha256", where=str(folder))
        return record

    def open(self, committed: int) -> None:
        """Begin, or go on: remove what is committed, and what is not whole (a cut commit's rest).

        For rank 0, while others may be at work.
        """
        if isinstance(self.folder, Path):
            with system_errors(str(self._store)):
                self.folder.mkdir(exist_ok=True)
        for name, _ in listing(self.folder)(()):
            found = re.fullmatch(r"window-(\d{6,})-[0-9a-f]{16}", name)
            other = found is None and name.startswith("window-")
            if other or (found and (int(found[1]) < committed or not self._is_whole(name))):
                remove(self.folder / name)

    def remove_torn(self, name: str) -> None:
        """Remove what was left of a window by ranks that died while they put it there.

        For the rank that has the window.
        """
        if not isinstance(self.folder, Path):
            return  # the objects are written over
        for path in self.folder.glob(f".{name}.*"):
            if is_leftover(path):
                remove(path)

    def _is_whole(self, name: str) -> bool:
        folder = self.folder / name
        try:
            data = self.get(name)
            assert data.staged is not None
            for array, described in self._arrays.items():
                for number, crc in enumerate(data.staged.crcs[array]):
                    path = chunk_path(folder, array, number, 1 + len(described.tail))
                    shape = (self._chunk_rows, *described.tail)
                    read_chunk(path, f"chunk {number} of {array}", described.dtype, shape, crc)
        except ArtefactError:
            return False
        return True
