"""Where imported rows belong: sequence, position and split of each."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from activations.storage.arrays import RowsInMemory, as_column
from activations.storage.layout import SPLITS
from saescope.artefact import sha256_json
from saescope.errors import InputError
from saescope.integers import as_index

_CONTEXT = 128
_LARGEST = 2**31 - 1
_SCANNED = 1 << 20


class RowLayout:
    """Which row is at which position of which sequence, and which are held out."""

    def __init__(
        self,
        rows: int,
        tokens: Any,
        documents: Any,
        keep: Any,
        context: int | None,
        *,
        fraction: float,
        seed: int,
    ) -> None:
        self.rows, self.fraction = rows, fraction
        self.tokens = None if tokens is None else as_column(tokens, where="tokens")
        self.has_sequences = self.tokens is not None and self.tokens.ndim == 2
        self.context = self._checked_context(context)
        self._keep = None if keep is None else self._flat(as_column(keep, where="keep"), "keep")
        if self._keep is not None and self._keep.dtype != np.bool_:
            raise InputError("is not truth values", where="keep", given=str(self._keep.dtype))
        if self._keep is not None and not self._keep.any():
            raise InputError("keeps no row", where="keep")
        self.d_vocab = self._checked_tokens()
        self._of_rows(documents)
        held = np.zeros(len(self.names), np.bool_)
        count = round(fraction * len(held))
        if fraction and len(held) > 1:
            count = min(len(held) - 1, max(1, count))
        held[np.random.default_rng((seed, 2)).permutation(len(held))[:count]] = True
        self._held = held

    def _checked_context(self, context: int | None) -> int:
        if self.tokens is None or not self.has_sequences:
            return as_index(_CONTEXT if context is None else context, where="context", low=1)
        width = self.tokens.shape[1]
        if width == 0 or (context is not None and context != width):
            raise InputError(
                "is not the length of the sequences",
                where="context",
                given=context,
                allowed=str(width),
            )
        return width

    def _flat(self, values: NDArray[Any], where: str) -> NDArray[Any]:
        """A value a row; given a row each, or as the sequences are."""
        shapes: list[tuple[int, ...]] = [(self.rows,)]
        if self.has_sequences and self.rows % self.context == 0:
            shapes.append((self.rows // self.context, self.context))
        if values.shape not in shapes:
            raise InputError(
                "is not one for each row",
                where=where,
                given=f"shape {values.shape}",
                allowed=" or ".join(map(str, shapes)),
            )
        return values.reshape(-1)

    def _checked_tokens(self) -> int:
        """The flat token ids; how many there are at least. 0: no tokens are known."""
        if self.tokens is None:
            return 0
        if self.has_sequences and self.tokens.size != self.rows:
            raise InputError(
                "has another number of positions than there are rows: give all rows, and keep for "
                "those to store",
                where="tokens",
                given=self.tokens.size,
                allowed=str(self.rows),
            )
        self.tokens = self._flat(self.tokens, "tokens")
        if self.tokens.dtype.kind not in "iu":
            raise InputError("is not whole numbers", where="tokens", given=str(self.tokens.dtype))
        low, high = int(self.tokens.min()), int(self.tokens.max())
        if low < 0 or high >= _LARGEST:
            raise InputError(
                "no ids of tokens",
                where="tokens",
                given=f"{low} to {high}",
                allowed=f"0 to {_LARGEST - 1}",
            )
        return high + 1

    def _of_rows(self, documents: Any) -> None:
        """Number the documents; blocks of `context` rows where none are named."""
        self._document: NDArray[np.int32] | None = None
        if documents is None:
            starts = range(0, self.rows, self.context)
            self.names = [f"rows {n} to {min(n + self.context, self.rows) - 1}" for n in starts]
            self._first = np.arange(len(self.names), dtype=np.int64) * self.context
            return
        values = as_column(documents, where="documents")
        if self.has_sequences:
            if values.shape != (self.rows // self.context,):
                raise InputError(
                    "is not one for each sequence",
                    where="documents",
                    given=f"shape {values.shape}",
                    allowed=str((self.rows // self.context,)),
                )
            values = np.repeat(values, self.context)
        values = self._flat(values, "documents")
        names, first, number = np.unique(values, return_index=True, return_inverse=True)
        self.names, self._first = [str(name) for name in names], first
        self._document = number.astype(np.int32)

    def document(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """The document of rows, by number."""
        if self._document is None:
            return (rows // self.context).astype(np.int32)
        return self._document[rows]

    def kept(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of some rows are to be stored."""
        return np.ones(len(rows), np.bool_) if self._keep is None else self._keep[rows]

    def described(self, rows: NDArray[np.int64]) -> list[tuple[int, str, str]]:
        """(number, key, title) of the documents that begin in rows."""
        found = np.unique(self.document(rows))
        beginning = found[self._first[found] >= rows[0]]
        return [(int(n), self.names[n], "") for n in beginning]

    def following(self, split: str, start: int, count: int) -> NDArray[np.int64]:
        """Numbers of the next `count` rows of a split, from row `start` on, in order."""
        found, wanted = [np.empty(0, np.int64)], count
        for first in range(start, self.rows, _SCANNED):
            rows = np.arange(first, min(first + _SCANNED, self.rows))
            mine = rows[self._held[self.document(rows)] == (split != SPLITS[0])][:wanted]
            found.append(mine)
            wanted -= len(mine)
            if not wanted:
                break
        return np.concatenate(found)

    def sequences(self, split: str) -> int:
        """How many sequences a split has."""
        rows = sum(
            int((self._held[self.document(part)] == (split != SPLITS[0])).sum())
            for first in range(0, self.rows, _SCANNED)
            for part in [np.arange(first, min(first + _SCANNED, self.rows))]
        )
        return -(-rows // self.context)

    def facts(self) -> dict[str, Any]:
        """Hashes of what was given beside the rows."""
        given = {"tokens": self.tokens, "documents": self._document, "keep": self._keep}
        named = {} if self._document is None else {"document_names": sha256_json(self.names)}
        hashes = {
            name: RowsInMemory(values.reshape(-1, 1), where=name).sha256()
            for name, values in given.items()
            if values is not None
        }
        return {**hashes, **named}
