"""Documents to fixed token sequences: tokenised in batches, joined by EOS, cut to the context."""

import hashlib
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activations.corpora.documents import Document
from activations.models.language import Model
from activations.models.tokenizer import LONG_CHARACTERS, encoded_in_pieces
from saescope.errors import InputError

JOINED, SEPARATE = "joined", "separate"
_BATCH_DOCUMENTS = 64
_BATCH_CHARACTERS = 1 << 20

Described = tuple[Any, ...]
"""What is said of a document: id, key, title, and its number where documents are told apart."""


_Portion = tuple[list[Document], list[NDArray[np.int32]]]
"""Some documents, and tokens of each."""


@dataclass(frozen=True)
class Sequences:
    """Some packed sequences of one split, and the documents that begin in them."""

    tokens: NDArray[np.int32]
    """[sequence, position]"""
    document: NDArray[np.int32]
    """[sequence, position]: id of the document of each token; -1 where a sequence is filled up."""
    described: list[Described]
    """What is said of each document that first appears here."""
    inputs: list[Any] | None = None
    """What each sequence is computed from, where that is not its tokens."""
    place: dict[str, Any] | None = None
    """Where to go on from to have these sequences again; None if reading has to begin anew."""

    def positions(self, candidates: int, kept: int) -> dict[str, int]:
        """How many positions are kept, and how many are left out for each reason.

        Args: candidates are those that are neither first in a sequence nor special tokens.
        """
        padding = int((self.document < 0).sum())
        special = self.tokens.size - len(self.tokens) - padding - candidates
        return {
            "kept": kept,
            "first": len(self.tokens),
            "special": special,
            "padding": padding,
            "outliers": candidates - kept,
        }


@dataclass
class PackingCounts:
    """What packing has read so far; the hashes cover every text, in order."""

    documents: int = 0
    tokens: int = 0
    dropped_tokens: int = 0
    """Tokens of the ragged end that fill no sequence."""
    unused_documents: int = 0
    unused_tokens: int = 0
    """What was read, or counted, after the last sequence that was asked for."""
    empty_documents: int = 0
    """Records without text, which are left out."""
    duplicate_documents: int = 0
    """Documents left out because their text was there before."""
    replaced_documents: int = 0
    """Documents in which (or in whose titles) halves of surrogate pairs were replaced by question
    marks."""
    sources: list[tuple[int, int]] = field(default_factory=list)
    """Documents and bytes of UTF-8 of each source of a mixed corpus."""
    chain: str = ""
    """sha256 of the chain so far and the sha256 of a text: unlike `digest` it can be stored."""
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def add(self, document: Document, tokens: int) -> None:
        """Count a document that was made tokens of."""
        data = document.text.encode()
        self.documents += 1
        self.tokens += tokens
        self.replaced_documents += document.replaced
        self.digest.update(data + b"\0")
        link = hashlib.sha256(data).digest()
        self.chain = hashlib.sha256(bytes.fromhex(self.chain) + link).hexdigest()
        missing = document.member + 1 - len(self.sources)
        self.sources = [*self.sources, *[(0, 0)] * missing]
        count, size = self.sources[document.member]
        self.sources[document.member] = (count + 1, size + len(data))

    def stored(self) -> dict[str, Any]:
        """All but the digest, JSON-able."""
        return {name: value for name, value in vars(self).items() if name != "digest"}


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

    def __init__(self, payload: int, bos: int | None, place: Mapping[str, Any] | None) -> None:
        self._payload, self._bos = payload, bos
        self.tokens = np.empty(0, np.int32)
        self._ids = np.empty(0, np.int32)
        self._waiting: list[Described] = []
        self._borders: deque[_Border] = deque()
        self._taken = int(place["taken"]) if place else 0
        self._skip = int(place["skip"]) if place else 0
        self._described = int(place["described"]) if place else -1
        self.sequences = int(place["sequences"]) if place else 0

    def border(self, first: int, reader: Any) -> None:
        """A batch of documents begins here."""
        self._borders.append(_Border(self._taken + len(self.tokens), first, reader))

    def describe(self, batch: list[Described]) -> None:
        """Say what there is to say of the documents that follow."""
        self._waiting += [entry for entry in batch if entry[0] > self._described]

    def extend(self, numbers: Sequence[int], parts: Sequence[NDArray[np.int32]]) -> None:
        """Add tokens of documents with these numbers, -1 - token where it is filled up."""
        flat = np.concatenate(parts)
        ids = np.repeat(np.array(numbers, np.int32), [len(part) for part in parts])
        ids[flat < 0] = -1
        skip = min(self._skip, len(flat))
        self._skip, self._taken = self._skip - skip, self._taken + skip
        self.tokens = np.concatenate([self.tokens, np.where(flat < 0, -1 - flat, flat)[skip:]])
        self._ids = np.concatenate([self._ids, ids[skip:]])

    def cut(self, n: int) -> Sequences:
        """The next n sequences."""
        place, size = self._place(), n * self._payload
        parts = [part[:size].reshape(n, self._payload) for part in (self.tokens, self._ids)]
        self.tokens, self._ids = self.tokens[size:], self._ids[size:]
        if self._bos is not None:
            parts[0] = np.insert(parts[0], 0, self._bos, axis=1)
            parts[1] = np.insert(parts[1], 0, parts[1][:, 0], axis=1)
        self._described = max(self._described, int(parts[1].max()))
        begun = [entry for entry in self._waiting if entry[0] <= self._described]
        self._waiting = self._waiting[len(begun) :]
        self._taken += size
        self.sequences += n
        return Sequences(parts[0], parts[1], begun, place=place)

    def _place(self) -> dict[str, Any] | None:
        """The last border from which on all that is needed for the next sequence is read again."""
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


def pack(
    documents: Iterable[Document],
    model: Model,
    *,
    context: int,
    per_group: int,
    counts: PackingCounts,
    limit: int | None = None,
    packing: str = JOINED,
    prepend_bos: bool | None = None,
    describe: Callable[[Document], Described] = lambda d: (d.id, d.key, d.title),
    state: Callable[[], Any] = lambda: None,
    place: Mapping[str, Any] | None = None,
    to_end: bool = False,
) -> Iterator[Sequences]:
    """Groups of `per_group` packed sequences, the last one smaller; a ragged end is dropped.

    Each sequence starts with BOS where the model uses one, or as prepend_bos says; each document
    ends with EOS where the tokenizer has one. BOS counts to the document of the token after it.
    With packing "separate" no sequence has tokens of two documents: a document's last sequence is
    filled up with EOS, and none is dropped.

    Args: limit is the number of sequences after which reading stops, or, with to_end, after which
    the documents are only counted. describe says what there is to
    say of a document. state is asked at each border between batches of documents, and place is that
    of a group in an earlier reading, whose documents begin at its border: to go on from there.

    Raises InputError for packing "separate" without an EOS, or a BOS that there is not.
    """
    bos = _bos(model, prepend_bos)
    payload = context - (bos is not None)
    flow = _Flow(payload, bos, place)
    finish = _finisher(model.eos_token_id, payload, packing)
    most = sys.maxsize if limit is None else limit

    def size() -> int:
        return min(per_group, most - flow.sequences)

    batches = _batches(documents, state)
    for batch, reader in batches:
        flow.border(batch[0].id, reader)
        flow.describe([describe(document) for document in batch])
        with closing(_tokenised(batch, model, finish, counts)) as portions:
            for found, parts in portions:
                flow.extend([document.id for document in found], parts)
                while size() and len(flow.tokens) >= payload * size():
                    yield flow.cut(size())
                if not size() and not to_end:
                    break  # in a long document, perhaps
        if not size():
            counts.unused_tokens = len(flow.tokens)
            for rest, _ in batches if to_end else ():
                counts.unused_documents += len(rest)
                for _, parts in _tokenised(rest, model, finish, PackingCounts()):
                    counts.unused_tokens += sum(int((ids >= 0).sum()) for ids in parts)
            return
    counts.dropped_tokens = len(flow.tokens) % payload
    if len(flow.tokens) >= payload:
        yield flow.cut(len(flow.tokens) // payload)


def _bos(model: Model, wanted: bool | None) -> int | None:
    """The token that each sequence starts with, if any."""
    if wanted is None or (wanted and model.bos_token_id is not None):
        return model.bos_token_id
    found = model.tokenizer.bos_token_id if wanted else None
    if wanted and found is None:
        raise InputError("this model's tokenizer has no BOS", where="prepend_bos", given=wanted)
    return found


def _tokenised(
    batch: Sequence[Document],
    model: Model,
    finish: "_Finish",
    counts: PackingCounts,
) -> Generator[_Portion, None, None]:
    """The tokens of a batch of documents, all at once, or of a long one piece by piece.

    Each document is counted when its last token, or the last that is wanted, was given.
    """
    short = [each for each in batch if each.tokens is None and len(each.text) <= LONG_CHARACTERS]
    texts = iter(model.tokenize_batch([each.text for each in short]) if short else ())
    together: list[tuple[Document, NDArray[np.int32]]] = []
    for document in batch:
        if document.tokens is not None:
            together.append((document, finish(document.tokens, 0)))
        elif len(document.text) <= LONG_CHARACTERS:
            together.append((document, finish(next(texts), 0)))
        else:
            yield from _counted(together, counts)
            together = []
            yield from _piece_by_piece(document, model, finish, counts)
    yield from _counted(together, counts)


def _counted(
    found: list[tuple[Document, NDArray[np.int32]]], counts: PackingCounts
) -> Iterator[_Portion]:
    for document, ids in found:
        counts.add(document, int((ids >= 0).sum()))
    if found:
        yield [document for document, _ in found], [ids for _, ids in found]


def _piece_by_piece(
    document: Document, model: Model, finish: "_Finish", counts: PackingCounts
) -> Iterator[_Portion]:
    pieces = encoded_in_pieces(document.text, model.tokenize_batch)
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
