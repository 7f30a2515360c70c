"""A synthetic world: what its configuration comes to, as tensors.

Features 0 to roots - 1 are roots; each generation's features follow, the children of a parent side
by side; the features after the last tree stand alone. Seeds are those of SAELens' `SyntheticModel`,
so a world made there on the CPU from the same settings is this one, but for rounding.
"""

import math
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional

from sae.kernels.adam import adam_
from sae.synthetic.config import PREFIX, WorldConfig, world_config
from sae.synthetic.kept_directions import kept_directions
from saescope.progress import Progress

_LEAST_OWN_VARIANCE = 0.01
"""of a feature's latent variable: what common causes must leave to the feature itself"""
TILE = 64
"""features without a parent whose random words are drawn together"""
_DEVIATIONS, _CAUSES = 1, 4
"""added to the world's seed for what is drawn besides directions and bias"""


@dataclass(frozen=True, kw_only=True)
class Trees:
    """Which feature is under which."""

    parent: Tensor
    """int64 [features], -1 for features without one"""
    first_child: Tensor
    """int64 [features], the first of the children, which are numbered on; 0 where there is none"""
    children: Tensor
    """int64 [features], how many there are"""


class World:
    """The tensors of a configuration; on the CPU unless moved.

    A feature fires where its latent variable, standard normal, exceeds a threshold (a Gaussian
    copula): weights on common causes that all features share, and a cause of its own. In a tree it
    fires only where its parent fires, too.
    """

    def __init__(self, config: WorldConfig, *, directions: Tensor | None = None) -> None:
        """Make a world; `directions` [features, d_in] spares making them."""
        self.config = config
        self.trees = make_trees(config)
        self.probability = frequencies(config)
        """[features], how often each fires, by the law of frequencies; float64"""
        self.mean = torch.linspace(config.first_mean, config.last_mean, config.features)
        """[features], mean amounts"""
        self.deviation = _deviations(config)
        """[features], standard deviations of the amounts"""
        self.causes = _causes(config)
        """[features, correlation_rank], weights on the common causes"""
        drawn = self.probability
        if config.compensate:
            drawn = compensated(drawn, self.trees, exclusive=config.exclusive)
        self.drawn_probability = drawn
        """[features], how often each latent variable exceeds its threshold; float64"""
        start, self.bias = _random_directions(config)
        if directions is None:
            directions = kept_directions(config, lambda: orthogonalised(start, config))
        self.directions = directions
        """[features, d_in], unit rows"""

        own = (1 - self.causes.double().square().sum(1)).sqrt()
        self.slope = (self.causes.double() / own[:, None]).float()
        """[features, correlation_rank]; given the common causes e, the latent variable is above its
        threshold with probability Phi(slope . e + offset)"""
        self.offset = (-math.sqrt(2) * torch.erfinv(1 - 2 * drawn) / own).float()
        """[features], see `slope`; infinite for a feature that is always drawn"""

    def to(self, device: torch.device) -> "World":
        """The same world with its tensors on a device."""
        if self.directions.device == device:
            return self
        moved = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.to(device))
        trees = self.trees
        moved.trees = Trees(
            parent=trees.parent.to(device),
            first_child=trees.first_child.to(device),
            children=trees.children.to(device),
        )
        return moved


class Tops(NamedTuple):
    """The features without a parent, padded to whole tiles with some that never fire."""

    feature: Tensor
    """int64 [slots]"""
    slope: Tensor
    """[slots, correlation_rank]"""
    offset: Tensor
    """[slots]"""

    @classmethod
    def of(cls, world: World) -> Self:
        """Those of a world, ascending."""
        tops = (world.trees.parent < 0).nonzero()[:, 0]
        short = -len(tops) % TILE
        return cls(
            functional.pad(tops, (0, short)),
            functional.pad(world.slope[tops], (0, 0, 0, short)),
            functional.pad(world.offset[tops], (0, short), value=-math.inf),
        )


@lru_cache(maxsize=2)
def named_world(name: str) -> World:
    """The world of a name with the prefix synth:; InputError if there is none.

    >>> named_world("synth:tiny").directions.shape
    world: ...
    torch.Size([96, 32])
    """
    return World(world_config(name.removeprefix(PREFIX)))


def frequencies(config: WorldConfig) -> Tensor:
    """How often each feature fires, float64 [features]: a power law, scaled to its two ends."""
    law = torch.arange(1, config.features + 1, dtype=torch.float64) ** -config.zipf
    low, high = config.smallest_probability, config.largest_probability
    if config.features == 1 or config.zipf == 0:
        return torch.full_like(law, high)
    return low + (high - low) * (law - law[-1]) / (law[0] - law[-1])


def make_trees(config: WorldConfig) -> Trees:
    """Trees filled generation by generation, until they or the features are complete."""
    parent = torch.full((config.features,), -1)
    first_child, children = torch.zeros_like(parent), torch.zeros_like(parent)
    start, end = 0, config.roots
    for _ in range(config.depth):
        below = torch.arange(end, min(end + (end - start) * config.children, config.features))
        above = start + (below - end) // config.children
        parent[below] = above
        children += torch.bincount(above, minlength=config.features)
        with_children = above[:: config.children]
        first_child[with_children] = below[:: config.children]
        start, end = end, end + len(below)
    return Trees(parent=parent, first_child=first_child, children=children)


def compensated(probability: Tensor, trees: Trees, *, exclusive: bool) -> Tensor:
    """How often features of probability [features] must be drawn to fire about so often in trees.

    A child of probability p under a parent of probability q is drawn with p / q, and where children
    exclude each other with (1 + the others' p / q) times that, at most 1. What this leaves out (the
    chance that several others are drawn) makes deep features rarer than the law says.
    """
    parent = trees.parent
    child = parent >= 0
    above = probability[parent[child]]
    drawn = probability.clone()
    drawn[child] /= above
    if exclusive:
        total = torch.zeros_like(probability).index_add_(0, parent[child], probability[child])
        others = total[parent[child]] - probability[child]
        drawn[child] *= 1 + others.clamp_min(0) / above
    return drawn.clamp(max=1)


def _generator(config: WorldConfig, purpose: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(config.seed + purpose)


def _deviations(config: WorldConfig) -> Tensor:
    drawn = torch.randn(config.features, generator=_generator(config, _DEVIATIONS))
    return (config.deviation_mean + config.deviation_spread * drawn).abs()


def _causes(config: WorldConfig) -> Tensor:
    shape = (config.features, config.correlation_rank)
    weight = torch.randn(shape, generator=_generator(config, _CAUSES)) * config.correlation_scale
    square = weight.square().sum(1, keepdim=True)
    most = 1 - _LEAST_OWN_VARIANCE
    return torch.where(square > most, weight * (most / square.clamp_min(1e-30)).sqrt(), weight)


def _random_directions(config: WorldConfig) -> tuple[Tensor, Tensor]:
    generator = _generator(config)
    directions = torch.randn(config.features, config.d_in, generator=generator)
    bias = torch.randn(config.d_in, generator=generator)
    return functional.normalize(directions, dim=1), config.bias * functional.normalize(bias, dim=0)


def orthogonalised(directions: Tensor, config: WorldConfig) -> Tensor:
    """Unit rows [features, d_in], pushed apart by steps of Adam.

    The loss is the sum of (d_i . d_j)^2 over all ordered pairs, plus features times the sum of
    (||d_i||^2 - 1)^2. Its gradient needs no product of all pairs: with G = D^T D, that of the first
    sum is 4 (D G - ||d_i||^2 d_i), row by row, at features d_in^2 multiplications instead of
    features^2 d_in.
    """
    if config.orthogonalisation_steps == 0:
        return directions
    rows = directions.clone()
    exp_avg, exp_avg_sq = torch.zeros_like(rows), torch.zeros_like(rows)
    with Progress("world", config.orthogonalisation_steps, "steps") as progress:
        for step in range(1, config.orthogonalisation_steps + 1):
            square = rows.square().sum(1, keepdim=True)
            unit = len(rows) * (square - 1) - square
            adam_(
                rows,
                4 * torch.addcmul(rows @ (rows.T @ rows), unit, rows),
                exp_avg,
                exp_avg_sq,
                lr=config.orthogonalisation_lr,
                beta1=0.9,
                beta2=0.999,
                eps=1e-8,
                step=step,
                scale=1.0,
                unit_rows=False,
            )
            progress.advance(1, "")
    return functional.normalize(rows, dim=1)
