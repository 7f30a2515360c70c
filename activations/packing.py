"""Documents to fixed token sequences: tokenised in batches, joined by EOS, cut to the context."""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activations.corpora import Document
from activations.models import Model

_BATCH_DOCUMENTS = 64
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Sequences:
    """Some packed sequences of one split, and the documents that begin in them."""

    tokens: NDArray[np.int32]
    """[sequence, position]"""
    document: NDArray[np.int32]
    """[sequence, position]: id of the document of each token."""
    described: list[tuple[int, str, str]]
    """(id, key, title) of each document that first appears here."""
    inputs: list[Any] | None = None
    """What each sequence is computed from, where that is not its tokens."""


@dataclass
class PackingCounts:
    """What packing has read so far; the hash covers every text, in order."""

    documents: int = 0
    tokens: int = 0
    dropped_tokens: int = 0
    """Tokens of the ragged end that fill no sequence."""
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)


def pack(
    documents: Iterable[Document],
    model: Model,
    *,
    context: int,
    per_group: int,
    counts: PackingCounts,
    limit: int | None = None,
) -> Iterator[Sequences]:
    """Groups of `per_group` packed sequences, the last one smaller; a ragged end is dropped.

    Reading stops after `limit` sequences.

    Each sequence starts with BOS where the model uses one; each document ends with EOS where the
    tokenizer has one. BOS counts to the document of the token after it.
    """
    bos = [] if model.bos_token_id is None else [model.bos_token_id]
    payload = context - len(bos)
    left = sys.maxsize if limit is None else limit
    tokens = np.empty(0, np.int32)
    ids = np.empty(0, np.int32)
    waiting: list[tuple[int, str, str]] = []

    def group(n: int) -> Sequences:
        nonlocal tokens, ids, waiting, left
        left -= n
        parts = [part[: n * payload].reshape(n, payload) for part in (tokens, ids)]
        tokens, ids = tokens[n * payload :], ids[n * payload :]
        if bos:
            parts[0] = np.insert(parts[0], 0, bos[0], axis=1)
            parts[1] = np.insert(parts[1], 0, parts[1][:, 0], axis=1)
        last = int(parts[1][-1, -1])
        begun = [entry for entry in waiting if entry[0] <= last]
        waiting = waiting[len(begun) :]
        return Sequences(parts[0], parts[1], begun)

    for batch, encoded in _tokenised(documents, model):
        lengths = [len(part) for part in encoded]
        flat = np.fromiter((t for part in encoded for t in part), np.int32, sum(lengths))
        tokens = np.concatenate([tokens, flat])
        numbers = np.array([document.id for document in batch], np.int32)
        ids = np.concatenate([ids, np.repeat(numbers, lengths)])
        waiting += [(document.id, document.key, document.title) for document in batch]
        for document in batch:
            counts.digest.update(document.text.encode() + b"\0")
        counts.documents += len(batch)
        counts.tokens += len(flat)
        while left and len(tokens) >= payload * min(per_group, left):
            yield group(min(per_group, left))
        if not left:
            return
    counts.dropped_tokens = len(tokens) % payload
    if len(tokens) >= payload:
        yield group(len(tokens) // payload)


def _tokenised(
    documents: Iterable[Document], model: Model
) -> Iterator[tuple[list[Document], list[list[int]]]]:
    """Documents in batches with their token ids, EOS at each end."""
    eos = [] if model.eos_token_id is None else [model.eos_token_id]
    batch: list[Document] = []
    size = 0

    def encode() -> tuple[list[Document], list[list[int]]]:
        encoded = model.tokenize_batch([document.text for document in batch])
        return batch, [[*ids, *eos] for ids in encoded]

    for document in documents:
        batch.append(document)
        size += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_CHARACTERS:
            yield encode()
            batch, size = [], 0
    if batch:
        yield encode()
