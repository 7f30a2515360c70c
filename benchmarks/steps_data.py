"""What the libraries step on: rows of a harvest or synthetic ones, and weights that fit them.

Weights are those of a TopK SAE after a short training of ours on the same rows, kept in the work
folder, so that activations are spread as in an SAE that has learnt something.
"""

import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from activations import ActivationLoader
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.bench.inputs import BATCHES, Shape, Weights, planted, standardised
from sae.core.normaliser import Normaliser
from sae.data.harvests import choose_site, open_complete
from sae.training.trainer import Trainer, TrainerConfig
from saescope.artefact import atomic_path, sha256_json
from saescope.errors import InputError
from saescope.progress import say

_BATCH, _LR_MULTIPLIER = 512, 8.0
_PARTS = ("x", "W_enc_T", "W_dec", "b_enc")


def settled(
    shape: Shape, *, harvest: str | None, steps: int, work: Path, seed: int = 0
) -> tuple[Tensor, Weights]:
    """Rows x [batches, batch, d_in] and weights after `steps` of training, made once.

    Raises InputError if the harvest does not fit the shape.
    """
    found = None if harvest is None else open_complete(harvest).hash
    key = sha256_json([str(shape), found, steps, seed, BATCHES])[:12]
    folder = work / "steps" / f"settled-{shape}-{key}"
    if not folder.exists():
        x, weights = planted(shape, seed=seed) if harvest is None else _stored(shape, harvest, seed)
        say(f"{shape}: training weights for {steps} steps (once)")
        weights = _train(x, weights, shape.k, steps, seed)
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            for name, value in {"x": x, **vars(weights)}.items():
                np.save(temporary / f"{name}.npy", value.numpy())
    x, *parts = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in _PARTS)
    return x, Weights(*parts)


def _stored(shape: Shape, harvest: str, seed: int) -> tuple[Tensor, Weights]:
    """A harvest's first batches, centred and scaled, and random weights."""
    store = open_complete(harvest)
    site = choose_site(store, None)
    if store.d_in(site) != shape.d_in:
        raise InputError(
            "has another width than the shape", where=harvest, given=store.d_in(site),
            allowed=str(shape.d_in),
        )  # fmt: skip
    loader = ActivationLoader(
        store, site, batch_size=shape.batch, seed=seed, epochs=1, order="chunks"
    )
    x = torch.cat(list(islice(loader, BATCHES)))
    x = standardised(x).view(BATCHES, shape.batch, shape.d_in)
    generator = torch.Generator().manual_seed(seed)
    W = functional.normalize(torch.randn(shape.d_sae, shape.d_in, generator=generator), dim=1)
    return x, Weights(W, W, torch.zeros(shape.d_sae))


def _train(x: Tensor, weights: Weights, k: int, steps: int, seed: int) -> Weights:
    rows = x.flatten(0, 1)
    sae = TopKSAE(TopKConfig(d_sae=len(weights.W_dec), k=k), rows.shape[1])
    variance = float((rows - rows.mean(0)).square().sum(1).mean())
    sae.normaliser = Normaliser.identity(sae.d_in, variance)
    with torch.no_grad():
        for name, value in vars(weights).items():
            getattr(sae, name).copy_(value)
    batch = min(_BATCH, len(rows))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            sae, _NoBatches(), TrainerConfig(batch_size=batch, lr_multiplier=_LR_MULTIPLIER),
            total_steps=max(1, steps), held_out=lambda: (), folder=Path(folder), initialise=False,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            chosen = torch.randperm(len(rows), generator=generator)[:batch]
            trainer.train_step(rows[chosen])
    with torch.no_grad():
        # without b_dec, so that every library computes the same from them
        b_enc = sae.b_enc - sae.W_enc_T @ sae.b_dec
    return Weights(sae.W_enc_T.detach(), sae.W_dec.detach(), b_enc)


class _NoBatches:
    """The trainer is given its rows step by step."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(())

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        del state
