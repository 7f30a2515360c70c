"""How many times as much the features of the top quarter of a score do as the bottom quarter's."""

import numpy as np
from numpy.typing import NDArray

_DRAWS = 2000


def quarters(scores: NDArray[np.float64], values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean value of the features in the lowest and in the highest quarter of a score."""
    order, quarter = np.argsort(scores, kind="stable"), len(scores) // 4
    return float(values[order[:quarter]].mean()), float(values[order[-quarter:]].mean())


def times(low: float, high: float) -> float:
    """How many times as much the second is; infinite where the first is nothing or less."""
    return high / low if low > 0 else float("inf") if high > 0 else float("nan")


def ratio_of(
    scores: NDArray[np.float64], values: NDArray[np.float64]
) -> tuple[float, float, float]:
    """Top over bottom quarter of a score, with its 95 % bootstrap interval over features."""
    rng = np.random.default_rng(0)
    drawn = np.array(
        [
            times(*quarters(scores[some], values[some]))
            for some in rng.integers(0, len(scores), (_DRAWS, len(scores)))
        ]
    )
    drawn[np.isnan(drawn)] = 1.0  # nothing in either quarter
    low, high = np.quantile(drawn, (0.025, 0.975), method="nearest")
    return times(*quarters(scores, values)), float(low), float(high)


def certain(found: tuple[float, float, float]) -> tuple[float, float]:
    """What makes a score the best: its ratio, and of infinite ones the lower end."""
    return (found[0] if np.isfinite(found[0]) else 1e9, found[1])


def ratio_words(found: tuple[float, float, float]) -> str:
    """A ratio with its interval, and whether it is twice, and surely more than once.

    >>> ratio_words((2.5, 1.4, 4.0)), ratio_words((2.5, 0.9, 8.0)), ratio_words((1.2, 1.1, 1.3))
    ('**2.5** (1.4 to 4.0)', '2.5 (0.9 to 8.0)', '1.2 (1.1 to 1.3)')
    """
    value, low, high = (f"{each:.1f}" if np.isfinite(each) else "∞" for each in found)
    return f"{f'**{value}**' if reached(found) else value} ({low} to {high})"


def reached(found: tuple[float, float, float]) -> bool:
    """Whether the top quarter does at least twice as well, and the interval excludes once."""
    return found[0] >= 2 and found[1] > 1
