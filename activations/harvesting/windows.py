"""The windows of a harvest: which are still to be computed, and the model's run over one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from activations.corpora.sequences import PackingCounts, Sequences
from activations.harvesting.config import HarvestConfig
from activations.harvesting.corpus_reader import Text
from activations.harvesting.segments import Part, numbers_before
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
    part: Part,
    config: HarvestConfig,
    model: HarvestModel,
    begun: ActivationStore,
    counts: Mapping[str, PackingCounts],
) -> Iterator[MissingWindow]:
    """The windows of a store's last part that it does not have committed, in their order.

    The counts of both splits are those of a whole reading once this has ended.

    Raises ArtefactError if the text of what is committed has changed.
    """
    number, first = part.first_window, part.first_sequence
    for split in SPLITS:
        committed = [begun.windows[each] for each in part.windows(begun, split)]
        earlier = sum(w.split == split for w in begun.windows[: part.first_window])
        # a place is that of the last window committed, which is thus read and compared again
        place = begun.manifest.get("places", {}).get(split) if committed else None
        at = 0
        if place is not None:
            at = len(committed) - 1
            number, first = number + at, committed[at].first_sequence
        groups = Text.of(config, part).packed(
            split,
            model,
            per_group=begun.manifest["sequences_per_window"],
            counts=counts[split],
            limit=part.planned_sequences[split],
            before=numbers_before(begun, part, split, place),
            place=place,
            to_end=part.max_tokens is None,
        )
        for group in groups:
            if at < len(committed):
                _check_same_text(group, begun, committed[at])
            else:
                seed = (config.seed, SPLITS.index(split), earlier + at)
                measured = _is_measured(split, at, part, begun)
                yield MissingWindow(number, split, group, first, seed, measured)
            at, number, first = at + 1, number + 1, first + len(group.tokens)
        if at < len(committed):
            raise _has_changed(begun)


def _is_measured(split: str, number: int, part: Part, begun: ActivationStore) -> bool:
    """Whether the statistics are of this window, among others, of a part's split."""
    wanted = begun.manifest["config"].get("statistics_windows")
    total = -(-part.planned_sequences[split] // begun.manifest["sequences_per_window"])
    if split != "train" or wanted is None or wanted >= total:
        return split == "train"
    return number in {n * total // wanted for n in range(wanted)}


def _check_same_text(group: Sequences, begun: ActivationStore, window: Window) -> None:
    first = window.first_sequence
    stored = begun.tokens[first : first + window.sequences]
    if not np.array_equal(group.tokens, stored):
        raise _has_changed(begun)


def _has_changed(begun: ActivationStore) -> ArtefactError:
    return ArtefactError(
        "the corpus has changed since this harvest began; remove it and begin anew",
        where=str(begun.path),
    )
