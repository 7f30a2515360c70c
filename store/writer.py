"""Writing a feature store: rows are added in any order and in pieces; `finish` makes the file."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from saescope.artefact import atomic_path
from saescope.errors import ArtefactError, InputError
from saescope.integers import as_index
from saescope.leftovers import SCRATCH
from saescope.progress import Progress
from store import build
from store.checking import STORE, plain_column
from store.columns import column, plain_values, same_length, within
from store.database import (
    COUNTED,
    FEATURE_COLUMNS,
    KIND,
    SCHEMA,
    clear_errors,
    connect,
    identifier,
    odd_path,
    quoted,
)
from store.fact_writer import FactWriter
from store.pictures import JPEG
from store.statement_progress import can_be_watched

_BUFFERED_ROWS = 1 << 20


class StoreWriter(FactWriter):
    """Builds a feature store beside `path` and renames it into place when it is finished.

    meta: what the store is about, JSON-able values (name, model, site, metrics, ...).
    Leaving the `with` block by an error leaves no file, and a store that was there stays; one that
    is there is replaced only with `replace`, and nothing else that is there ever is.

    >>> with StoreWriter("features.duckdb", meta={}, d_sae=8, context=4) as w:  # doctest: +SKIP
    ...     w.add_vocabulary(["a", "b"])
    ...     w.add_sequences(0, tokens, document, keep, split)
    ...     w.add_activations(position, feature, activation)
    ...     w.finish()
    """

    def __init__(
        self,
        path: str | Path,
        *,
        meta: Mapping[str, Any],
        d_sae: int,
        context: int,
        memory_limit: str = "1500MB",
        threads: int | None = None,
        replace: bool = False,
    ) -> None:
        d_sae = as_index(d_sae, where="d_sae", low=1, high=2**31 - 1)
        context = as_index(context, where="context", low=1, high=2**31 - 1)
        own = {"kind": KIND, "schema": SCHEMA, "d_sae": d_sae, "context": context}
        clash = sorted((own.keys() | COUNTED) & meta.keys())
        if clash:
            raise InputError("these keys are set by the store itself", where="meta", given=clash)
        try:
            self._meta = {k: json.dumps(v, allow_nan=False) for k, v in {**own, **meta}.items()}
        except (TypeError, ValueError) as error:
            raise InputError(f"cannot be written as JSON: {error}", where="meta") from None
        self.path = Path(path)
        self.d_sae = d_sae
        self.context = context
        self.n_activations = 0
        self._memory_limit = memory_limit
        self._replace = replace
        most = min(os.cpu_count() or 1, 8)
        self._threads = most if threads is None else as_index(threads, where="threads", low=1)
        self._buffer: list[tuple[np.ndarray, ...]] = []
        self._buffered = 0
        self._columns: dict[str, pa.ChunkedArray] = {}
        self._n_vocabulary = 0
        self._has_map = False
        self._finished = False

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(clear_errors(self.path))
            self._target = stack.enter_context(atomic_path(self.path, STORE, replace=self._replace))
            # DuckDB misreads some paths: such a store is built in the folder for temporary files
            odd = odd_path(self._target)
            self._scratch = self._target.with_name(SCRATCH)
            if odd:
                made = stack.enter_context(tempfile.TemporaryDirectory(prefix=".building-"))
                self._scratch = Path(made) / SCRATCH
            self._scratch.mkdir()
            if odd_path(self._scratch):
                raise ArtefactError(
                    "DuckDB cannot build a store below a folder with ? or \\ in its name",
                    where=str(self._scratch),
                )
            self._built = self._scratch / "built" if odd else self._target
            spill = self._scratch / "spill"
            self._con = connect(threads=self._threads, memory_limit=self._memory_limit, spill=spill)
            stack.callback(self._con.close)
            can_be_watched(self._con)
            schema = (Path(__file__).parent / "schema.sql").read_text(encoding="utf-8")
            # The same tables twice: `staging` as the rows come, `db` sorted, which is what stays.
            for name, file in (("staging", self._scratch / "staging"), ("db", self._built)):
                self._con.execute(f"ATTACH {quoted(file)} AS {name}; USE {name}; {schema}")
            self._con.execute("USE memory")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and not self._finished:
            error = RuntimeError("StoreWriter: left without finish(), so nothing was written")
            self._stack.__exit__(RuntimeError, error, None)
            raise error
        self._stack.__exit__(kind, error, trace)

    def _insert(self, table: str, rows: pa.Table) -> None:
        self._con.register("incoming", rows)
        names = ", ".join(map(identifier, rows.column_names))
        self._con.execute(f"INSERT INTO staging.{table} ({names}) SELECT {names} FROM incoming")
        self._con.unregister("incoming")

    def add_vocabulary(self, texts: Iterable[str | bytes]) -> None:
        """Every token's text, by token id; call once.

        A token that is part of a character is given as bytes, or as text with surrogate escapes
        (`b.decode("utf-8", "surrogateescape")`): readers then decode whole windows together.
        """
        if self._n_vocabulary:
            raise InputError("was already given", where="vocabulary")
        raw = [t if isinstance(t, bytes) else t.encode("utf-8", "surrogateescape") for t in texts]
        shown = [b.decode("utf-8", "replace") for b in raw]
        partial = [None if s.encode() == b else b for s, b in zip(shown, raw, strict=True)]
        if not raw:
            raise InputError("has no tokens", where="vocabulary")
        ids = pa.array(range(len(raw)), pa.int32())
        table = {"token_id": ids, "text": shown, "bytes": pa.array(partial, pa.binary())}
        self._insert("vocabulary", pa.table(table))
        self._n_vocabulary = len(raw)

    def add_sequences(
        self, first: int, tokens: ArrayLike, document: ArrayLike, keep: ArrayLike, split: ArrayLike
    ) -> None:
        """Token sequences number first, first + 1, ...: tokens, document, keep [n, context].

        split [n]: 0 train, 1 held out. document may be -1 where a token is in no document. Give
        only sequences whose activations are given: densities are over all their kept positions.
        """
        arrays = {"tokens": tokens, "document": document, "keep": keep}
        dtypes = {"tokens": "int32", "document": "int32", "keep": "bool"}
        chosen = column("split", split, np.int8)
        columns: dict[str, Any] = {}
        for name, values in arrays.items():
            array = np.ascontiguousarray(values, dtype=dtypes[name])
            if array.shape != (len(chosen), self.context):
                raise InputError(
                    "has a wrong shape",
                    where=name,
                    given=array.shape,
                    allowed=str((len(chosen), self.context)),
                )
            offsets = np.arange(len(chosen) + 1, dtype=np.int32) * self.context
            columns[name] = pa.ListArray.from_arrays(offsets, pa.array(array.ravel()))
        first = as_index(first, where="first", low=0, high=2**31 - 1)
        numbers = np.arange(first, first + len(chosen), dtype=np.int64)
        self._insert("sequence", pa.table({"sequence": numbers, **columns, "split": chosen}))

    def add_documents(self, documents: pa.Table) -> None:
        """The documents' columns document (number), key, title, split (0 or 1, or its name)."""
        wanted = ("document", "key", "title", "split")
        missing = [name for name in wanted if name not in documents.column_names]
        if missing:
            raise InputError("columns are missing", where="documents", given=missing)
        table = documents.select(list(wanted))
        if not pa.types.is_integer(table.schema.field("split").type):
            codes = {"train": 0, "held_out": 1}
            names = table.column("split").to_pylist()
            wrong = sorted(set(names) - codes.keys(), key=str)
            if wrong:
                raise InputError(
                    "unknown split", where="documents.split", given=wrong, allowed=codes
                )
            split = pa.array([codes[name] for name in names], pa.int8())
            table = table.set_column(3, "split", split)
        self._insert("document", table)

    def add_pictures(self, document: ArrayLike, images: Sequence[bytes]) -> None:
        """Small pictures of documents, as JPEG."""
        numbers = column("document", document, np.int32)
        same_length(document=numbers, image=np.empty(len(images)))
        if not all(image.startswith(JPEG) for image in images):
            raise InputError("is no JPEG", where="images")
        rows = {"document": numbers, "image": pa.array(images, pa.binary())}
        self._insert("picture", pa.table(rows))

    def add_activations(
        self, position: ArrayLike, feature: ArrayLike, activation: ArrayLike
    ) -> None:
        """Activations above zero, [n] each; position = sequence * context + index in it."""
        at = column("position", position, np.int64)
        which = column("feature", feature, np.int32)
        value = column("activation", activation, np.float32)
        same_length(position=at, feature=which, activation=value)
        if not at.size:
            return
        within("feature", which, self.d_sae)
        if at.min() < 0:
            raise InputError("out of range", where="position", given=int(at.min()), allowed=">= 0")
        if not (np.isfinite(value).all() and value.min() > 0):
            wrong = value[~(np.isfinite(value) & (value > 0))][0]
            raise InputError(
                "only finite activations above zero are stored",
                where="activation",
                given=float(wrong),
            )
        self._buffer.append((at.copy(), which.copy(), value.copy()))
        self._buffered += len(at)
        self.n_activations += len(at)
        if self._buffered >= _BUFFERED_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._buffered:
            columns = [np.concatenate(pieces) for pieces in zip(*self._buffer, strict=True)]
            names = ["position", "feature", "activation"]
            self._insert(
                "activation_by_position", pa.table([pa.array(c) for c in columns], names=names)
            )
        self._buffer.clear()
        self._buffered = 0

    def add_features(self, columns: pa.Table | Mapping[str, ArrayLike]) -> None:
        """More columns of the feature table, d_sae values each, in the order of the features."""
        if isinstance(columns, Mapping):
            arrays = {name: pa.array(np.asarray(values)) for name, values in columns.items()}
            table = pa.table(arrays)
        else:
            table = columns
        for name in table.column_names:
            where = f"features.{name}"
            if name in FEATURE_COLUMNS or name in self._columns:
                raise InputError("this column is there already", where=where)
            if not plain_column(name, "FLOAT"):
                raise InputError("is no plain lower-case column name", where=where)
            if not plain_values(table.schema.field(name).type):
                raise InputError(
                    "holds no plain values",
                    where=where,
                    given=str(table.schema.field(name).type),
                    allowed="numbers, truth values or text",
                )
            if len(table) != self.d_sae:
                raise InputError(
                    "wrong length", where=where, given=len(table), allowed=str(self.d_sae)
                )
            self._columns[name] = table.column(name)

    def add_logits(
        self,
        feature: ArrayLike,
        sign: ArrayLike,
        rank: ArrayLike,
        token_id: ArrayLike,
        value: ArrayLike,
    ) -> None:
        """Tokens that a feature raises (sign +1) and lowers (-1) most; rank 0 is the strongest."""
        columns = {
            "feature": column("feature", feature, np.int32),
            "sign": column("sign", sign, np.int8),
            "rank": column("rank", rank, np.int16),
            "token_id": column("token_id", token_id, np.int32),
            "value": column("value", value, np.float32),
        }
        same_length(**columns)
        within("feature", columns["feature"], self.d_sae)
        if not np.isin(columns["sign"], (-1, 1)).all():
            raise InputError("must be +1 or -1", where="sign")
        self._insert("logit", pa.table(columns))

    def add_neighbours(
        self, feature: ArrayLike, rank: ArrayLike, other: ArrayLike, cosine: ArrayLike
    ) -> None:
        """Features with the nearest decoder directions; rank 0 is the nearest."""
        columns = {
            "feature": column("feature", feature, np.int32),
            "rank": column("rank", rank, np.int16),
            "other": column("other", other, np.int32),
            "cosine": column("cosine", cosine, np.float32),
        }
        same_length(**columns)
        within("feature", columns["feature"], self.d_sae)
        within("other", columns["other"], self.d_sae)
        self._insert("neighbour", pa.table(columns))

    def add_map(self, x: ArrayLike, y: ArrayLike) -> None:
        """Where each feature lies on a map of decoder directions, d_sae values each; call once."""
        if self._has_map:
            raise InputError("was already given", where="map")
        columns = {"x": column("x", x, np.float32), "y": column("y", y, np.float32)}
        for name, values in columns.items():
            if len(values) != self.d_sae or not np.isfinite(values).all():
                raise InputError("has to have a finite number a feature", where=f"map.{name}")
        self._has_map = True
        self._insert("map_point", pa.table({"feature": np.arange(self.d_sae), **columns}))

    def finish(self) -> dict[str, int]:
        """Check, sort and summarise everything; returns the number of rows of each table.

        Raises InputError if what was added does not fit together: no vocabulary, a token without a
        text, a sequence or an activation given twice, an activation at a position that is not kept.
        """
        self._flush()
        if not self._n_vocabulary:
            raise InputError("add_vocabulary was not called", where="vocabulary")
        job = build.BuildJob(
            con=self._con,
            scratch=self._scratch,
            d_sae=self.d_sae,
            context=self.context,
            n_activations=self.n_activations,
            n_vocabulary=self._n_vocabulary,
            columns=self._columns,
            meta=self._meta,
        )
        total = 3 * self.n_activations
        with Progress("building the store", total, "steps") as progress:
            rows = build.build_tables(job, progress)
        if self._built != self._target:
            shutil.copyfile(self._built, self._target)
        self._finished = True
        return rows
