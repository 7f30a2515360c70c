"""Writing a harvest: one window at a time, flushed to the disk before the manifest names it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from activations.zarr_store import (
    DOCUMENT_SCHEMA,
    DOCUMENTS,
    GROUP,
    KIND,
    NAN_BITS,
    SCHEMA,
    SPLITS,
    ActivationStore,
    Window,
    documents_part,
)
from saescope.artefact import atomic_path, disk_full, fsync_path, write_manifest

SEQUENCE_ARRAYS = {"tokens": "int32", "document": "int32", "keep": "bool", "split": "int8"}


@dataclass(frozen=True)
class SiteSums:
    """Sums over rows of one site, in float64."""

    count: int
    total: NDArray[np.float64]
    """[d_in]"""
    square: float


@dataclass(frozen=True)
class WindowData:
    """A window's content, rows already shuffled."""

    split: str
    tokens: NDArray[np.int32]
    document: NDArray[np.int32]
    keep: NDArray[np.bool_]
    described: list[tuple[int, str, str]]
    """(id, key, title) of the documents that first appear here."""
    row_token: NDArray[np.int64]
    rows: Mapping[str, NDArray[np.uint16]]
    """Of each site, the bits of bfloat16 [row, d_in]."""
    order: NDArray[np.int64]
    """The shuffled order in which the rows are written."""
    sums: Mapping[str, SiteSums]


class HarvestWriter:
    """Appends windows to a store; what is committed survives any interruption.

    A window's arrays are written and flushed first and the manifest last. A window that the
    manifest does not name does not exist: `trim` removes what an interruption left of it.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        import zarr

        self.path = path
        self._facts = {
            key: value
            for key, value in manifest.items()
            if key not in ("kind", "schema", "created", "versions", "commit", "parent")
        }
        self._chunk_rows = int(manifest["chunk_rows"])
        self._context = int(manifest["config"]["context"])
        self._group: Any = zarr.open_group(path / GROUP, mode="r+")

    @classmethod
    def create(cls, path: Path, facts: dict[str, Any]) -> "HarvestWriter":
        """Make an empty store: the whole folder appears at once, or not at all."""
        sums = {
            site: {"count": 0, "sum": [0.0] * width, "sum_square": 0.0}
            for site, width in facts["sites"].items()
        }
        facts = {**facts, "corpus": None, "windows": [], "sums": sums, "complete": False}
        with disk_full(str(path)), atomic_path(path) as temporary:
            temporary.mkdir()
            (temporary / DOCUMENTS).mkdir()
            _create_arrays(temporary / GROUP, facts)
            write_manifest(temporary, kind=KIND, schema=SCHEMA, parent=None, **facts)
        return cls(path, facts)

    @property
    def store(self) -> ActivationStore:
        """The store as committed so far."""
        return ActivationStore.open(self.path)

    @property
    def windows(self) -> list[Window]:
        """Windows committed so far."""
        return [Window(**window) for window in self._facts["windows"]]

    def trim(self) -> None:
        """Remove what an interrupted run left behind the last committed window."""
        last = self.windows[-1] if self.windows else None
        self._resize(
            chunks=last.first_chunk + len(last.chunks(self._chunk_rows)) if last else 0,
            sequences=last.first_sequence + last.sequences if last else 0,
        )
        for leftover in (self.path / GROUP).rglob("*.partial"):
            leftover.unlink()

    def write(self, data: WindowData) -> None:
        """Append a window. Raises ArtefactError if the disk is full; nothing is committed then."""
        with disk_full(str(self.path)):
            window = self._write_arrays(data)
            self._write_documents(data)
            if data.split == "train":
                self._add_sums(data.sums)
            self._facts["windows"] = [*self._facts["windows"], asdict(window)]
            self._write_manifest()

    def finish(self, corpus: dict[str, Any]) -> None:
        """Mark the store as complete, with the facts of the corpus that were counted."""
        self._facts |= {"corpus": corpus, "complete": True}
        with disk_full(str(self.path)):
            self._write_manifest()

    def _write_manifest(self) -> None:
        write_manifest(self.path, kind=KIND, schema=SCHEMA, parent=None, **self._facts)

    def _resize(self, *, chunks: int, sequences: int) -> None:
        rows = chunks * self._chunk_rows
        for name in SEQUENCE_ARRAYS:
            self._group[name].resize((sequences, *self._group[name].shape[1:]))
        for name in ("row_token", *self._facts["sites"]):
            self._group[name].resize((rows, *self._group[name].shape[1:]))

    def _write_arrays(self, data: WindowData) -> Window:
        before = self.windows
        window = Window(
            split=data.split,
            first_chunk=sum(len(w.chunks(self._chunk_rows)) for w in before),
            rows=len(data.order),
            first_sequence=sum(w.sequences for w in before),
            sequences=len(data.tokens),
        )
        chunks = window.chunks(self._chunk_rows)
        first, last = window.first_sequence, window.first_sequence + window.sequences
        self._resize(chunks=window.first_chunk + len(chunks), sequences=last)
        split = np.full(window.sequences, SPLITS.index(data.split), np.int8)
        for name, values in (
            ("tokens", data.tokens),
            ("document", data.document),
            ("keep", data.keep),
            ("split", split),
        ):
            self._group[name][first:last] = values
        for number, chunk in enumerate(chunks):
            start = number * self._chunk_rows
            order = data.order[start : start + chunk.rows]
            self._write_chunk("row_token", chunk.index, data.row_token[order], -1)
            for site, rows in data.rows.items():
                self._write_chunk(
                    site, chunk.index, np.take(rows, order, axis=0, mode="clip"), NAN_BITS
                )
        self._flush(window)
        return window

    def _write_chunk(self, name: str, index: int, values: NDArray[Any], fill: int) -> None:
        first = index * self._chunk_rows
        if len(values) < self._chunk_rows:
            whole = np.full((self._chunk_rows, *values.shape[1:]), fill, values.dtype)
            whole[: len(values)] = values
            values = whole
        self._group[name][first : first + self._chunk_rows] = values

    def _flush(self, window: Window) -> None:
        """Force the window's chunk files, and the folders that name them, to the disk."""
        root = self.path / GROUP
        per_chunk = self._facts["sequences_per_window"]
        last = window.first_sequence + window.sequences - 1
        numbers = range(window.first_sequence // per_chunk, last // per_chunk + 1)
        indices = [chunk.index for chunk in window.chunks(self._chunk_rows)]
        files = [root / name / "c" / str(n) for name in SEQUENCE_ARRAYS for n in numbers]
        names = ("row_token", *self._facts["sites"])
        files += [root / name / "c" / str(n) for name in names for n in indices]
        files = [file / "0" if file.is_dir() else file for file in files]
        folders = {parent for file in files for parent in file.relative_to(root).parents}
        metadata = [root / name / "zarr.json" for name in (*SEQUENCE_ARRAYS, *names)]
        for path in (*files, *metadata, *(root / folder for folder in folders)):
            fsync_path(path)

    def _write_documents(self, data: WindowData) -> None:
        number = SPLITS.index(data.split)
        columns = list(zip(*data.described, strict=True)) or [(), (), ()]
        arrays = [*columns, [number] * len(data.described)]
        table = pa.table(
            [
                pa.array(values, kind.type)
                for values, kind in zip(arrays, DOCUMENT_SCHEMA, strict=True)
            ],
            schema=DOCUMENT_SCHEMA,
        )
        path = self.path / DOCUMENTS / documents_part(len(self._facts["windows"]))
        with atomic_path(path) as temporary:
            parquet.write_table(table, temporary)

    def _add_sums(self, sums: Mapping[str, SiteSums]) -> None:
        before = self._facts["sums"]
        self._facts["sums"] = {
            site: {
                "count": before[site]["count"] + new.count,
                "sum": (np.array(before[site]["sum"]) + new.total).tolist(),
                "sum_square": before[site]["sum_square"] + new.square,
            }
            for site, new in sums.items()
        }


def _create_arrays(path: Path, facts: dict[str, Any]) -> None:
    """An empty Zarr group with every array of the store."""
    import zarr
    from zarr.codecs import Crc32cCodec

    context, chunk_rows = facts["config"]["context"], facts["chunk_rows"]
    per_window = facts["sequences_per_window"]
    group = zarr.create_group(path, zarr_format=3)

    def create(
        name: str, width: int | None, chunk: int, dtype: str, fill: Any, **facts: Any
    ) -> None:
        tail = () if width is None else (width,)
        group.create_array(
            name, shape=(0, *tail), chunks=(chunk, *tail), dtype=dtype, fill_value=fill,
            compressors=[Crc32cCodec()], attributes=facts, config={"write_empty_chunks": True},
        )  # fmt: skip

    for name, dtype in SEQUENCE_ARRAYS.items():
        width = None if name == "split" else context
        create(name, width, per_window, dtype, False if dtype == "bool" else -1)
    create("row_token", None, chunk_rows, "int64", -1)
    for site, width in facts["sites"].items():
        create(site, width, chunk_rows, "uint16", NAN_BITS, bits_of="bfloat16", site=site)
