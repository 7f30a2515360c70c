"""Compute a committed window again: its rows from the stored tokens, its order from the seed."""

from collections.abc import Sequence
from dataclasses import replace

from activations.corpora.sequences import Sequences
from activations.harvesting.compute import run_window
from activations.harvesting.config import HarvestConfig, in_planned_batches
from activations.harvesting.outliers import norm_limits
from activations.harvesting.resume import model_of as harvested_model
from activations.models.base import HarvestModel
from activations.models.config import stored
from activations.storage.layout import SPLITS
from activations.storage.reader import ActivationStore
from activations.storage.window_data import WindowData
from saescope.artefact import MANIFEST
from saescope.config import from_dict
from saescope.progress import Progress


def config_of(store: ActivationStore) -> HarvestConfig:
    """The configuration of a harvest, with batches of the size that it ran.

    It trusts no code of its model's, whatever its manifest says.
    """
    manifest = store.manifest
    config = from_dict(HarvestConfig, stored(manifest["config"]), str(store.path / MANIFEST))
    return in_planned_batches(config, manifest)


def model_of(
    store: ActivationStore, device: str | None = None, *, trust_remote_code: bool = False
) -> HarvestModel:
    """The model of a harvest, in its precision; by default where the harvest ran.

    Raises InputError if it has other weights, or another tokenizer, by now.
    """
    config = config_of(store)
    model = replace(
        config.model,
        device=device or config.model.device,
        trust_remote_code=trust_remote_code,
    )
    return harvested_model(replace(config, model=model), store)


def group_of(store: ActivationStore, number: int) -> Sequences:
    """What a window of a model that reads tokens was computed from; documents are not described.

    Raises DamagedError if it is damaged.
    """
    tokens, document = (store.read_sequences(array, number) for array in ("tokens", "document"))
    return Sequences(tokens, document, [])


def recompute(
    store: ActivationStore,
    number: int,
    group: Sequences,
    model: HarvestModel,
    sites: Sequence[str],
    config: HarvestConfig,
    progress: Progress,
    *,
    find_kept: bool = False,
) -> WindowData:
    """A window's rows at some sites, as a harvest computes them from its sequences.

    On the same machine they have the same bits. Where outliers were left out, the stored `keep`
    says which, or they are found again (`find_kept`, with all sites).

    Raises DamagedError if what has to be read is damaged.
    """
    window = store.windows[number]
    position = sum(before.split == window.split for before in store.windows[:number])
    seed = (config.seed, SPLITS.index(window.split), position)
    limits, keep = norm_limits(store.manifest), None
    if limits is not None and not find_kept:
        keep, limits = store.read_sequences("keep", number), None
    return run_window(
        window.split,
        group,
        window.first_sequence,
        model,
        tuple(sites),
        config,
        seed,
        progress,
        limits=limits,
        keep=keep,
    )
