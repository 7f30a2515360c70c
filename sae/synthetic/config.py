"""What a synthetic world is, and the worlds that have a name."""

from dataclasses import dataclass
from typing import Any

from saescope.config import Config
from saescope.errors import InputError, check_range


@dataclass(frozen=True, kw_only=True)
class WorldConfig(Config):
    """A synthetic world: its features, their directions, and when and how strongly they fire."""

    features: int = 2048
    """True features, the most frequent first."""
    d_in: int = 192
    """Width of the rows."""
    zipf: float = 0.5
    """Exponent of the law of frequencies: a feature's probability falls with rank^-zipf."""
    largest_probability: float = 0.4
    """Probability of the first feature."""
    smallest_probability: float = 5e-4
    """Probability of the last feature."""
    roots: int = 16
    """Trees; the first features are their roots, those that no tree takes stand alone. 0: none."""
    children: int = 4
    """Children of each parent; a child fires only where its parent does."""
    depth: int = 3
    """Generations below a root."""
    exclusive: bool = True
    """At most one child of a parent fires."""
    scale_children: bool = True
    """A child's amount is multiplied by its parent's, over the parent's mean."""
    compensate: bool = True
    """Children are drawn so much more often that they fire about as often as the law says."""
    correlation_rank: int = 25
    """Common causes that make features fire together or apart; 0: none."""
    correlation_scale: float = 0.1
    """Standard deviation of a feature's weight on each common cause."""
    first_mean: float = 5.0
    """Mean amount of the first feature."""
    last_mean: float = 4.0
    """Mean amount of the last feature; between them it falls in a straight line."""
    deviation_mean: float = 0.5
    """Of the normal distribution whose magnitudes are the amounts' standard deviations: mean."""
    deviation_spread: float = 0.5
    """Of the same: standard deviation. 0: all are deviation_mean."""
    bias: float = 0.5
    """Norm of the constant that is added to every row."""
    orthogonalisation_steps: int = 100
    """Steps that push the directions apart; 0 leaves them random."""
    orthogonalisation_lr: float = 3e-4
    """Learning rate of these steps (Adam)."""
    seed: int = 42
    """Decides the directions, the common causes' weights and the amounts' deviations."""

    def __post_init__(self) -> None:
        for name in ("features", "d_in", "children", "depth"):
            check_range(f"world.{name}", getattr(self, name), low=1)
        for name in (
            "zipf",
            "roots",
            "correlation_rank",
            "correlation_scale",
            "deviation_mean",
            "deviation_spread",
            "bias",
            "orthogonalisation_steps",
            "seed",
        ):
            check_range(f"world.{name}", getattr(self, name), low=0)
        for name in ("first_mean", "last_mean", "orthogonalisation_lr"):
            check_range(f"world.{name}", getattr(self, name), above=0)
        check_range("world.seed", self.seed, below=2**63)
        check_range("world.features", self.features, below=2**31)
        check_range("world.largest_probability", self.largest_probability, above=0, high=1)
        check_range(
            "world.smallest_probability",
            self.smallest_probability,
            above=0,
            high=self.largest_probability,
        )
        if self.roots > self.features:
            raise InputError(
                "more trees than features",
                where="world.roots",
                given=self.roots,
                allowed=f"up to {self.features}",
            )


PREFIX = "synth:"
"""before a world's name, where the name of a harvest is expected"""
WORLDS = {
    "16k": WorldConfig(features=16_384, d_in=768, roots=128),
    "small": WorldConfig(),
    "tiny": WorldConfig(features=96, d_in=32, roots=4, children=3, depth=2, correlation_rank=8),
}
"""16k: SynthSAEBench-16k, its second version; small: the same at an eighth of the features, with an
eighth of the trees, for tests of minutes; tiny: for tests of seconds."""


def world_config(name: str, **changes: Any) -> WorldConfig:
    """The configuration of a world by its name; InputError if none has it.

    >>> world_config("small").features
    2048
    """
    if name not in WORLDS:
        raise InputError("no such world", where="world", given=name, allowed=tuple(WORLDS))
    found = WORLDS[name]
    return found if not changes else WorldConfig(**{**vars(found), **changes})
