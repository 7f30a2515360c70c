"""Harvests with activations set by hand, written through the real writer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activations import ActivationStore
from activations.storage.layout import SPLITS
from activations.storage.row_formats import SiteSums
from activations.storage.window_data import WindowData
from activations.storage.writer import HarvestWriter


def make_hand_store(
    folder: Path,
    train: Mapping[str, Tensor],
    held_out: Mapping[str, Tensor] | None = None,
    *,
    context: int = 5,
    chunk_rows: int = 32,
    n_layers: int = 12,
) -> ActivationStore:
    """A finished harvest of these rows [n, d_in] at each site; n is a multiple of context - 1.

    Position 0 of each sequence has no row. Every sequence is a document of its own. Values are
    rounded to bfloat16; rows are shuffled as a harvest shuffles them.
    """
    count = len(next(iter(train.values())))
    sequences = count // (context - 1)
    facts = hand_facts(
        {site: x.shape[1] for site, x in train.items()}, context=context, chunk_rows=chunk_rows,
        sequences=sequences, n_layers=n_layers,
    )  # fmt: skip
    writer = HarvestWriter.create(folder, facts)
    first = 0
    for split, rows in zip(SPLITS, (train, held_out), strict=True):
        if rows is not None:
            data = _window(split, rows, first, context)
            writer.write(data)
            first += len(data.tokens)
    writer.finish({})
    return writer.store


def hand_facts(
    sites: Mapping[str, int],
    *,
    context: int,
    chunk_rows: int,
    sequences: int,
    n_layers: int = 12,
) -> dict[str, Any]:
    """What the manifest of a harvest by hand says; `sequences` make a window."""
    return {
        "config": {"context": context, "out": None},
        "model": {"name": "none", "spec": "none", "revision": None, "weights_hash": "0",
                  "n_layers": n_layers, "dtype": "float32"},
        "sites": dict(sites),
        "chunk_rows": chunk_rows,
        "window_chunks": -(-sequences * (context - 1) // chunk_rows),
        "sequences_per_window": sequences,
        "planned_sequences": {},
    }  # fmt: skip


def _window(split: str, rows: Mapping[str, Tensor], first: int, context: int) -> WindowData:
    count = len(next(iter(rows.values())))
    sequences = count // (context - 1)
    shape = (sequences, context)
    keep = np.ones(shape, bool)
    keep[:, 0] = False
    assert keep.sum() == count
    numbers = first + np.arange(sequences, dtype=np.int32)
    stored = {site: x.to(torch.bfloat16) for site, x in rows.items()}
    exact = {site: x.double() for site, x in stored.items()}
    return WindowData(
        split=split,
        tokens=np.arange(sequences * context, dtype=np.int32).reshape(shape),
        document=np.repeat(numbers[:, None], context, axis=1),
        keep=keep,
        described=[(int(n), f"key {n}", f"title {n}") for n in numbers],
        row_token=first * context + np.flatnonzero(keep),
        rows={site: x.view(torch.uint16).numpy() for site, x in stored.items()},
        order=np.random.default_rng(first).permutation(count),
        sums={
            site: SiteSums(count, x.sum(0).numpy(), float(x.square().sum()))
            for site, x in exact.items()
        },
    )
