"""Settings of the suite `ravel`."""

from dataclasses import dataclass, replace
from typing import Self

from saescope.config import Config
from saescope.errors import InputError, check_range


@dataclass(frozen=True, kw_only=True)
class RavelConfig(Config):
    """How well features change one attribute of an entity alone."""

    kinds: tuple[str, ...] = ("city", "country")
    """Kinds of entities."""
    entities: int = 200
    """The most entities of a kind, drawn by chance; every other one is for the test."""
    sentences: int = 2
    """Sentences that ask for an attribute."""
    pairs: int = 32
    """The most pairs of entities for an attribute that is changed and one that is asked for."""
    ks: tuple[int, ...] = (16, 64, 256)
    """Numbers of features that may be swapped; the best on training entities is taken."""
    error: bool = True
    """Keep what the SAE does not explain of an activation; without it, reconstructions are put into
    the model, as in SAEBench."""
    seed: int = 0
    """Draws entities, pairs and random features."""

    def __post_init__(self) -> None:
        check_range("ravel.entities", self.entities, low=4)
        check_range("ravel.sentences", self.sentences, low=1, high=2)
        check_range("ravel.pairs", self.pairs, low=4)
        check_range("ravel.seed", self.seed, low=0)
        for each in self.ks:
            check_range("ravel.ks", each, low=1)
        if len(set(self.ks)) < len(self.ks) or not self.ks:
            raise InputError(
                "needs different numbers, one or more", where="ravel.ks", given=self.ks
            )
        if len(set(self.kinds)) < len(self.kinds) or not self.kinds:
            raise InputError(
                "needs different kinds, one or more", where="ravel.kinds", given=self.kinds
            )

    def quick(self) -> Self:
        """A look in a minute: one kind, one sentence, fewer pairs."""
        return replace(
            self,
            kinds=self.kinds[:1],
            entities=min(self.entities, 96),
            sentences=1,
            pairs=min(self.pairs, 12),
            ks=self.ks if self.ks != type(self)().ks else (32, 256),
        )
