"""The corpora of a harvest: the first one, and those that were appended."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activations.corpora.documents import CorpusConfig
from activations.storage.reader import ActivationStore
from saescope.artefact import MANIFEST
from saescope.config import from_dict
from saescope.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One corpus of a harvest, and what of the harvest is of it."""

    corpus: CorpusConfig
    max_tokens: int | None
    planned_sequences: Mapping[str, int]
    first_window: int
    end_window: int
    """the number behind its last committed window"""
    first_sequence: int
    first_document: int
    counts: Mapping[str, Any] | None
    """what was counted of each split, once it is finished"""

    def windows(self, store: ActivationStore, split: str) -> list[int]:
        """Numbers of its committed windows of a split."""
        numbers = range(self.first_window, self.end_window)
        return [number for number in numbers if store.windows[number].split == split]


def segments(store: ActivationStore) -> list[Segment]:
    """The segments of a harvest, in the order harvested."""
    manifest, where = store.manifest, str(store.path / MANIFEST)
    first = {
        "corpus": manifest["config"]["corpus"],
        "max_tokens": manifest["config"]["max_tokens"],
        "planned_sequences": manifest["planned_sequences"],
        "first_window": 0,
        "first_sequence": 0,
        "first_document": 0,
        "counts": manifest["corpus"],
    }
    entries = [first, *manifest.get("appended", [])]
    ends = [entry["first_window"] for entry in entries[1:]] + [len(store.windows)]
    names = [f.name for f in fields(Segment) if f.name not in ("corpus", "end_window")]
    return [
        Segment(
            corpus=from_dict(CorpusConfig, entry["corpus"], where),
            end_window=end,
            **{name: entry[name] for name in names},
        )
        for entry, end in zip(entries, ends, strict=True)
    ]


def document_numbers(
    store: ActivationStore, split: str, *, end_window: int, below: int | None = None
) -> NDArray[np.uint64]:
    """The numbers that tell documents apart, of those that begin in windows of a split.

    Args: only windows before `end_window` count, and documents with an id below `below`.

    Raises InputError for a harvest that does not have them.
    """
    if not store.manifest["config"]["corpus"].get("deduplicate", False):
        raise InputError(
            "does not know what texts it has, as it was harvested without corpus.deduplicate",
            where=str(store.path),
        )
    found = [np.empty(0, np.uint64)]
    for number in range(end_window):
        if store.windows[number].split == split:
            table = store.read_documents(number)
            ids, numbers = (table[name].to_numpy() for name in ("document", "number"))
            found.append(numbers[ids < below] if below is not None else numbers)
    return np.concatenate(found)


def numbers_before(
    store: ActivationStore, segment: Segment, split: str, cursor: Mapping[str, Any] | None
) -> NDArray[np.uint64]:
    """The numbers of documents that are not read again, but whose repetitions are left out."""
    if not segment.corpus.deduplicate:
        return np.empty(0, np.uint64)
    end = segment.first_window if cursor is None else segment.end_window
    below = None if cursor is None else int(cursor["first"])
    return document_numbers(store, split, end_window=end, below=below)
