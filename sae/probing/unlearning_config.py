"""Settings of the suite that clamps features to make a model forget a subject."""

from dataclasses import dataclass, replace
from typing import Self

from saescope.config import Config
from saescope.errors import InputError, check_range


@dataclass(frozen=True, kw_only=True)
class UnlearningConfig(Config):
    """Which texts are to be forgotten, and how features are clamped."""

    subject: str = "ovos/topic=Biology and health sciences"
    """A set of labelled texts (see probing.sets): those with the label are to be forgotten, the
    others are to be retained."""
    texts: int = 200
    """The most texts of each, drawn by chance: half choose features, a quarter the clamp, a quarter
    are the test."""
    ns: tuple[int, ...] = (10, 20)
    """Numbers of features that are clamped."""
    strengths: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0)
    """Where active they are set to so many times their mean activation, negative."""
    sparse: float = 0.01
    """Features that fire on as large a share of retained tokens are never clamped."""
    harm: float = 0.01
    """The most that cross-entropy on retained texts may rise, as a share of it."""
    draws: int = 3
    """Draws of random features of equal firing rate."""
    max_tokens: int = 64
    """Tokens of a text that are run, its last ones."""

    def __post_init__(self) -> None:
        check_range("unlearning.texts", self.texts, low=16)
        for name in ("ns", "strengths"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise InputError(
                    "needs different numbers, one or more",
                    where=f"unlearning.{name}",
                    given=values,
                )
        for each in self.ns:
            check_range("unlearning.ns", each, low=1)
        for each in self.strengths:
            check_range("unlearning.strengths", each, low=0)
        check_range("unlearning.sparse", self.sparse, above=0, high=1)
        check_range("unlearning.harm", self.harm, above=0)
        check_range("unlearning.draws", self.draws, low=1, high=100)
        check_range("unlearning.max_tokens", self.max_tokens, low=3)

    def quick(self) -> Self:
        """A look in a minute: fewer texts, clamps and draws."""
        return replace(
            self,
            texts=min(self.texts, 80),
            ns=self.ns[-1:],
            strengths=self.strengths[1::2] or self.strengths,
            draws=1,
        )
