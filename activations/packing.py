"""Documents to fixed token sequences: tokenised in batches, joined by EOS, cut to the context."""

import hashlib
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activations.corpora import Document
from activations.models import Model
from saescope.errors import InputError

JOINED, SEPARATE = "joined", "separate"
_BATCH_DOCUMENTS = 64
_BATCH_CHARACTERS = 1 << 20

Described = tuple[Any, ...]
"""What is said of a document: id, key, title, and its number where documents are told apart."""


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
    """Documents in which halves of surrogate pairs were replaced by question marks."""
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

    def extend(self, parts: list[NDArray[np.int32]], batch: list[Described]) -> None:
        """Add a batch: of each document its tokens, -1 - token where it is filled up."""
        flat = np.concatenate(parts)
        numbers = np.array([entry[0] for entry in batch], np.int32)
        ids = np.repeat(numbers, [len(part) for part in parts])
        ids[flat < 0] = -1
        skip = min(self._skip, len(flat))
        self._skip, self._taken = self._skip - skip, self._taken + skip
        self.tokens = np.concatenate([self.tokens, np.where(flat < 0, -1 - flat, flat)[skip:]])
        self._ids = np.concatenate([self._ids, ids[skip:]])
        self._waiting += [entry for entry in batch if entry[0] > self._described]

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
    describe: Callable[[Document], Described] = lambda d: (d.id, d.key, d.title),
    state: Callable[[], Any] = lambda: None,
    place: Mapping[str, Any] | None = None,
    to_end: bool = False,
) -> Iterator[Sequences]:
    """Groups of `per_group` packed sequences, the last one smaller; a ragged end is dropped.

    Each sequence starts with BOS where the model uses one; each document ends with EOS where the
    tokenizer has one. BOS counts to the document of the token after it. With packing "separate" no
    sequence has tokens of two documents: a document's last sequence is filled up with EOS, and none
    is dropped.

    Args: limit is the number of sequences after which reading stops, or, with to_end, after which
    the documents are only counted. describe says what there is to
    say of a document. state is asked at each border between batches of documents, and place is that
    of a group in an earlier reading, whose documents begin at its border: to go on from there.

    Raises InputError for packing "separate" without an EOS.
    """
    payload = context - (model.bos_token_id is not None)
    flow = _Flow(payload, model.bos_token_id, place)
    finish = _finisher(model.eos_token_id, payload, packing)
    most = sys.maxsize if limit is None else limit

    def size() -> int:
        return min(per_group, most - flow.sequences)

    batches = _batches(documents, state)
    for batch, reader in batches:
        flow.border(batch[0].id, reader)
        found = [finish(ids) for ids in model.tokenize_batch([d.text for d in batch])]
        for document, ids in zip(batch, found, strict=True):
            counts.add(document, int((ids >= 0).sum()))
        flow.extend(found, [describe(document) for document in batch])
        while size() and len(flow.tokens) >= payload * size():
            yield flow.cut(size())
        if not size():
            counts.unused_tokens = len(flow.tokens)
            for rest, _ in batches if to_end else ():
                counts.unused_documents += len(rest)
                found = [finish(ids) for ids in model.tokenize_batch([d.text for d in rest])]
                counts.unused_tokens += sum(int((ids >= 0).sum()) for ids in found)
            return
    counts.dropped_tokens = len(flow.tokens) % payload
    if len(flow.tokens) >= payload:
        yield flow.cut(len(flow.tokens) // payload)


def _finisher(
    end: int | None, payload: int, packing: str
) -> Callable[[list[int]], NDArray[np.int32]]:
    """What makes a document's flow of its tokens; -1 - token is one that fills up."""
    eos = [] if end is None else [end]
    if packing == JOINED:
        return lambda ids: np.array([*ids, *eos], np.int32)
    if end is None:
        raise InputError(
            "this model's tokenizer has no EOS to fill sequences up with", where="packing",
            given=packing, allowed=JOINED,
        )  # fmt: skip

    def separate(ids: list[int]) -> NDArray[np.int32]:
        # a document that fills its last sequence gets no other one for its EOS alone
        whole = ids if ids and len(ids) % payload == 0 else [*ids, end]
        return np.array([*whole, *[-1 - end] * (-len(whole) % payload)], np.int32)

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
