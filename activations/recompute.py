"""A committed window computed again: its rows from the stored tokens, its order from the seed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activations.harvest import HarvestConfig, check_same_model, run_window
from activations.layout import ROW_TOKEN, SPLITS
from activations.ledger import Window
from activations.models import Model, load_model
from activations.packing import Sequences
from activations.zarr_store import ActivationStore
from activations.zarr_writer import WindowData, filled_up
from saescope.config import from_dict
from saescope.progress import Progress


def config_of(store: ActivationStore) -> HarvestConfig:
    """The configuration of a harvest."""
    values = store.manifest["config"]
    return from_dict(HarvestConfig, values, str(store.path / "manifest.json"))


def model_of(store: ActivationStore, device: str | None = None) -> Model:
    """The model of a harvest, in its precision; by default where the harvest ran.

    Raises InputError if it has other weights, or another tokenizer, by now.
    """
    chosen = config_of(store).model
    dtype = store.manifest["model"]["dtype"]
    model = load_model(
        chosen.spec, dtype=dtype, device=device or chosen.device, revision=chosen.revision
    )
    check_same_model(model, store)
    return model


def recompute(
    store: ActivationStore,
    number: int,
    model: Model,
    sites: Sequence[str],
    config: HarvestConfig,
    progress: Progress,
) -> WindowData:
    """A window's rows at some sites, as a harvest computes them; their documents are left out.

    On the same machine they have the same bits. Raises DamagedError if the tokens are damaged.
    """
    window = store.windows[number]
    tokens = store.read_sequences("tokens", number)
    # which document a token is of does not matter here
    group = Sequences(tokens, np.zeros_like(tokens), [])
    position = sum(before.split == window.split for before in store.windows[:number])
    seed = (config.seed, SPLITS.index(window.split), position)
    return run_window(
        window.split, group, window.first_sequence, model, tuple(sites), config, seed, progress
    )


def dealt(
    data: WindowData, window: Window, array: str, chunk: int, chunk_rows: int
) -> NDArray[Any]:
    """What a chunk of an array [row, ...] has of a window, filled up where its rows end."""
    values = data.row_token if array == ROW_TOKEN else data.rows[array]
    start = (chunk - window.first_chunk) * chunk_rows
    order = data.order[start : start + chunk_rows]
    return filled_up(array, np.take(values, order, axis=0, mode="clip"), chunk_rows)
