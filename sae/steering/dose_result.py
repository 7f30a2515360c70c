"""A dose-response as numbers: tables with intervals over texts, the sweet spot, files."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saescope.artefact import write_bytes
from saescope.errors import InputError

SOURCES = ("feature", "random", "untrained")
MOST_KL = 1.0
"""nats a token: the most collateral of a sweet spot"""
_DRAWS = 2000
_SEED = 20_261


@dataclass(frozen=True, kw_only=True)
class SweetSpot:
    """The strength with the largest effect at little collateral, with 95 % intervals over texts."""

    strength: float | None
    """None where every strength has too much collateral"""
    strength_low: float | None
    strength_high: float | None
    effect: float | None
    effect_low: float | None
    effect_high: float | None
    null: float | None
    """mean of the same of random and untrained directions, each at its own best strength"""
    above_null: float | None
    """effect - null"""
    above_null_low: float | None
    above_null_high: float | None
    kl: float | None
    """at the strength, in nats a token"""

    @property
    def succeeds(self) -> bool:
        """Whether the effect is above the null, by the interval."""
        return self.above_null_low is not None and self.above_null_low > 0


@dataclass(frozen=True, kw_only=True)
class DoseResponse:
    """What directions do at each strength, text by text."""

    feature: int
    strengths: tuple[float, ...]
    """in the model's units"""
    sources: tuple[str, ...]
    """of each direction: "feature" (the first), "random" or "untrained" """
    words: tuple[str, ...]
    """names of the sets of words"""
    values: Mapping[str, NDArray[np.float64]]
    """each metric [directions, strengths, texts]; see `sae.steering.dose`"""

    def metric(self, name: str, words: str | None = None) -> NDArray[np.float64]:
        """A metric [directions, strengths, texts]. InputError for one that there is not.

        Args: words names the set of words, for word_rate and target.
        """
        key = name if words is None else f"{name}:{words}"
        if key not in self.values:
            raise InputError("no such metric", where="dose", given=key, allowed=list(self.values))
        return np.asarray(self.values[key], np.float64)

    def table(self) -> list[dict[str, Any]]:
        """A row for each source and strength: every metric's mean over directions and texts, and
        its 95 % bootstrap interval over texts, as NAME, NAME_low and NAME_high."""
        draws = self._draws()
        rows = []
        for source in SOURCES:
            own = [each == source for each in self.sources]
            for at, strength in enumerate(self.strengths):
                row: dict[str, Any] = {
                    "feature": self.feature,
                    "source": source,
                    "strength": strength,
                    "directions": sum(own),
                    "texts": self._texts,
                }
                for name, values in self.values.items():
                    by_text = np.asarray(values, np.float64)[own, at].mean(0)
                    low, high = np.quantile(by_text[draws].mean(1), (0.025, 0.975))
                    row |= {name: float(by_text.mean())}
                    row |= {f"{name}_low": float(low), f"{name}_high": float(high)}
                rows.append(row)
        return rows

    def sweet_spot(
        self,
        metric: str = "word_rate",
        words: str | None = None,
        *,
        most_kl: float = MOST_KL,
        direction: int = 0,
    ) -> SweetSpot:
        """The strength with the largest mean of a metric among those below so much KL.

        Every resampling of the texts chooses anew, and each null direction its own best strength,
        so that choosing favours nobody. Args: direction is the number of the one that is asked
        about, the feature's unless one asks what the test makes of a null.
        """
        first = self.words[0] if metric in ("word_rate", "target") else None
        effect, kl = self.metric(metric, words or first), self.metric("kl")
        nulls = [i for i, s in enumerate(self.sources) if s != "feature" and i != direction]
        every = [np.arange(self._texts), *self._draws()]
        rows = []
        for drawn in every:
            means, losses = effect[:, :, drawn].mean(2), kl[:, :, drawn].mean(2)
            allowed = np.where(losses < most_kl, means, -np.inf)
            best = allowed.argmax(1)
            found = np.where(np.isfinite(allowed.max(1)), allowed.max(1), np.nan)
            null = found[nulls]
            middle = np.nanmean(null) if np.isfinite(null).any() else np.nan
            own = found[direction]
            chosen = self.strengths[best[direction]] if np.isfinite(own) else np.nan
            rows.append((chosen, own, middle, own - middle, losses[direction, best[direction]]))
        table = np.array(rows)
        if not np.isfinite(table[0, 0]):
            return SweetSpot(**dict.fromkeys(SweetSpot.__dataclass_fields__))
        low, high = (_quantile(table[1:], q) for q in (0.025, 0.975))
        return SweetSpot(
            strength=table[0, 0],
            strength_low=low[0],
            strength_high=high[0],
            effect=table[0, 1],
            effect_low=low[1],
            effect_high=high[1],
            null=_or_none(table[0, 2]),
            above_null=_or_none(table[0, 3]),
            above_null_low=low[3],
            above_null_high=high[3],
            kl=table[0, 4],
        )

    @property
    def _texts(self) -> int:
        return next(iter(self.values.values())).shape[-1]

    def _draws(self) -> NDArray[np.int64]:
        rng = np.random.default_rng(_SEED)
        return rng.integers(0, self._texts, (_DRAWS, self._texts))

    def to_json(self) -> dict[str, Any]:
        """All of it, with the table and the sweet spot of each set of words."""
        return {
            "feature": self.feature,
            "strengths": list(self.strengths),
            "sources": list(self.sources),
            "values": {name: np.asarray(each).tolist() for name, each in self.values.items()},
            "table": self.table(),
            "sweet_spots": {
                f"{metric}:{name}": asdict(self.sweet_spot(metric, name))
                for metric in ("word_rate", "target")
                for name in self.words
            },
        }

    def save(self, path: str | Path) -> None:
        """Write the table as .csv, or all of it as .json. InputError for another ending."""
        file = Path(path)
        if file.suffix == ".json":
            text = json.dumps(self.to_json(), indent=1) + "\n"
        elif file.suffix == ".csv":
            rows, stream = self.table(), io.StringIO(newline="")
            writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            text = stream.getvalue()
        else:
            raise InputError("is no such file", where="out", given=str(path), allowed=".csv, .json")
        write_bytes(file, text.encode())


def _quantile(table: NDArray[np.float64], q: float) -> list[float | None]:
    """A quantile of each column over resamplings that have a sweet spot."""
    return [
        _or_none(np.quantile(column[np.isfinite(column)], q)) if np.isfinite(column).any() else None
        for column in table.T
    ]


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
