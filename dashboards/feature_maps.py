"""The map of features as the Map page draws it: its points, what colours them, and its figure."""

import html
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import streamlit as st

from dashboards import figures
from dashboards.amounts import amount
from dashboards.queries import Version
from store import FeatureStore
from store.feature_map import FeatureMap

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

DEAD, HIT, CHOSEN = "rgba(128,128,128,0.35)", "#e0457b", "#1f9d55"
_DAY = 86_400
_GROUPS = 6
"""of a colouring by names: the largest have colours of their own"""
_NONE = "none"
_SCALE = "Viridis"


@dataclass(frozen=True)
class Colouring:
    """What colours the points: a number of each feature, or a name."""

    title: str
    values: Sequence[float] | Sequence[str]
    """[d_sae]; names are empty where a feature has none"""
    named: bool


@st.cache_data(max_entries=16, ttl=_DAY, show_spinner="Reading the map …")
def points(_store: FeatureStore, version: Version) -> tuple[FeatureMap, pd.DataFrame] | None:
    """The map and all columns of the feature table; None where the store has no map."""
    found = _store.feature_map()
    if found is None:
        return None
    return found, _store.features(limit=_store.d_sae).rows.to_pandas()


@st.cache_data(max_entries=16, ttl=_DAY, show_spinner=False)
def groups(_store: FeatureStore, version: Version, kind: str) -> list[str]:
    """The group of documents of a kind in which each feature fires most above chance, [d_sae]."""
    names = [""] * _store.d_sae
    for feature, name in _store.first_groups(kind).items():
        names[feature] = name
    return names


def group_kinds(store: FeatureStore) -> list[str]:
    """The kinds of groups that a store's documents have."""
    if not store.has_facts:
        return []
    return list(dict.fromkeys(group.kind for group in store.document_groups()))


def figure(
    found: FeatureMap,
    colouring: Colouring,
    names: Sequence[str],
    live: np.ndarray,
    *,
    hits: Collection[int],
    chosen: Collection[int],
    lasso: bool = False,
    height: int = 640,
) -> "Figure":
    """All features as points; those found have a ring, as have those chosen, in another colour.

    Args: names are what the features are called; live [d_sae] is false where one never fires. With
    lasso, the pointer draws one; else it opens features and moves the map.
    """
    from plotly.graph_objects import Figure

    text = np.array(
        [f"feature {n} · {html.escape(name, quote=False)}" for n, name in enumerate(names)]
    )
    drawn = Figure()
    dead = np.flatnonzero(~live)
    if len(dead):
        mark = {"color": DEAD, "size": 4, "symbol": "x-thin-open"}
        _add(drawn, found, dead, text, f"never fire ({len(dead):,})", mark)
    if colouring.named:
        _add_names(drawn, found, colouring, text, live)
    else:
        _add_numbers(drawn, found, colouring, text, live)
    for numbers, colour, wider, what in ((hits, HIT, 4, "found"), (chosen, CHOSEN, 2, "chosen")):
        if numbers:
            ring = {"color": colour, "symbol": "circle-open", "line": {"width": 1.5}}
            ring["size"] = _size(live) + wider
            _add(drawn, found, np.array(list(numbers)), text, f"{what} ({len(numbers):,})", ring)
    axis = {"visible": False, "fixedrange": False}
    drawn.update_layout(
        height=height,
        margin={"l": 0, "r": 0, "t": 30, "b": 0},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        modebar={"bgcolor": "rgba(0,0,0,0)", "orientation": "v"},
        hovermode="closest",
        dragmode="lasso" if lasso else "pan",
        clickmode="event+select",
        xaxis=axis,
        yaxis={**axis, "scaleanchor": "x"},
        showlegend=True,
        legend={"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0, "itemsizing": "constant"},
    )
    return drawn


def _add(
    drawn: "Figure",
    found: FeatureMap,
    numbers: np.ndarray,
    text: np.ndarray,
    name: str,
    marker: Mapping[str, object],
) -> None:
    from plotly.graph_objects import Scattergl

    drawn.add_trace(
        Scattergl(
            x=found.x[numbers],
            y=found.y[numbers],
            mode="markers",
            name=name,
            marker=dict(marker),
            customdata=numbers,
            hovertext=text[numbers],
            hoverinfo="text",
            selected={"marker": {"opacity": 1}},
            unselected={"marker": {"opacity": 0.5}},
        )
    )


def _add_names(
    drawn: "Figure", found: FeatureMap, colouring: Colouring, text: np.ndarray, live: np.ndarray
) -> None:
    names = np.array([str(name) for name in colouring.values])
    counts = pd.Series(names[live & (names != "")]).value_counts()
    largest = list(counts.index[:_GROUPS])
    rest = live & (names != "") & ~np.isin(names, largest)
    bare = live & (names == "")
    for chosen, name, colour in (
        (bare, _NONE, "rgba(128,128,128,0.5)"),
        (rest, "other", figures.COLOURS[-1]),
        *((live & (names == each), each, figures.COLOURS[at]) for at, each in enumerate(largest)),
    ):
        numbers = np.flatnonzero(chosen)
        if len(numbers):
            said = [f"{each}<br>{html.escape(name, quote=False)}" for each in text[numbers]]
            labels = text.copy()
            labels[numbers] = said
            mark = {"color": colour, "size": _size(live), "opacity": 0.8}
            _add(
                drawn,
                found,
                numbers,
                labels,
                f"{html.escape(name, quote=False)} ({len(numbers):,})",
                mark,
            )


def _add_numbers(
    drawn: "Figure", found: FeatureMap, colouring: Colouring, text: np.ndarray, live: np.ndarray
) -> None:
    values = np.array(colouring.values, dtype=float)
    numbers = np.flatnonzero(live & np.isfinite(values))
    missing = np.flatnonzero(live & ~np.isfinite(values))
    if len(missing):
        _add(drawn, found, missing, text, f"no value ({len(missing):,})", {"color": DEAD})
    if not len(numbers):
        return
    shown, bar = _scale(values[numbers], colouring.title)
    labels = text.astype(object)
    labels[numbers] = [
        f"{text[n]}<br>{html.escape(colouring.title, quote=False)} {amount(values[n])}"
        for n in numbers
    ]
    mark = {
        "color": shown,
        "colorscale": _SCALE,
        "colorbar": bar,
        "size": _size(live),
        "opacity": 0.85,
    }
    _add(drawn, found, numbers, labels, f"features ({len(numbers):,})", mark)


def _scale(values: np.ndarray, title: str) -> tuple[np.ndarray, dict[str, object]]:
    """The values that are coloured, and the bar that says what they are: on a logarithmic scale
    where all are above zero and span a hundredfold.

    >>> _scale(np.array([0.001, 1.0]), "density")[1]["ticktext"]
    ['0.001', '0.01', '0.1', '1']
    """
    name = html.escape(title, quote=False)
    bar: dict[str, object] = {
        "title": {"text": name, "side": "bottom"},
        "orientation": "h",
        "thickness": 10,
        "len": 0.7,
        "y": -0.01,
        "yanchor": "top",
    }
    if values.min() <= 0 or values.max() < 100 * values.min():
        return values, bar
    logs = np.log10(values)
    ticks = np.arange(np.ceil(logs.min()), np.floor(logs.max()) + 1)
    bar |= {
        "title": {"text": f"{name} (log scale)", "side": "bottom"},
        "tickvals": ticks.tolist(),
        "ticktext": [f"{10.0**tick:g}" for tick in ticks],
    }
    return logs, bar


def _size(live: np.ndarray) -> float:
    """Diameter of a point: smaller where there are many."""
    return float(np.clip(350 / np.sqrt(max(live.sum(), 1)), 3.5, 9))
