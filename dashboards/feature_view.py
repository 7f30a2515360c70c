"""What the Features page shows, as the page's fields have it and as its address says it."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from store import FeatureFilter
from store.results import Between

STATES = {"live": "Live", "dead": "Dead", "dense": "Dense", "all": "All"}
LABELS = {"any": "Any", "labelled": "Labelled", "unlabelled": "Not yet", "favourites": "★"}
LOOKS = {"table": "Table", "scatter": "Scatter"}
SEARCHES = {"words": "Words", "meaning": "Meaning"}
_LONGEST = 200
_NAMES = {
    "feature": "number",
    "density": "density",
    "max": "strongest activation",
    "mean": "mean activation",
    "std": "spread of activations",
    "n_active": "positions",
    "n_documents": "documents",
    "output_score": "output score",
    "confidence_change": "change of token confidence",
    "measured_kl": "measured effect (KL)",
    "measured_positions": "positions measured",
}


def column_names(columns: Collection[str]) -> dict[str, str]:
    """Columns of the feature table, and what readers call them.

    >>> column_names(["max", "decoder_norm"])
    {'max': 'strongest activation', 'decoder_norm': 'decoder norm'}
    """
    return {name: _NAMES.get(name, name.replace("_", " ")) for name in columns}


@dataclass(frozen=True, kw_only=True)
class FeatureView:
    """Filters, order and look; None means no bound. Each field is a parameter of the address."""

    q: str = ""
    """Words of a label or note, tokens, or a number; or, by meaning, any text."""
    by: str = "words"
    """How `q` is looked for: "words" or "meaning"."""
    state: str = "live"
    label: str = "any"
    density_from: float | None = None
    density_to: float | None = None
    max_from: float | None = None
    max_to: float | None = None
    group: str = ""
    """A topic or source in which the feature fires more often than by chance, as "topic:Arts"."""
    layer: str = ""
    """The layer, from 0, at which the feature of an SAE of several does most."""
    column: str = ""
    """A further column to filter by."""
    column_from: float | None = None
    column_to: float | None = None
    sort: str = "feature"
    order: str = "up"
    look: str = "table"
    x: str = "density"
    y: str = "max"

    def address(self) -> dict[str, str | None]:
        """Parameters of the address: what differs from an untouched page.

        >>> FeatureView(q="Paris", max_from=0.5).address()["max_from"]
        '0.5'
        """
        untouched = FeatureView()
        found: dict[str, str | None] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            same = value is None or value == getattr(untouched, field.name)
            found[field.name] = None if same else _text(value)
        return found

    @property
    def filters_set(self) -> int:
        """How many filters are not as on an untouched page; the search is none of them.

        >>> FeatureView(q="Paris", state="dead", max_from=1, max_to=2).filters_set
        2
        """
        untouched = FeatureView()
        names = ("state", "label", "group", "layer")
        chosen = sum(getattr(self, name) != getattr(untouched, name) for name in names)
        bounds = [
            (self.density_from, self.density_to),
            (self.max_from, self.max_to),
            (self.column_from, self.column_to),
        ]
        return chosen + sum(pair != (None, None) for pair in bounds)

    def filter(self, ids: Collection[int] | None, without: Collection[int] | None) -> FeatureFilter:
        """The store's filter; ids and without are what a search and the labels make of features."""
        between = ()
        if self.column and (self.column_from is not None or self.column_to is not None):
            between = (Between(self.column, self.column_from, self.column_to),)
        if self.layer:
            between = (*between, Between("layer_peak", int(self.layer), int(self.layer)))
        return FeatureFilter(
            ids=None if ids is None else tuple(ids),
            not_ids=None if without is None else tuple(without),
            density_min=self.density_from,
            density_max=self.density_to,
            activation_min=self.max_from,
            activation_max=self.max_to,
            between=between,
            state=self.state,
        )


PARAMETERS = tuple(field.name for field in fields(FeatureView))
_NUMBERS = [name for name in PARAMETERS if name.endswith(("_from", "_to"))]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def view_of(
    given: Mapping[str, str],
    columns: Collection[str],
    groups: Collection[str] = (),
    layers: Collection[str] = (),
) -> tuple[FeatureView, list[str]]:
    """The view that an address asks for, and the parameters that make no sense, which are left out.

    Args: columns are those of the store that have numbers; groups and layers, those that it has, as
    the fields of `FeatureView` say them.

    >>> view_of({"q": "Paris", "state": "gone"}, ["density"])[1]
    ['state']
    """
    choices: dict[str, Collection[str]] = {
        "by": SEARCHES,
        "state": STATES,
        "label": LABELS,
        "look": LOOKS,
        "order": ("up", "down"),
        "group": groups,
        "layer": layers,
        **dict.fromkeys(("column", "sort", "x", "y"), columns),
    }
    good: dict[str, object] = {}
    wrong = []
    for name, raw in given.items():
        if name == "q":
            good[name] = raw[:_LONGEST]
        elif name in _NUMBERS:
            number = _number(raw)
            if number is None:
                wrong.append(name)
            else:
                good[name] = number
        elif raw in choices.get(name, ()):
            good[name] = raw
        else:
            wrong.append(name)
    return FeatureView(**good), wrong  # pyright: ignore[reportArgumentType]


def _number(raw: str) -> float | None:
    try:
        value = float(raw[:30])
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def matching(text: str, tokens: Mapping[int, Collection[str]]) -> list[int]:
    """The features among whose top tokens one begins with this text, whatever its case.

    >>> matching("par", {1: [" Paris"], 2: [" spar", "the"]})
    [1]
    """
    wanted = text.strip().casefold()
    return [
        feature
        for feature, mine in tokens.items()
        if any(token.strip().casefold().startswith(wanted) for token in mine)
    ]
