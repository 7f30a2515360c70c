"""Train any architecture on planted data and measure what it found; used by a benchmark and tests.

An architecture is configured by its own defaults and a target L0. What it reads follows from what
it is: transcoders get targets of the same features in other directions (a cross-layer one has one
layer), crosscoders see the data as two sites side by side.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.architectures import architecture
from sae.core.base import SparseAutoencoder
from sae.core.batch import RawBatch
from sae.core.normaliser import Normaliser
from sae.evaluation.planted import PlantedBatches, PlantedConfig, PlantedDictionary
from sae.evaluation.recovery import (
    Absorption,
    Recovery,
    by_frequency,
    measure_absorption,
    measure_recovery,
    nonnegative_parts,
    principal_directions,
)
from sae.training.trainer import Trainer, TrainerConfig

FITTING, HELD_OUT, CALIBRATION = 1, 2, 3
"""streams of rows besides the training batches"""
ROWS = 4096
SITES = 2
"""into which a crosscoder's data are cut"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an architecture is trained on planted data."""

    d_sae: int = 96
    l0: float = 3.0
    steps: int = 600
    batch_size: int = 512
    lr: float = 3e-3
    options: Mapping[str, Any] = field(default_factory=dict)
    """of the architecture's configuration"""


OPTIONS: dict[str, dict[str, Any]] = {
    # its own levels would be 1, 1, 3, 6 and 12
    "msae": {"ks": (3, 6, 12)},
}
"""for architectures that want other settings here; one that is not named takes its defaults"""


def recipe_of(kind: str, **changes: Any) -> Recipe:
    """How a kind is trained, whether it is known here or not."""
    return Recipe(options=OPTIONS.get(kind, {}), **changes)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a trained SAE found of a planted dictionary."""

    sae: SparseAutoencoder
    """folded: its rows and activations are in the data's units"""
    recovery: Recovery
    untrained: float
    """mean recovery before the first step, or of random rows if that is better"""
    held_out: dict[str, Any]
    """as the trainer measured it: l0, fvu, dead_fraction"""


def train(
    kind: str, planted: PlantedDictionary, recipe: Recipe, folder: Path, *, seed: int = 0
) -> Found:
    """Train one SAE on a planted dictionary (with targets, for a transcoder)."""
    sae, d_true = make(kind, planted, recipe, seed)
    first = planted.sample(recipe.batch_size, stream=FITTING)
    config = TrainerConfig(
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        target_l0=recipe.l0,
        dead_after_tokens=20_000,
        evaluate_every=recipe.steps,
        checkpoint_every=recipe.steps,
    )
    trainer = Trainer(
        sae,
        PlantedBatches(planted, recipe.batch_size),
        config,
        total_steps=recipe.steps,
        held_out=lambda: _rows(planted, HELD_OUT),
        calibration=lambda: _rows(planted, CALIBRATION),
        folder=folder,
        seed=seed,
    )
    untrained = _untrained(trainer, RawBatch(first.x, first.target), d_true, seed)
    trained = trainer.run().fold()
    return Found(
        sae=trained,
        recovery=measure_recovery(d_true, trained.W_dec),
        untrained=untrained,
        held_out=trainer.last_held_out,
    )


def planted_for(kind: str, config: PlantedConfig) -> PlantedDictionary:
    """The data that a kind is trained on: with targets, for a transcoder."""
    return PlantedDictionary(
        replace(config, d_out=config.d_in) if architecture(kind).transcodes else config
    )


def make(
    kind: str, planted: PlantedDictionary, recipe: Recipe, seed: int
) -> tuple[SparseAutoencoder, Tensor]:
    """The untrained SAE with its normalisers, and the true directions it writes."""
    cls, d_in = architecture(kind), planted.config.d_in
    config = cls.Config(d_sae=recipe.d_sae, **recipe.options).with_target_l0(recipe.l0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = cls(config, d_in, planted.config.d_out or None)
    rows = planted.sample(4 * ROWS, stream=FITTING)
    if cls.concatenates and rows.target is None:
        sae.normaliser = Normaliser.side_by_side([fit(x) for x in rows.x.chunk(SITES, dim=1)])
        sae.metadata["site_widths"] = [x.shape[1] for x in rows.x.chunk(SITES, dim=1)]
        return sae, planted.directions
    sae.normaliser = fit(rows.x)
    if rows.target is None:
        return sae, planted.directions
    sae.output_normaliser = fit(rows.target)
    return sae, planted.target_directions


def fit(x: Tensor) -> Normaliser:
    """To unit mean square."""
    exact = x.double()
    return Normaliser.fit(
        "unit_mean_square", mean=exact.mean(0), mean_square=float(exact.square().sum(1).mean())
    )


def absorption(found: Found, planted: PlantedDictionary) -> Absorption:
    """Of parents by their children's latents, on held-out rows of hierarchical data."""
    rows = planted.sample(ROWS, stream=HELD_OUT)
    transcoder = rows.target is not None
    return measure_absorption(
        found.sae.encode,
        found.sae.W_dec.detach(),
        x=rows.x,
        codes=rows.codes,
        directions=planted.target_directions if transcoder else planted.directions,
        families=planted.families,
    )


def controls(planted: PlantedDictionary, d_sae: int) -> dict[str, float]:
    """Mean recovery by principal directions and by a non-negative factorisation of d_sae parts.

    Of what an SAE is to reconstruct: the targets, where there are any.
    """
    rows = planted.sample(ROWS, stream=FITTING)
    x = rows.x if rows.target is None else rows.target
    true = planted.directions if rows.target is None else planted.target_directions
    return {
        "pca": measure_recovery(true, principal_directions(x, d_sae)).mean,
        "nmf": measure_recovery(true, nonnegative_parts(x, d_sae)).mean,
    }


def rarest(found: Found, planted: PlantedDictionary) -> float:
    """Mean recovery of the tenth of the features that fire least."""
    return by_frequency(found.recovery.best, planted.frequency)[0]


def _untrained(trainer: Trainer, first: RawBatch, directions: Tensor, seed: int) -> float:
    own = trainer.sae
    before = {name: value.clone() for name, value in own.state_dict().items()}
    own.start(trainer.maker.make(first, torch.Generator().manual_seed(0)))
    started = measure_recovery(directions, own.fold().W_dec).mean
    own.load_state_dict(before)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(own.d_sae, directions.shape[1], generator=generator)
    return max(started, measure_recovery(directions, random).mean)


def _rows(planted: PlantedDictionary, stream: int) -> Iterator[RawBatch]:
    rows = planted.sample(ROWS, stream=stream)
    yield RawBatch(rows.x, rows.target)
