"""ActivationStore: activations of one model over one corpus, on disk, read chunk by chunk.

A store is a folder:

    manifest.json            what was harvested from what, every committed window, statistics
    documents.parquet/       one Parquet file a window: document, key, title, split
    activations.zarr/        a Zarr v3 group, checksummed by crc32c, not compressed
        tokens, document     int32 [sequence, position]
        keep                 bool  [sequence, position], false where no row is stored
        split                int8  [sequence], 0 train, 1 held out
        row_token            int64 [row], sequence * context + position of each row; -1: no row
        <site>               uint16 [row, d_in], the bits of bfloat16

Rows of all sites share one order. A window of rows is of one split, fills whole chunks (the last
may be part empty) and is shuffled before it is cut into them, so a chunk is a fair sample of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import google_crc32c
import numpy as np
import pyarrow as pa
import torch
from jaxtyping import BFloat16, Int64
from numpy.typing import NDArray
from pyarrow import parquet
from torch import Tensor

from saescope.artefact import read_manifest, sha256_json
from saescope.errors import ArtefactError, InputError

KIND, SCHEMA = "harvest", 1
GROUP, DOCUMENTS = "activations.zarr", "documents.parquet"
SPLITS = ("train", "held_out")
NAN_BITS = 0x7FC0
DOCUMENT_SCHEMA = pa.schema(
    [
        ("document", pa.int32()),
        ("key", pa.string()),
        ("title", pa.string()),
        ("split", pa.int8()),
    ]
)


@dataclass(frozen=True)
class Chunk:
    """One chunk of a store: its place, and how many of its rows are real."""

    index: int
    rows: int


@dataclass(frozen=True)
class Window:
    """A committed run of chunks and the sequences whose rows they hold."""

    split: str
    first_chunk: int
    rows: int
    first_sequence: int
    sequences: int

    def chunks(self, chunk_rows: int) -> list[Chunk]:
        """Its chunks, all full but perhaps the last."""
        starts = range(0, self.rows, chunk_rows)
        return [
            Chunk(self.first_chunk + n, min(chunk_rows, self.rows - start))
            for n, start in enumerate(starts)
        ]


@dataclass(frozen=True)
class SiteStatistics:
    """Moments of one site over the kept positions of the train split."""

    count: int
    mean: NDArray[np.float64]
    """[d_in]"""
    mean_square: float
    """E ||x||^2"""

    @property
    def centred_mean_square(self) -> float:
        """E ||x - mean||^2, the total variance."""
        return self.mean_square - float(self.mean @ self.mean)


class ActivationStore:
    """A harvest on disk.

    >>> store = ActivationStore.open("data/smollm2-135m-wikipedia")  # doctest: +SKIP
    >>> chunk = store.chunks("train")[0]  # doctest: +SKIP
    >>> x, row_token = store.read_chunk("blocks.9.hook_resid_post", chunk.index)  # doctest: +SKIP
    >>> x.shape, x.dtype  # doctest: +SKIP
    (torch.Size([16384, 576]), torch.bfloat16)
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.windows = [Window(**window) for window in manifest["windows"]]
        self._chunk_rows = int(manifest["chunk_rows"])

    @classmethod
    def open(cls, path: str | Path) -> "ActivationStore":
        """Open a store to read it, complete or not.

        Raises ArtefactError if there is none, it is damaged, or a newer saescope wrote it.
        """
        folder = Path(path)
        manifest = read_manifest(folder, kind=KIND, schema=SCHEMA)
        if not (folder / GROUP / "zarr.json").exists():
            raise ArtefactError(f"{GROUP} is missing or damaged", where=str(folder))
        return cls(folder, manifest)

    @property
    def complete(self) -> bool:
        """Whether the harvest was finished."""
        return bool(self.manifest["complete"])

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites stored."""
        return tuple(self.manifest["sites"])

    @property
    def context(self) -> int:
        """Positions of a sequence."""
        return int(self.manifest["config"]["context"])

    @property
    def n_sequences(self) -> int:
        """Committed sequences, both splits."""
        return sum(window.sequences for window in self.windows)

    @property
    def n_tokens(self) -> int:
        """Tokens of all committed sequences, kept or not."""
        return self.n_sequences * self.context

    def n_rows(self, split: str | None = None) -> int:
        """Stored rows (kept positions) of a split, or of both."""
        chosen = SPLITS if split is None else (_split(split),)
        return sum(window.rows for window in self.windows if window.split in chosen)

    def d_in(self, site: str) -> int:
        """Width of a site. Raises InputError if it is not stored."""
        if site not in self.manifest["sites"]:
            raise InputError(
                "this store has no such site", where=str(self.path), given=site, allowed=self.sites
            )
        return int(self.manifest["sites"][site])

    @cached_property
    def hash(self) -> str:
        """sha256 of what was harvested from what, and of the activations' sums; not of the path."""
        names = ("model", "corpus", "sites", "chunk_rows", "windows", "sums")
        config = {**self.manifest["config"], "out": None}
        return sha256_json([config, *(self.manifest[name] for name in names)])

    def statistics(self, site: str) -> SiteStatistics:
        """Count, mean and mean square of a site over the train split.

        Raises InputError if the site is not stored or no train row is committed yet.
        """
        self.d_in(site)
        sums = self.manifest["sums"][site]
        count = int(sums["count"])
        if count == 0:
            raise InputError("no train rows are committed yet", where=str(self.path))
        mean = np.array(sums["sum"], np.float64) / count
        return SiteStatistics(count, mean, float(sums["sum_square"]) / count)

    @cached_property
    def tokens(self) -> "SequenceArray":
        """Token ids, int32 [sequence, position]; read from disk when sliced."""
        return SequenceArray(self, "tokens")

    @cached_property
    def document(self) -> "SequenceArray":
        """Document of each token, int32 [sequence, position]; read from disk when sliced."""
        return SequenceArray(self, "document")

    @cached_property
    def keep(self) -> "SequenceArray":
        """Which positions have a row, bool [sequence, position]; read from disk when sliced."""
        return SequenceArray(self, "keep")

    @cached_property
    def split(self) -> NDArray[np.int8]:
        """Split of each sequence, int8 [sequence]: 0 train, 1 held out."""
        counts = [window.sequences for window in self.windows]
        numbers = [SPLITS.index(window.split) for window in self.windows]
        return np.repeat(np.array(numbers, np.int8), counts)

    def document_table(self) -> pa.Table:
        """Documents of the committed windows: document, key, title, split."""
        tables = []
        for number in range(len(self.windows)):
            path = self.path / DOCUMENTS / documents_part(number)
            try:
                tables.append(parquet.read_table(path, schema=DOCUMENT_SCHEMA))
            except (OSError, pa.ArrowInvalid) as error:
                raise ArtefactError(f"missing or damaged: {error}", where=str(path)) from error
        return pa.concat_tables(tables) if tables else DOCUMENT_SCHEMA.empty_table()

    def chunks(self, split: str) -> list[Chunk]:
        """Committed chunks of a split, in the order written."""
        chosen = [window for window in self.windows if window.split == _split(split)]
        return [chunk for window in chosen for chunk in window.chunks(self._chunk_rows)]

    @cached_property
    def _rows_of_chunk(self) -> dict[int, int]:
        return {chunk.index: chunk.rows for split in SPLITS for chunk in self.chunks(split)}

    def read_chunk(
        self, site: str, chunk_index: int
    ) -> tuple[BFloat16[Tensor, "rows d_in"], Int64[Tensor, " rows"]]:
        """Activations of a chunk and the flat token (sequence * context + position) of each row.

        Raises InputError for a chunk that is not committed, ArtefactError for one that is missing
        or damaged.
        """
        d_in, rows = self.d_in(site), self._rows_of_chunk.get(chunk_index)
        if rows is None:
            raise InputError(
                "no such committed chunk", where=str(self.path), given=chunk_index,
                allowed=f"0 to {max(self._rows_of_chunk, default=-1)}",
            )  # fmt: skip
        bits = self._read_file(site, (chunk_index, 0), np.uint16, (self._chunk_rows, d_in))
        row_token = self._read_file("row_token", (chunk_index,), np.int64, (self._chunk_rows,))
        x = torch.from_numpy(bits[:rows]).view(torch.bfloat16)
        return x, torch.from_numpy(row_token[:rows])

    def _read_file(
        self, array: str, chunk: tuple[int, ...], dtype: type, shape: tuple[int, ...]
    ) -> NDArray[Any]:
        """One chunk file, straight into memory, its checksum verified.

        Four times as fast as through Zarr, and a chunk that is not there is found: Zarr would read
        it as fill values.
        """
        path = self.path.joinpath(GROUP, array, "c", *map(str, chunk))
        try:
            content = np.fromfile(path, np.uint8)
        except OSError as error:
            raise ArtefactError(
                f"chunk {chunk[0]} of {array} is missing or unreadable", where=str(path)
            ) from error
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        data = content[:-4]
        if len(data) != size or google_crc32c.value(cast(bytes, data)) != int.from_bytes(
            content[-4:].tobytes(), "little"
        ):
            raise ArtefactError(
                f"chunk {chunk[0]} of {array} is damaged: its checksum does not match",
                where=str(path),
            )
        return data.view(np.dtype(dtype).newbyteorder("<")).reshape(shape)

    def verify(self) -> int:
        """Read and check every committed chunk and document list; how many chunks there were.

        Raises ArtefactError naming the first that is missing or damaged.
        """
        checked = 0
        for chunk in self._rows_of_chunk:
            for site in self.sites:
                self.read_chunk(site, chunk)
                checked += 1
        per_chunk = int(self.manifest["sequences_per_window"])
        for number in range(-(-self.n_sequences // per_chunk)):
            shape = (per_chunk, self.context)
            for name, dtype in (("tokens", np.int32), ("document", np.int32), ("keep", np.bool_)):
                self._read_file(name, (number, 0), dtype, shape)
            self._read_file("split", (number,), np.int8, (per_chunk,))
            checked += 4
        self.document_table()
        return checked


class SequenceArray:
    """An array [sequence, position] of a store's committed sequences, read when indexed.

    Index it as numpy: a number, a slice, numbers, or a mask over sequences; `np.asarray` reads all.
    """

    def __init__(self, store: ActivationStore, name: str) -> None:
        import zarr

        self._where = str(store.path / GROUP / name)
        try:
            array: Any = zarr.open_array(self._where, mode="r")
        except (OSError, ValueError, KeyError) as error:
            raise ArtefactError("missing or damaged", where=self._where) from error
        self._array = array
        self.shape = (store.n_sequences, store.context)
        self.dtype: np.dtype = array.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | slice | Sequence[int] | NDArray) -> NDArray[Any]:
        if isinstance(key, slice):
            first, last, step = key.indices(len(self))
            return self._read(slice(first, max(first, last)))[::step] if step > 0 else self[:][key]
        wanted = np.arange(len(self))[key]
        if wanted.ndim == 0:
            return self._read(slice(int(wanted), int(wanted) + 1))[0]
        return self._read(wanted)

    def _read(self, part: slice | NDArray[np.int64]) -> NDArray[Any]:
        try:
            found = np.asarray(self._array.oindex[part])
        except ValueError as error:
            raise ArtefactError(f"damaged: {error}", where=self._where) from error
        if found.dtype != np.bool_ and (found == -1).any():
            raise ArtefactError("a chunk is missing", where=self._where)
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        del copy
        return np.asarray(self[:], dtype=dtype)


def documents_part(window: int) -> str:
    """File name of one window's list of documents."""
    return f"part-{window:06d}.parquet"


def _split(split: str) -> str:
    if split not in SPLITS:
        raise InputError("no such split", where="split", given=split, allowed=SPLITS)
    return split
