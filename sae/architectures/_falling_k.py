"""k falling linearly over the first part of a run, for any architecture with a k."""

from dataclasses import dataclass, field

from sae.core.base import SAEConfig, TrainingState
from sae.core.config import ADDED
from saescope.errors import check_range


@dataclass(frozen=True, kw_only=True)
class FallingKConfig(SAEConfig):
    """The fields of a falling k, of architectures whose k is a mean."""

    k_start: float | None = field(default=None, metadata={ADDED: True})
    """Mean number of features kept at the first step, falling linearly to k; k throughout if not
    given. Steps cost in proportion to the features kept."""
    k_anneal_fraction: float = field(default=0.5, metadata={ADDED: True})
    """Fraction of the run over which k falls from k_start."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k_start is not None:
            check_range("sae.k_start", self.k_start, low=self.k, high=self.d_sae)  # type: ignore[attr-defined]
        check_range("sae.k_anneal_fraction", self.k_anneal_fraction, low=0, high=1)


def falling(start: float, end: float, fraction: float, state: TrainingState) -> float:
    """k at a step: from `start` linearly to `end` over a fraction of the run.

    >>> [falling(60, 20, 0.5, TrainingState(step=s, total_steps=8)) for s in range(6)]
    [60.0, 50.0, 40.0, 30.0, 20.0, 20.0]
    """
    steps = fraction * state.total_steps
    left = max(0.0, 1 - state.step / steps) if steps else 0.0
    return end + (start - end) * left
