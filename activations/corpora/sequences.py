"""Sequences of tokens (or of other inputs) with their documents, and counts of what was read."""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activations.corpora.documents import Document

JOINED, SEPARATE = "joined", "separate"

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
    cursor: dict[str, Any] | None = None
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
        """Count a document that was tokenised."""
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
        """Everything but the digest, JSON-able."""
        return {name: value for name, value in vars(self).items() if name != "digest"}


def mark_of(digest: str) -> int:
    """31 bits of a hexadecimal digest: the tokens of an input that has none."""
    return int(digest[:8], 16) >> 1


def grouped(
    entries: Iterable[tuple[Document, str, Any]],
    *,
    context: int,
    per_group: int,
    counts: PackingCounts,
    limit: int | None,
) -> Iterator[Sequences]:
    """Groups of sequences whose inputs are not tokens: (document, hexadecimal digest, input) each.

    `tokens` have 31 bits of the digest at each position: they tell inputs apart.
    """
    left = sys.maxsize if limit is None else limit
    waiting: list[tuple[Document, str, Any]] = []
    last = -1

    def group() -> Sequences:
        nonlocal waiting, left, last
        marks = np.array([mark_of(digest) for _, digest, _ in waiting], np.int32)
        ids = np.array([document.id for document, _, _ in waiting], np.int32)
        beginning = {d.id: (d.id, d.key, d.title) for d, _, _ in waiting if d.id > last}
        last = int(ids[-1])
        inputs = [each for _, _, each in waiting]
        left, waiting = left - len(waiting), []
        tokens, document = (np.repeat(each[:, None], context, 1) for each in (marks, ids))
        return Sequences(tokens, document, list(beginning.values()), inputs)

    counted = -1
    for entry in entries:
        document = entry[0]
        if document.id > counted:
            counts.add(document, 0)
            counted = document.id
        counts.tokens += context
        waiting.append(entry)
        if len(waiting) == min(per_group, left):
            yield group()
        if not left:
            return
    if waiting:
        yield group()


def _known(document: Document) -> Described:
    return document.id, document.key, document.title


@dataclass(frozen=True, kw_only=True)
class PackingOptions:
    """How documents of a language model become sequences (`activations.corpora.packing`)."""

    kind: str = JOINED
    prepend_bos: bool | None = None
    """Whether each sequence begins with BOS; None: where the tokenizer adds one."""
    describe: Callable[[Document], Described] = _known
    """What to store of a document."""
    state: Callable[[], Any] = lambda: None
    """Asked at each border between batches of documents: what a later reading goes on from."""
    cursor: Mapping[str, Any] | None = None
    """Of a group in an earlier reading, whose documents begin at its border: where to go on."""
    to_end: bool = False
    """Whether documents behind the last sequence that is asked for are read, to be counted."""


PLAIN = PackingOptions()
