"""ActivationStore: activations of one model over one corpus, read chunk by chunk.

A store is a folder, on disk or in an object store (`saescope.paths`):

    manifest.json            what was harvested from what, statistics; carries its own sha256
    windows.jsonl            every committed window, with the checksum of each chunk it wrote
    documents.parquet/       one Parquet file a window: document, key, title, split (and number,
                             which tells texts apart, where repetitions are left out)
    activations.zarr/        a Zarr v3 group, checksummed by crc32c, not compressed
        tokens, document     int32 [sequence, position]
        keep                 bool  [sequence, position], false where no row is stored
        split                int8  [sequence], 0 train, 1 held out
        row_token            int64 [row], sequence * context + position of each row; -1: no row
        <site>               uint16 [row, d_in], the bits of bfloat16
        <site>               float32 [row, d_in] instead, where rows are stored so
        <site>, <site>.scale int8 [row, d_in] and float32 [row] instead, in a harvest to int8;
                             neither in one that stores no activations: then they are computed by
                             the model when they are read (activations.recompute.computed_rows)

Rows of all sites share one order. A window of rows is of one split, fills whole chunks (the last
may be part empty) and is shuffled before it is cut into them, so a chunk is a fair sample of it.
docs/reference/harvests.md says what is checked when.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from activations.storage.chunk_files import (
    check_chunk,
    chunk_path,
    crc32c,
    not_the_one,
    read_chunk,
    read_slice,
)
from activations.storage.documents import read_documents
from activations.storage.layout import (
    DOCUMENTS,
    GROUP,
    METADATA,
    ROW_TOKEN,
    SEQUENCE_ARRAYS,
    SPLITS,
    checked_split,
    document_schema,
    documents_part,
    row_arrays,
    storage_of,
)
from activations.storage.ledger import LEDGER_SINCE, Chunk, Ledger, Piece
from activations.storage.mmap_rows import MappedRows, mappable
from activations.storage.row_formats import RowArray, StorageKind, floats, site_arrays
from activations.storage.row_source import RowSource, SiteStatistics
from activations.storage.sequence_array import SequenceArray
from saescope.artefact import read_manifest, sha256_json
from saescope.errors import ArtefactError, InputError
from saescope.integers import as_index
from saescope.paths import AnyPath, as_path, exists, is_remote

KIND, SCHEMA = "harvest", 2


class ActivationStore:
    """A harvest on disk.

    >>> store = ActivationStore.open("data/smollm2-135m-wikipedia")  # doctest: +SKIP
    >>> chunk = store.chunks("train")[0]  # doctest: +SKIP
    >>> x, row_token = store.read_chunk("blocks.9.hook_resid_post", chunk.index)  # doctest: +SKIP
    >>> x.shape, x.dtype  # doctest: +SKIP
    (torch.Size([16384, 576]), torch.bfloat16)
    """

    # a store knows neither models nor harvesting: the package hands it what it needs of them
    rows_by_model: "ClassVar[Callable[[ActivationStore], RowSource] | None]" = None
    """Makes the rows of a harvest that stores none."""
    store_arrays: "ClassVar[Callable[..., ActivationStore] | None]" = None
    """Makes a store of arrays."""
    verified_by: "ClassVar[Callable[[ActivationStore], int] | None]" = None
    """Reads and checks every file."""

    def __init__(self, path: AnyPath, manifest: dict[str, Any]) -> None:
        self.path, self._group = path, path / GROUP
        self.manifest = manifest
        self.ledger = Ledger.of(path, manifest)
        self.windows = self.ledger.windows
        self._chunk_rows = int(manifest["chunk_rows"])

    @classmethod
    def open(cls, path: str | AnyPath) -> "ActivationStore":
        """Open a store to read it, complete or not, by its folder or its URL.

        Raises ArtefactError if there is none, it is damaged or cannot be reached, or a newer
        saescope wrote it; InputError for a URL that cannot be used.
        """
        folder = as_path(path)
        store = cls.read(folder)
        if not exists(folder / GROUP / METADATA):
            raise ArtefactError(f"{GROUP} is missing or damaged", where=str(folder))
        return store

    @classmethod
    def read(cls, folder: AnyPath) -> "ActivationStore":
        """What manifest and ledger say, whatever is left of the rest."""
        manifest = read_manifest(folder, kind=KIND, schema=SCHEMA, sealed_since=LEDGER_SINCE)
        return cls(folder, manifest)

    @classmethod
    def from_arrays(
        cls, path: "str | Path | AnyPath", arrays: Mapping[str, Any], **options: Any
    ) -> "ActivationStore":
        """A store of activations that you have: {site: rows [n, d_in]}, the same rows at all sites.

        Rows are NumPy arrays (also mapped from a file) or tensors, of float32, float16 or bfloat16;
        each is kept digit for digit unless `storage` says otherwise. What was interrupted goes on
        from the last window committed; a complete store returns at once.

        Args:
            tokens: their token ids, [n], or [sequence, position] in the same order.
            documents: the document of each row [n], or of each sequence, as numbers or names; a
                document is wholly trained on or held out. Without it, blocks of `context` rows are.
            keep: bool, as tokens: which rows to store, where arrays have others in between.
            model: name of the model that they are of; needs tokens [sequence, position].
            context: rows of a sequence (128, or as tokens are).
            held_out_fraction: of the documents (0.05).
            storage: bfloat16, float32 or int8; chunk_rows, window_chunks, seed: as of a harvest.

        Raises InputError for wrong shapes, another dtype, rows that are not finite, or a folder
        that holds something else, with nothing written; ArtefactError if the disk is full.

        >>> import tempfile
        >>> x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
        >>> folder = tempfile.mkdtemp() + "/mine"
        >>> text = torch.arange(1000) // 50
        >>> store = ActivationStore.from_arrays(folder, {"mlp": x}, documents=text)
        reading the rows: ...
        >>> store.n_rows("train"), store.n_rows("held_out"), store.d_in("mlp")
        (950, 50, 8)
        """
        assert cls.store_arrays is not None, "set by the package"
        return cls.store_arrays(path, arrays, **options)

    @property
    def complete(self) -> bool:
        """Whether the harvest was finished."""
        return bool(self.manifest["complete"])

    @property
    def harvested(self) -> bool:
        """Whether a model computed the rows here; not if they were brought (`from_arrays`)."""
        return "brought" not in self.manifest["config"]

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites stored."""
        return tuple(self.manifest["sites"])

    @property
    def storage(self) -> StorageKind:
        """How rows are stored: bfloat16, float32, int8, or none: computed when they are read."""
        return storage_of(self.manifest)

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
        chosen = SPLITS if split is None else (checked_split(split),)
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
        config = {**self.manifest["config"], "out": None}
        facts = [self.manifest[name] for name in ("model", "corpus", "sites", "chunk_rows")]
        windows = [vars(window) for window in self.windows]
        appended = self.manifest.get("appended", [])
        more = [appended] if appended else []
        return sha256_json([config, *facts, windows, self.manifest["sums"], *more])

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
    def tokens(self) -> SequenceArray:
        """Token ids, int32 [sequence, position]; read from disk when sliced."""
        return self._sequence_array("tokens")

    @cached_property
    def document(self) -> SequenceArray:
        """Document of each token, int32 [sequence, position]; read from disk when sliced."""
        return self._sequence_array("document")

    @cached_property
    def keep(self) -> SequenceArray:
        """Which positions have a row, bool [sequence, position]; read from disk when sliced."""
        return self._sequence_array("keep")

    def _sequence_array(self, name: str) -> SequenceArray:
        return SequenceArray(
            lambda window: self.read_sequences(name, window),
            [window.first_sequence for window in self.windows],
            (self.n_sequences, self.context),
            SEQUENCE_ARRAYS[name],
            keep=is_remote(self.path),
        )

    @cached_property
    def split(self) -> NDArray[np.int8]:
        """Split of each sequence, int8 [sequence]: 0 train, 1 held out."""
        counts = [window.sequences for window in self.windows]
        numbers = [SPLITS.index(window.split) for window in self.windows]
        return np.repeat(np.array(numbers, np.int8), counts)

    def document_table(self) -> pa.Table:
        """Documents of the committed windows: document, key, title, split."""
        tables = [self.read_documents(number) for number in range(len(self.windows))]
        return pa.concat_tables(tables) if tables else document_schema(self.manifest).empty_table()

    def read_documents(self, window: int) -> pa.Table:
        """Documents that first appear in a window. Raises DamagedError."""
        path = self.path / DOCUMENTS / documents_part(window)
        return read_documents(
            path, document_schema(self.manifest), self.ledger.documents_crc(window)
        )

    def chunks(self, split: str) -> list[Chunk]:
        """Committed chunks of a split, in the order written."""
        chosen = [window for window in self.windows if window.split == checked_split(split)]
        return [chunk for window in chosen for chunk in window.chunks(self._chunk_rows)]

    @cached_property
    def _rows_of_chunk(self) -> dict[int, int]:
        return {chunk.index: chunk.rows for split in SPLITS for chunk in self.chunks(split)}

    def read_chunk(
        self, site: str, chunk_index: int
    ) -> tuple[Float[Tensor, "rows d_in"], Int64[Tensor, " rows"]]:
        """Activations of a chunk and the flat token (sequence * context + position) of each row.

        They are bfloat16, or float32 if they are stored as float32 or int8. Raises InputError for a
        chunk that is not committed, ArtefactError for one that is missing or damaged.
        """
        arrays = self.arrays_of(site)
        chunk_index = as_index(chunk_index, where="chunk_index")
        rows = self._rows_of_chunk.get(chunk_index)
        if rows is None:
            raise InputError(
                "no such committed chunk",
                where=str(self.path),
                given=chunk_index,
                allowed=f"0 to {max(self._rows_of_chunk, default=-1)}",
            )
        parts = [torch.from_numpy(self.read_rows(name, chunk_index)[:rows]) for name in arrays]
        row_token = torch.from_numpy(self.read_rows(ROW_TOKEN, chunk_index)[:rows])
        is_bits = parts[0].dtype == torch.uint16
        return (parts[0].view(torch.bfloat16) if is_bits else floats(parts)), row_token

    def arrays_of(self, site: str) -> dict[str, RowArray]:
        """The arrays of a site's rows, as they are read. Raises InputError if it is not stored."""
        # what is computed when it is read is given as it would be stored
        storage = "bfloat16" if self.storage == "none" else self.storage
        return site_arrays(site, self.d_in(site), storage)

    @cached_property
    def _row_arrays(self) -> dict[str, RowArray]:
        return row_arrays(self.manifest)

    @cached_property
    def _computed(self) -> RowSource:
        assert ActivationStore.rows_by_model is not None, "set by the package"
        return ActivationStore.rows_by_model(self)

    def read_rows(self, array: str, chunk: int, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """A committed chunk of row_token, int64 [row], or of an array of a site (`arrays_of`).

        It is read into `out` if given, of the chunk's shape and dtype. Raises DamagedError if it is
        missing, damaged, or not the one that was committed.
        """
        if self.storage == "none" and array != ROW_TOKEN:
            values = self._computed.chunk(array, chunk)
            if out is not None:
                out[:] = values
            return values if out is None else out
        dtype, tail, _ = self._row_arrays[array]
        crc = self.ledger.rows_crc(array, chunk)
        shape = (self._chunk_rows, *tail)
        path = self._row_path(array, chunk)
        return read_chunk(path, f"chunk {chunk} of {array}", dtype, shape, crc, out)

    def check_rows(self, array: str, chunk: int) -> None:
        """Read a stored chunk of an array as `read_rows` does, for its checksum alone."""
        nbytes = self._chunk_rows * self._row_arrays[array].nbytes
        path, crc = self._row_path(array, chunk), self.ledger.rows_crc(array, chunk)
        check_chunk(path, f"chunk {chunk} of {array}", nbytes, crc)

    def read_slice(self, array: str, chunk: int, first: int, out: NDArray[Any]) -> None:
        """Put rows of a chunk from number `first` on into `out`; `check_rows` is to come before."""
        read_slice(self._row_path(array, chunk), f"chunk {chunk} of {array}", first, out)

    def map_rows(self, array: str) -> MappedRows | None:
        """An array's rows by `show`, without copying; None where this store cannot do that.

        `check_rows` is to come before.
        """
        dtype, tail, _ = described = self._row_arrays[array]
        chunks, nbytes = self._rows_of_chunk, self._chunk_rows * described.nbytes
        if not chunks or not mappable(self._row_path(array, next(iter(chunks))), nbytes):
            return None
        return MappedRows(
            array,
            max(chunks) + 1,
            self._chunk_rows,
            tail,
            dtype,
            lambda chunk: self._row_path(array, chunk),
        )

    def _row_path(self, array: str, chunk: int) -> AnyPath:
        return chunk_path(self._group, array, chunk, 1 + len(self._row_arrays[array].tail))

    def read_sequences(self, array: str, window: int) -> NDArray[Any]:
        """One window's part of an array [sequence, ...].

        Raises DamagedError if a chunk is missing, damaged, or not the one that was committed.
        """
        pieces = self.windows[window].pieces(int(self.manifest["sequences_per_window"]))
        return np.concatenate([self.read_piece(array, window, piece) for piece in pieces])

    def read_piece(self, array: str, window: int, piece: Piece) -> NDArray[Any]:
        """The part of a window's sequences that is in one chunk. Raises DamagedError."""
        whole = self.read_sequence_chunk(array, piece.chunk)
        part = whole[piece.start : piece.start + piece.sequences]
        expected = self.ledger.sequences_crc(array, window, piece)
        if expected is not None and crc32c(part) != expected:
            path = self.sequence_chunk_path(array, piece.chunk)
            raise not_the_one(f"chunk {piece.chunk} of {array}", path)
        return part

    def read_sequence_chunk(self, array: str, chunk: int) -> NDArray[Any]:
        """A chunk of an array [sequence, ...] with what may lie beyond the committed sequences."""
        per_chunk = int(self.manifest["sequences_per_window"])
        shape = (per_chunk,) if array == "split" else (per_chunk, self.context)
        path = self.sequence_chunk_path(array, chunk)
        return read_chunk(path, f"chunk {chunk} of {array}", SEQUENCE_ARRAYS[array], shape, None)

    def sequence_chunk_path(self, array: str, chunk: int) -> AnyPath:
        """File of a chunk of an array [sequence, ...]."""
        return chunk_path(self.path / GROUP, array, chunk, 1 if array == "split" else 2)

    def verify(self) -> int:
        """Read and check every file of the store; how many there were.

        Raises ArtefactError that names each one that is missing, damaged, swapped or foreign.
        `activations.storage.verify.examine` gives the same as a list, `saescope doctor` prints it.
        """
        assert ActivationStore.verified_by is not None, "set by the package"
        return ActivationStore.verified_by(self)
