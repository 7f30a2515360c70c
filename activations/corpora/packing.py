"""Documents to fixed token sequences: tokenised in batches, joined by EOS, cut to the context."""

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activations.corpora.documents import Document
from activations.corpora.long_texts import LONG_CHARACTERS, encoded_in_pieces
from activations.corpora.sequences import (
    JOINED,
    PLAIN,
    Described,
    PackingCounts,
    PackingOptions,
    Sequences,
)
from saescope.errors import InputError

_BATCH_DOCUMENTS = 64
_BATCH_CHARACTERS = 1 << 20


_Portion = tuple[list[Document], list[NDArray[np.int32]]]
"""Some documents, and tokens of each."""


@dataclass(frozen=True)
class _Border:
    """Where a batch of documents begins."""

    taken: int
    """tokens before it"""
    first: int
    """its first document"""
    reader: Any
    """what `state` said"""


class _Flow:
    """Tokens that wait to be cut into sequences, and the documents that are not described yet."""

    def __init__(self, payload: int, bos: int | None, cursor: Mapping[str, Any] | None) -> None:
        self._payload, self._bos = payload, bos
        self.tokens = np.empty(0, np.int32)
        self._ids = np.empty(0, np.int32)
        self._waiting: list[Described] = []
        self._borders: deque[_Border] = deque()
        self._taken = int(cursor["taken"]) if cursor else 0
        self._skip = int(cursor["skip"]) if cursor else 0
        self._described = int(cursor["described"]) if cursor else -1
        self.sequences = int(cursor["sequences"]) if cursor else 0

    def border(self, first: int, reader: Any) -> None:
        """A batch of documents begins here."""
        self._borders.append(_Border(self._taken + len(self.tokens), first, reader))

    def describe(self, batch: list[Described]) -> None:
        """Take note of what is to be stored of the documents that follow."""
        self._waiting += [entry for entry in batch if entry[0] > self._described]

    def extend(self, numbers: Sequence[int], arrays: Sequence[NDArray[np.int32]]) -> None:
        """Add tokens of documents with these numbers, -1 - token where it is filled up."""
        flat = np.concatenate(arrays)
        ids = np.repeat(np.array(numbers, np.int32), [len(array) for array in arrays])
        ids[flat < 0] = -1
        skip = min(self._skip, len(flat))
        self._skip, self._taken = self._skip - skip, self._taken + skip
        self.tokens = np.concatenate([self.tokens, np.where(flat < 0, -1 - flat, flat)[skip:]])
        self._ids = np.concatenate([self._ids, ids[skip:]])

    def cut(self, n: int) -> Sequences:
        """The next n sequences."""
        cursor, size = self._cursor(), n * self._payload
        arrays = [array[:size].reshape(n, self._payload) for array in (self.tokens, self._ids)]
        self.tokens, self._ids = self.tokens[size:], self._ids[size:]
        if self._bos is not None:
            arrays[0] = np.insert(arrays[0], 0, self._bos, axis=1)
            arrays[1] = np.insert(arrays[1], 0, arrays[1][:, 0], axis=1)
        self._described = max(self._described, int(arrays[1].max()))
        beginning = [entry for entry in self._waiting if entry[0] <= self._described]
        self._waiting = self._waiting[len(beginning) :]
        self._taken += size
        self.sequences += n
        return Sequences(arrays[0], arrays[1], beginning, cursor=cursor)

    def _cursor(self) -> dict[str, Any] | None:
        """The last batch of documents from which on the next sequences come out the same."""
        borders = self._borders
        while len(borders) > 1 and borders[1].taken <= self._taken:
            if self._waiting and self._waiting[0][0] < borders[1].first:
                break
            borders.popleft()
        if not borders or borders[0].reader is None:
            return None
        return {
            "taken": borders[0].taken,
            "skip": self._taken - borders[0].taken,
            "first": borders[0].first,
            "described": self._described,
            "sequences": self.sequences,
            "reader": borders[0].reader,
        }


Tokenize = Callable[[Sequence[str]], list[list[int]]]
"""Token ids of each of some texts, without special tokens."""


def pack(
    documents: Iterable[Document],
    tokenize: Tokenize,
    *,
    bos: int | None,
    eos: int | None,
    context: int,
    per_group: int,
    counts: PackingCounts,
    limit: int | None = None,
    packing: PackingOptions = PLAIN,
) -> Iterator[Sequences]:
    """Groups of `per_group` packed sequences, the last one smaller; a ragged end is dropped.

    Each sequence starts with `bos`, unless that is None; each document ends with `eos`, if there is
    one. BOS counts to the document of the token after it. With the packing "separate" no sequence
    has tokens of two documents: a document's last sequence is filled up with EOS, and none is
    dropped.

    Args: limit is the number of sequences after which reading stops, or, with packing.to_end, after
    which the documents are only counted.

    Raises InputError for packing "separate" without an EOS.
    """
    payload = context - (bos is not None)
    flow = _Flow(payload, bos, packing.cursor)
    finish = _finisher(eos, payload, packing.kind)
    most = sys.maxsize if limit is None else limit

    def size() -> int:
        return min(per_group, most - flow.sequences)

    batches = _batches(documents, packing.state)
    for batch, reader in batches:
        flow.border(batch[0].id, reader)
        flow.describe([packing.describe(document) for document in batch])
        with closing(_tokenised(batch, tokenize, finish, counts)) as portions:
            for found, arrays in portions:
                flow.extend([document.id for document in found], arrays)
                while size() and len(flow.tokens) >= payload * size():
                    yield flow.cut(size())
                if not size() and not packing.to_end:
                    break  # in a long document, perhaps
        if not size():
            counts.unused_tokens = len(flow.tokens)
            for rest, _ in batches if packing.to_end else ():
                counts.unused_documents += len(rest)
                for _, arrays in _tokenised(rest, tokenize, finish, PackingCounts()):
                    counts.unused_tokens += sum(int((ids >= 0).sum()) for ids in arrays)
            return
    counts.dropped_tokens = len(flow.tokens) % payload
    if len(flow.tokens) >= payload:
        yield flow.cut(len(flow.tokens) // payload)


def _tokenised(
    batch: Sequence[Document],
    tokenize: Tokenize,
    finish: "_Finish",
    counts: PackingCounts,
) -> Generator[_Portion, None, None]:
    """The tokens of a batch of documents, all at once, or of a long one piece by piece.

    Each document is counted when its last token, or the last that is wanted, was given.
    """
    short = [each for each in batch if each.tokens is None and len(each.text) <= LONG_CHARACTERS]
    texts = iter(tokenize([each.text for each in short]) if short else ())
    together: list[tuple[Document, NDArray[np.int32]]] = []
    for document in batch:
        if document.tokens is not None:
            together.append((document, finish(document.tokens, 0)))
        elif len(document.text) <= LONG_CHARACTERS:
            together.append((document, finish(next(texts), 0)))
        else:
            yield from _counted(together, counts)
            together = []
            yield from _piece_by_piece(document, tokenize, finish, counts)
    yield from _counted(together, counts)


def _counted(
    found: list[tuple[Document, NDArray[np.int32]]], counts: PackingCounts
) -> Iterator[_Portion]:
    for document, ids in found:
        counts.add(document, int((ids >= 0).sum()))
    if found:
        yield [document for document, _ in found], [ids for _, ids in found]


def _piece_by_piece(
    document: Document, tokenize: Tokenize, finish: "_Finish", counts: PackingCounts
) -> Iterator[_Portion]:
    pieces = encoded_in_pieces(document.text, tokenize)
    given, real = 0, 0
    ids = next(pieces)
    try:
        while (following := next(pieces, None)) is not None:
            given, real = given + len(ids), real + len(ids)
            yield [document], [np.array(ids, np.int32)]
            ids = following
        last = finish(ids, given)
        real += int((last >= 0).sum())
        yield [document], [last]
    finally:
        counts.add(document, real)


_Finish = Callable[[Sequence[int] | NDArray[np.int32], int], NDArray[np.int32]]


def _finisher(end: int | None, payload: int, packing: str) -> _Finish:
    """What makes the end of a document's flow of its last tokens, given how many were before.

    -1 - token is one that fills up.
    """
    eos = [] if end is None else [end]
    if packing == JOINED:
        return lambda ids, _: np.array([*ids, *eos], np.int32)
    if end is None:
        raise InputError(
            "this model's tokenizer has no EOS to fill sequences up with",
            where="packing",
            given=packing,
            allowed=JOINED,
        )

    def separate(ids: Sequence[int] | NDArray[np.int32], before: int) -> NDArray[np.int32]:
        total = before + len(ids)
        # a document that fills its last sequence gets no other one for its EOS alone
        whole = [*ids] if total and total % payload == 0 else [*ids, end]
        return np.array([*whole, *[-1 - end] * (-(before + len(whole)) % payload)], np.int32)

    return separate


def _batches(
    documents: Iterable[Document], state: Callable[[], Any]
) -> Iterator[tuple[list[Document], Any]]:
    """Documents in batches to tokenise, with what `state` says before each is read."""
    batch: list[Document] = []
    size, reader = 0, state()
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_CHARACTERS:
            yield batch, reader
            batch, size, reader = [], 0, state()
    if batch:
        yield batch, reader
