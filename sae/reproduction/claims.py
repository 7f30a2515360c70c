"""Claims, each beside its null: a difference with its interval decides.

Differences are paired: of trials that share the seed (or the prompt, or the set) only what is
compared differs. A claim holds if its 95% interval by Student's t is above 0.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sae.probing.scores import mean_and_interval


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One comparison, turned so that above 0 is what the paper claims."""

    says: str
    ours: float
    null: float
    gain: float
    half: float | None
    """half of the gain's 95% interval; None of a single pair"""
    pairs: int
    over: str
    """what is paired, in words: seeds"""
    form: str = ".3f"

    @property
    def holds(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.half is not None and self.gain - self.half > 0


def claim(
    says: str,
    ours: Sequence[float],
    null: Sequence[float],
    *,
    lower: bool = False,
    over: str = "seeds",
    form: str = ".3f",
) -> Claim:
    """The claim that `ours` is above `null`, or below it; equal indices are pairs.

    >>> claim("more", [3.0, 4.0, 5.0], [1.0, 2.0, 3.5]).holds
    True
    >>> claim("less", [3.0, 4.0, 5.0], [1.0, 2.0, 3.5], lower=True).holds
    False
    """
    sign = -1 if lower else 1
    gains = [sign * (a - b) for a, b in zip(ours, null, strict=True)]
    gain, half = mean_and_interval(gains)
    return Claim(
        says=says,
        ours=mean_and_interval(ours)[0],
        null=mean_and_interval(null)[0],
        gain=gain,
        half=half,
        pairs=len(gains),
        over=over,
        form=form,
    )


def column(
    rows: Sequence[Mapping[str, Any]], name: str, *, by: str = "seed", **settings: Any
) -> list[float]:
    """A value of the rows that have these settings, in the order of `by`.

    >>> rows = [{"seed": 1, "k": 2, "fvu": 0.3}, {"seed": 0, "k": 2, "fvu": 0.1}]
    >>> column(rows, "fvu", k=2)
    [0.1, 0.3]
    """
    found = [row for row in rows if all(row[key] == value for key, value in settings.items())]
    if len({row[by] for row in found}) != len(found):
        raise ValueError(f"several rows with {settings} have the same {by}")
    return [row[name] for row in sorted(found, key=lambda row: row[by])]


def value_at(row: Mapping[str, Any], *path: str | int) -> float:
    """What a row has under some keys and indices, one in the other.

    >>> value_at({"fvu": {"late": [0.1, 0.2]}}, "fvu", "late", 1)
    0.2
    """
    found: Any = row
    for each in path:
        found = found[each]
    return found


def by_seed(rows: Sequence[Mapping[str, Any]], *path: str | int) -> list[float]:
    """The mean of a value over the rows of each seed, in the order of seeds.

    >>> by_seed([{"seed": 1, "a": 2}, {"seed": 0, "a": 3}, {"seed": 1, "a": 4}], "a")
    [3.0, 3.0]
    """
    found: dict[int, list[float]] = {}
    for row in rows:
        found.setdefault(row["seed"], []).append(value_at(row, *path))
    return [sum(found[seed]) / len(found[seed]) for seed in sorted(found)]


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """A mean with half of its 95% interval, as tables have it.

    >>> spread([1.0, 1.0]), spread([0.5])
    ('1.000 ± 0.000', '0.500')
    """
    mean, half = mean_and_interval(values)
    return f"{mean:{form}}" + (f" ± {half:{form}}" if half is not None else "")


def points(
    rows: Sequence[Mapping[str, Any]],
    name: str,
    x: str,
    *,
    value: Callable[[float], float] = float,
    **settings: Any,
) -> dict[float, tuple[float | None, float | None]]:
    """A line of a chart: by `x`, the mean of a value over the other settings, and its interval."""
    found = [row for row in rows if all(row[key] == given for key, given in settings.items())]
    return {
        float(at): mean_and_interval([value(row[name]) for row in found if row[x] == at])
        for at in sorted({row[x] for row in found})
    }
