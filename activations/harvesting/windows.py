"""Which windows of a harvest are still to be computed, with the text of each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from activations.corpora.sequences import PackingCounts, Sequences
from activations.harvesting.config import HarvestConfig
from activations.harvesting.corpus_reader import CorpusReader
from activations.harvesting.segments import Segment, numbers_before
from activations.models.base import HarvestModel
from activations.storage.layout import SPLITS
from activations.storage.ledger import Window
from activations.storage.reader import ActivationStore
from saescope.errors import ArtefactError


@dataclass(frozen=True)
class MissingWindow:
    """A window that is not committed yet: what it is computed from, by whoever does it."""

    number: int
    """of all windows of the store"""
    split: str
    group: Sequences
    first_sequence: int
    seed: tuple[int, ...]
    measured: bool
    """whether statistics are of it"""


def missing_windows(
    segment: Segment,
    config: HarvestConfig,
    model: HarvestModel,
    store: ActivationStore,
    counts: Mapping[str, PackingCounts],
) -> Iterator[MissingWindow]:
    """The windows of a store's last segment that it does not have committed, in their order.

    The counts of both splits are those of a whole reading once this has ended.

    Raises ArtefactError if the text of what is committed has changed.
    """
    number, first = segment.first_window, segment.first_sequence
    for split in SPLITS:
        committed = [store.windows[each] for each in segment.windows(store, split)]
        earlier = sum(w.split == split for w in store.windows[: segment.first_window])
        # a cursor is that of the last window committed, which is thus read and compared again
        cursor = store.manifest.get("places", {}).get(split) if committed else None
        at = 0
        if cursor is not None:
            at = len(committed) - 1
            number, first = number + at, committed[at].first_sequence
        groups = CorpusReader.of(config, segment).packed(
            split,
            model,
            per_group=store.manifest["sequences_per_window"],
            counts=counts[split],
            limit=segment.planned_sequences[split],
            before=numbers_before(store, segment, split, cursor),
            cursor=cursor,
            to_end=segment.max_tokens is None,
        )
        for group in groups:
            if at < len(committed):
                _check_same_text(group, store, committed[at])
            else:
                seed = (config.seed, SPLITS.index(split), earlier + at)
                measured = _is_measured(split, at, segment, store)
                yield MissingWindow(number, split, group, first, seed, measured)
            at, number, first = at + 1, number + 1, first + len(group.tokens)
        if at < len(committed):
            raise _has_changed(store)


def _is_measured(split: str, number: int, segment: Segment, store: ActivationStore) -> bool:
    """Whether the statistics are of this window, among others, of a segment's split."""
    wanted = store.manifest["config"].get("statistics_windows")
    total = -(-segment.planned_sequences[split] // store.manifest["sequences_per_window"])
    if split != "train" or wanted is None or wanted >= total:
        return split == "train"
    return number in {n * total // wanted for n in range(wanted)}


def _check_same_text(group: Sequences, store: ActivationStore, window: Window) -> None:
    first = window.first_sequence
    stored = store.tokens[first : first + window.sequences]
    if not np.array_equal(group.tokens, stored):
        raise _has_changed(store)


def _has_changed(store: ActivationStore) -> ArtefactError:
    return ArtefactError(
        "the corpus has changed since this harvest began; remove it and begin anew",
        where=str(store.path),
    )
