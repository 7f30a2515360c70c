"""What a report is made of, whoever shows it: sections of words, tables and charts."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

_NUMBER = re.compile(r"(?:[-+−]?[\d,.]+(?:e[-+]?\d+)?%?(?: ± .*| to .*)?|undefined.*|–?)")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Texts in rows; the first column names the row."""

    title: str = ""
    about: str = ""
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def of_numbers(self) -> tuple[bool, ...]:
        """Of each column, whether its cells begin as numbers do, those that say nothing left out.

        >>> Table(columns=("name", "n", "what"), rows=(("a", "–", "1 cow"), ("b", "-2 ± 1", ""))
        ... ).of_numbers()
        (False, True, False)
        """
        return tuple(
            all(_NUMBER.fullmatch(row[n]) for row in self.rows) for n in range(len(self.columns))
        )


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line, or the bars or points of one colour."""

    name: str
    x: tuple[float, ...]
    """of steps, the bins' edges: one more than there are values"""
    y: tuple[float | None, ...]
    half: tuple[float | None, ...] = ()
    """half of each value's 95% interval, where there are any"""
    labels: tuple[str, ...] = ()
    """what each point is called"""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Numbers to be drawn, and how."""

    key: str
    """tells it from the others of a report"""
    title: str
    about: str = ""
    x: str
    y: str
    kind: Literal["line", "steps", "bars", "points"] = "line"
    series: tuple[Series, ...]
    ticks: tuple[str, ...] = ()
    """names of x = 0, 1, 2, ...; numbers if there are none"""
    log_x: bool = False
    form: str = ".4f"
    """how values are written"""

    def bounds(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top of what is drawn, intervals included."""
        across = [x for each in self.series for x in each.x]
        up = [
            value + sign * half
            for each in self.series
            for value, half in zip(each.y, _halves(each), strict=True)
            if value is not None
            for sign in (-1, 1)
        ]
        low, high = (min(up), max(up)) if up else (0.0, 1.0)
        if self.kind in ("bars", "steps") or 0 <= low < high / 2:
            low = min(low, 0.0)
        margin = 0.06 * (high - low) or 0.5
        return min(across), max(across), low - margin * (low != 0), high + margin

    def numbers(self) -> Table:
        """What is drawn, as a table."""
        if self.kind == "points":
            return self._points()
        rows: dict[float, dict[str, str]] = {}
        for each in self.series:
            for x, value, half in zip(each.x, each.y, _halves(each, None), strict=False):
                rows.setdefault(x, {})[each.name] = self._value(value, half)
        ends = sorted({x for each in self.series for x in each.x})
        texts = [
            (self._across(x, ends), *(rows[x].get(each.name, "") for each in self.series))
            for x in sorted(rows)
        ]
        names = tuple(each.name for each in self.series)
        return Table(title=self.title, about=self.about, columns=(self.x, *names), rows=(*texts,))

    def _points(self) -> Table:
        rows = [
            (label, f"{x:.2f}", self._value(value, half), each.name)
            for each in self.series
            for label, x, value, half in zip(
                each.labels, each.x, each.y, _halves(each, None), strict=True
            )
        ]
        columns = ("SAE", self.x, self.y, "group")
        return Table(title=self.title, about=self.about, columns=columns, rows=(*rows,))

    def _value(self, value: float | None, half: float | None) -> str:
        if value is None:
            return "–"
        return f"{value:{self.form}}" + (f" ± {half:{self.form}}" if half is not None else "")

    def _across(self, x: float, ends: Sequence[float]) -> str:
        if self.ticks:
            return self.ticks[int(x)]
        after = next((end for end in ends if end > x), None)
        return f"{x:.3g} to {after:.3g}" if self.kind == "steps" and after else f"{x:g}"


def _halves(series: Series, none: float | None = 0.0) -> list[Any]:
    given = series.half or (None,) * len(series.y)
    return [none if half is None else half for half in given]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, and what is below it."""

    title: str
    words: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    details: tuple[Table, ...] = ()
    """tables that are for looking up"""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a report says."""

    title: str
    words: tuple[str, ...]
    warnings: tuple[str, ...]
    """what has to be known before figures are compared"""
    sections: tuple[Section, ...]


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within a range, at most `most` + 1 of them.

    >>> nice_ticks(0, 0.23), nice_ticks(16, 64)
    ([0.0, 0.05, 0.1, 0.15, 0.2], [20.0, 30.0, 40.0, 50.0, 60.0])
    """
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * each for each in (1, 2, 5, 10) if power * each >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def by_name(
    series: Mapping[str, Mapping[float, tuple[float | None, float | None]]],
) -> Iterator[Series]:
    """Series from each one's values and halves of intervals by x."""
    for name, points in series.items():
        across = sorted(points)
        yield Series(
            name=name,
            x=(*across,),
            y=tuple(points[x][0] for x in across),
            half=tuple(points[x][1] for x in across),
        )
