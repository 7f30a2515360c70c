"""The windows of a harvest: which are still to be computed, and the model's run over one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from activations.corpora.packing import PackingCounts, Sequences
from activations.harvesting.corpus_reader import Text
from activations.harvesting.outliers import Limits, norm_limits, within
from activations.harvesting.row_selection import WindowRows
from activations.harvesting.segments import Part, numbers_before
from activations.models.base import RawModel
from activations.models.language import Model
from activations.storage.layout import SPLITS
from activations.storage.ledger import Window
from activations.storage.reader import ActivationStore
from activations.storage.row_formats import SiteRows
from activations.storage.writer import WindowData
from saescope.errors import ArtefactError, InputError
from saescope.progress import Progress

if TYPE_CHECKING:
    from activations.harvesting.pipeline import HarvestConfig


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
    config: "HarvestConfig",
    model: Model | RawModel,
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


def compute(
    window: MissingWindow,
    model: Model | RawModel,
    config: "HarvestConfig",
    begun: ActivationStore,
    progress: Progress,
) -> WindowData:
    """A window as it is to be stored."""
    limits = norm_limits(begun.manifest)
    needed = window.measured or config.storage != "none" or limits
    data = run_window(
        window.split,
        window.group,
        window.first_sequence,
        model,
        begun.sites if needed else (),
        config,
        window.seed,
        progress,
        limits=limits,
    )
    return data if window.measured else replace(data, sums={})


def run_window(
    split: str,
    group: Sequences,
    first_sequence: int,
    model: Model | RawModel,
    sites: tuple[str, ...],
    config: "HarvestConfig",
    seed: tuple[int, ...],
    progress: Progress,
    *,
    limits: Limits | None = None,
    keep: NDArray[np.bool_] | None = None,
) -> WindowData:
    """Run the model over a window's sequences and keep the rows that count.

    Those are the positions of `keep` [sequence, position], or all that are no special tokens, whose
    norms are within the limits of all sites.
    """
    window = WindowRows(model, group, config.rows, keep)
    candidates = len(window.places)
    rows = {site: SiteRows(site, candidates, model.d_in(site), config.storage) for site in sites}
    for start in range(0, len(window.running), config.batch_sequences):
        batch = window.running[start : start + config.batch_sequences]
        found = model.capture(model.inputs(group, batch), sites)
        if limits is not None:
            window.keep_only(batch, within(found, limits).numpy())
        for site, x in found.items():
            rows[site].append(window.of(site, x, batch))
        progress.advance(len(batch) * config.context)
    kept = len(window.places)
    if kept == 0:
        raise InputError("no position of a whole window is kept", where=config.corpus.source)
    packed = config.model.kind == "language" and config.rows == "position"
    return WindowData(
        split=split,
        tokens=group.tokens,
        document=group.document,
        keep=window.keep,
        described=group.described,
        row_token=first_sequence * config.context + window.places,
        rows={name: x[:kept] for part in rows.values() for name, x in part.arrays.items()},
        order=window.order(seed),
        sums={site: part.sums() for site, part in rows.items()},
        positions=group.positions(candidates, kept) if packed else {},
        place=group.place,
    )
