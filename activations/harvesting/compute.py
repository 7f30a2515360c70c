"""Run the model over the sequences of one window and collect its rows."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from activations.corpora.sequences import Sequences
from activations.harvesting.config import HarvestConfig
from activations.harvesting.outliers import norm_limits, within
from activations.harvesting.row_selection import WindowRows
from activations.harvesting.windows import MissingWindow
from activations.loading.outliers import OutlierFilter
from activations.models.base import HarvestModel
from activations.storage.reader import ActivationStore
from activations.storage.row_formats import SiteRows
from activations.storage.window_data import WindowData
from saescope.errors import InputError
from saescope.progress import Progress


def compute(
    window: MissingWindow,
    model: HarvestModel,
    config: HarvestConfig,
    store: ActivationStore,
    progress: Progress,
) -> WindowData:
    """A window as it is to be stored."""
    limits = norm_limits(store.manifest)
    needed = window.measured or config.storage != "none" or limits
    data = run_window(
        window.split,
        window.group,
        window.first_sequence,
        model,
        store.sites if needed else (),
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
    model: HarvestModel,
    sites: tuple[str, ...],
    config: HarvestConfig,
    seed: tuple[int, ...],
    progress: Progress,
    *,
    limits: OutlierFilter | None = None,
    keep: NDArray[np.bool_] | None = None,
) -> WindowData:
    """Run the model over a window's sequences and keep the rows that count.

    Those are the positions of `keep` [sequence, position], or all that are no special tokens, whose
    norms are within the limits of all sites.
    """
    window = WindowRows(model, group, config.rows, keep)
    candidates = len(window.flat_positions)
    rows = {site: SiteRows(site, candidates, model.d_in(site), config.storage) for site in sites}
    for start in range(0, len(window.running), config.batch_sequences):
        batch = window.running[start : start + config.batch_sequences]
        found = model.capture(model.inputs(group, batch), sites)
        if limits is not None:
            window.keep_only(batch, within(found, limits).numpy())
        for site, x in found.items():
            rows[site].append(window.of(site, x, batch))
        progress.advance(len(batch) * config.context)
    kept = len(window.flat_positions)
    if kept == 0:
        raise InputError("no position of a whole window is kept", where=config.corpus.source)
    packed = config.model.kind == "language" and config.rows == "position"
    return WindowData(
        split=split,
        tokens=group.tokens,
        document=group.document,
        keep=window.keep,
        described=group.described,
        row_token=first_sequence * config.context + window.flat_positions,
        rows={name: x[:kept] for segment in rows.values() for name, x in segment.arrays.items()},
        order=window.order(seed),
        sums={site: segment.sums() for site, segment in rows.items()},
        positions=group.positions(candidates, kept) if packed else {},
        cursor=group.cursor,
    )
