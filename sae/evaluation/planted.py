"""Planted dictionaries: data whose true features are known, to see which of them an SAE finds.

x = sum_i s_i d_i + mu + noise: unit directions d_i, strengths s_i uniform on [1, 2] where feature i
fires and 0 elsewhere, frequencies by a Zipf law. Three structures:

* zipf: features fire independently;
* correlated: features 2i and 2i + 1 have equal frequency and P(one | other) = together;
* hierarchical: a parent fires by the Zipf law; with child_probability exactly one of its children
  fires too. A child never fires without its parent.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sae.core.batch import RawBatch
from saescope.config import Config
from saescope.errors import InputError, check_range

Structure = Literal["zipf", "correlated", "hierarchical"]

_DIRECTIONS, _MEAN, _TARGETS, _ROWS = range(4)


@dataclass(frozen=True, kw_only=True)
class PlantedConfig(Config):
    """A planted dictionary and how its features fire."""

    d_in: int = 48
    """Width of the data."""
    features: int = 64
    """True features."""
    active: float = 3.0
    """Mean number of features that fire on a row."""
    zipf: float = 0.5
    """Exponent of the law of frequencies, rank^-zipf."""
    structure: Structure = "zipf"
    """How features depend on each other."""
    together: float = 0.6
    """correlated: probability that one of a pair fires where the other does."""
    children: int = 3
    """hierarchical: children of each parent."""
    child_probability: float = 0.6
    """hierarchical: probability that one of the children fires where the parent does."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise, each coordinate."""
    offset: float = 5.0
    """Norm of the constant mu."""
    d_out: int = 0
    """Width of targets made of the same activations with other directions; 0 for no targets."""
    seed: int = 0
    """Decides directions, mean and rows."""

    def __post_init__(self) -> None:
        for name in ("d_in", "features", "children"):
            check_range(f"planted.{name}", getattr(self, name), low=1)
        check_range("planted.active", self.active, above=0)
        for name in ("zipf", "noise", "offset", "d_out", "seed"):
            check_range(f"planted.{name}", getattr(self, name), low=0)
        for name in ("together", "child_probability"):
            check_range(f"planted.{name}", getattr(self, name), low=0, high=1)
        group = self.group
        if self.features % group:
            raise InputError(
                f"{self.structure} data have their features in groups of {group}",
                where="planted.features",
                given=self.features,
                allowed=f"a multiple of {group}",
            )

    @property
    def group(self) -> int:
        """Features that depend on each other: a pair, a family, or one alone."""
        return {"zipf": 1, "correlated": 2, "hierarchical": 1 + self.children}[self.structure]


class PlantedRows(NamedTuple):
    """Rows drawn from a planted dictionary."""

    x: Tensor
    """[rows, d_in]"""
    codes: Tensor
    """[rows, features], true activations"""
    target: Tensor | None
    """[rows, d_out], if the configuration asks for targets"""


class PlantedDictionary:
    """True directions [features, d_in] and the rows they make; equal seeds give equal bits.

    >>> planted = PlantedDictionary(PlantedConfig(features=12, active=1, structure="hierarchical"))
    >>> planted.families.tolist()[:3]
    [[0, 1], [0, 2], [0, 3]]
    >>> planted.sample(5, stream=1).x.shape
    torch.Size([5, 48])
    """

    def __init__(self, config: PlantedConfig) -> None:
        self.config = config
        self.directions = self._unit(_DIRECTIONS, config.features, config.d_in)
        """unit rows [features, d_in]"""
        self.mean = config.offset * self._unit(_MEAN, 1, config.d_in)[0]
        """mu [d_in]"""
        self.target_directions = self._unit(_TARGETS, config.features, config.d_out)
        """unit rows [features, d_out]"""
        self.frequency = self._frequencies()
        """[features], the probability that each fires"""

    @property
    def families(self) -> Tensor:
        """(parent, child) of hierarchical data, int64 [children in all, 2]; empty for others."""
        config = self.config
        if config.structure != "hierarchical":
            return torch.empty(0, 2, dtype=torch.int64)
        number = torch.arange(config.features)
        parent = number - number % config.group
        return torch.stack([parent, number], dim=1)[number != parent]

    def sample(self, rows: int, *, stream: int) -> PlantedRows:
        """Rows of a stream; the same stream number and count give the same rows."""
        generator = self._generator(_ROWS, stream)
        on = self._firing(rows, generator)
        codes = on * (1 + torch.rand(rows, self.config.features, generator=generator))
        x = codes @ self.directions + self.mean
        if self.config.noise:
            x += self.config.noise * torch.randn(x.shape, generator=generator)
        return PlantedRows(x, codes, codes @ self.target_directions if self.config.d_out else None)

    def _generator(self, *purpose: int) -> torch.Generator:
        # hashed, so that neither another purpose nor another seed, nor the small seeds that SAEs
        # are initialised with, can give the same numbers
        words = np.random.SeedSequence([self.config.seed, *purpose]).generate_state(2)
        return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)

    def _unit(self, purpose: int, rows: int, width: int) -> Tensor:
        drawn = torch.randn(rows, width, generator=self._generator(purpose))
        return functional.normalize(drawn, dim=1)

    def _frequencies(self) -> Tensor:
        config = self.config
        law = torch.arange(1, config.features // config.group + 1) ** -config.zipf
        share = torch.ones(config.group)
        if config.structure == "hierarchical":
            share[1:] = config.child_probability / config.children
        weights = (law[:, None] * share).reshape(-1)
        frequency = config.active * weights / weights.sum()
        check_range("planted.active (largest frequency)", float(frequency.max()), high=0.5)
        return frequency

    def _firing(self, rows: int, generator: torch.Generator) -> Tensor:
        """bool [rows, features]"""
        config = self.config
        drawn = torch.rand(rows, config.features, generator=generator)
        on = drawn < self.frequency
        if config.structure == "correlated":
            p = self.frequency[0::2]
            otherwise = p * (1 - config.together) / (1 - p)
            on[:, 1::2] = drawn[:, 1::2] < torch.where(on[:, 0::2], config.together, otherwise)
        elif config.structure == "hierarchical":
            # one uniform number chooses among the children and none of them
            place = torch.rand(rows, config.features // config.group, 1, generator=generator)
            chosen = place * config.children / max(config.child_probability, 1e-12)
            child = chosen.floor() == torch.arange(config.children)
            families = on.view(rows, -1, config.group)
            families[..., 1:] = families[..., :1] & child
        return on


class PlantedBatches:
    """An endless stream of batches as the trainer reads it, whose place can be saved."""

    def __init__(self, planted: PlantedDictionary, batch_size: int, *, first: int = 1000) -> None:
        check_range("batch_size", batch_size, low=1)
        self.planted, self.batch_size, self.first = planted, batch_size, first
        self.step = 0

    def __iter__(self) -> Iterator[RawBatch]:
        while True:
            self.step += 1
            rows = self.planted.sample(self.batch_size, stream=self.first + self.step)
            yield RawBatch(rows.x, rows.target)

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a place."""
        self.step = int(state["step"])
