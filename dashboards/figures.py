"""Plotly figures: one quiet look, legible on light and dark, axes with units."""

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pandas.api import types as pd_types

from dashboards.amounts import amount, span
from dashboards.tokens import plain_visible
from store.results import Histogram, PositionProfile

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

BLUE, ORANGE, GREEN, GREY = "#3d7ea6", "#d98032", "#3f9c7a", "#8a8f98"
COLOURS = (BLUE, ORANGE, GREEN, "#b05a7a", "#8a6fb0", "#c9a227", GREY)
_NAMED = 12
"""points of a chart, up to which each is marked or named"""
_AXIS = "rgba(128,128,128,0.35)"
_GRID = "rgba(128,128,128,0.16)"
_FEW = 20
_LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom"}
CONFIG = {"displayModeBar": False, "scrollZoom": False}
_NUMBERS_THAT_NAME = ("feature", "other", "token_id", "document", "sequence")
DOWNLOADABLE = {
    "displaylogo": False,
    "modeBarButtons": [["toImage"]],
    "toImageButtonOptions": {"format": "svg", "filename": "saescope"},
    "scrollZoom": False,
}
"""for a chart with a button that saves it as a picture"""


def finish(figure: "Figure", x: str, y: str, height: int) -> "Figure":
    """Give a figure the explorer's look, titles of its axes and a height in pixels."""
    figure.update_layout(
        height=height,
        margin={"l": 4, "r": 8, "t": 8, "b": 4},
        bargap=0.06,
        showlegend=False,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hovermode="x",
        dragmode=False,
    )
    figure.update_xaxes(
        title={"text": x, "standoff": 6},
        showgrid=False,
        zeroline=False,
        linecolor=_AXIS,
        ticks="outside",
        tickcolor=_AXIS,
        ticklen=4,
        automargin=True,
        fixedrange=True,
    )
    figure.update_yaxes(
        title={"text": y, "standoff": 6},
        gridcolor=_GRID,
        zeroline=False,
        automargin=True,
        fixedrange=True,
        nticks=5,
    )
    return figure


def activation_histogram(histogram: Histogram, height: int = 210) -> "Figure":
    """How many positions have which activation; many are counted on a logarithmic axis."""
    from plotly.graph_objects import Bar, Figure

    edges, counts = histogram.edges, histogram.counts
    middle = (edges[:-1] + edges[1:]) / 2
    text = [
        f"{span(low, high)}: {count:,} positions"
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    bars = Bar(
        x=middle,
        y=np.where(counts > 0, counts, np.nan),
        width=np.diff(edges) * 0.94,
        marker={"color": BLUE, "line": {"width": 0}},
        hovertext=text,
        hoverinfo="text",
    )
    figure = finish(Figure(bars), "activation", "positions", height)
    if counts.max() > _FEW:
        top = np.log10(counts.max())
        # starting below 1, so that a bin with a single position can be seen
        figure.update_yaxes(type="log", range=[-0.3, top + 0.15], dtick=1 if top < 4 else 2)
        figure.update_yaxes(title="positions (log scale)")
    else:
        figure.update_yaxes(rangemode="tozero", dtick=max(int(counts.max()) // 4, 1))
    figure.update_xaxes(range=[0, float(edges[-1]) * 1.01])
    return figure


def density_histogram(densities: np.ndarray, height: int = 260) -> "Figure":
    """How many live features fire how often, four bins a decade."""
    from plotly.graph_objects import Bar, Figure

    logs = np.log10(densities[densities > 0])
    low = min(np.floor(logs.min(initial=-1.0)), -1.0)
    bins = round(-4 * low)
    edges = np.linspace(low, 0.0, bins + 1)
    # a feature that always fires belongs to the last bin
    counts = np.bincount(np.minimum((4 * (logs - low)).astype(int), bins - 1), minlength=bins)
    text = [
        f"{percent(10**a)} to {percent(10**b)} of positions: {count:,} features"
        for a, b, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    bars = Bar(
        x=edges[:-1] + 0.125,
        y=counts,
        width=0.235,
        marker={"color": BLUE, "line": {"width": 0}},
        hovertext=text,
        hoverinfo="text",
    )
    figure = finish(
        Figure(bars), "density (share of positions at which a feature fires)", "features", height
    )
    ticks = np.arange(low, 0.5)
    figure.update_xaxes(
        tickvals=ticks, ticktext=[percent(10.0**tick) for tick in ticks], range=[low - 0.05, 0.08]
    )
    return figure


def scatter(
    points: "DataFrame",
    x: str,
    y: str,
    names: Sequence[str],
    titles: Mapping[str, str],
    height: int = 560,
) -> "Figure":
    """A point a feature; `points` has the columns feature, x and y, names what each is called."""
    from plotly.graph_objects import Figure, Scattergl

    across, up = points[x].to_numpy(), points[y].to_numpy()
    text = [
        f"feature {number} · {html.escape(name, quote=False)}<br>"
        f"{titles[x]} {amount(a)}, {titles[y]} {amount(b)}"
        for number, name, a, b in zip(points["feature"], names, across, up, strict=True)
    ]
    dots = Scattergl(
        x=across,
        y=up,
        mode="markers",
        marker={"color": BLUE, "size": 6, "opacity": 0.55},
        selected={"marker": {"color": ORANGE, "opacity": 1}},
        unselected={"marker": {"opacity": 0.55}},
        hovertext=text,
        hoverinfo="text",
    )
    figure = finish(Figure(dots), titles[x], titles[y], height)
    figure.update_layout(hovermode="closest", clickmode="event+select")
    logarithmic = {"type": "log", "dtick": 1, "exponentformat": "power"}
    if _spans_decades(across):
        figure.update_xaxes(**logarithmic, title=f"{titles[x]} (log scale)")
    if _spans_decades(up):
        figure.update_yaxes(**logarithmic, title=f"{titles[y]} (log scale)")
    return figure


def pareto(points: "DataFrame", y: str, titles: Mapping[str, str], height: int = 300) -> "Figure":
    """SAEs by L0 and another metric, with 95% intervals; a colour a protocol.

    Args: points has the columns name, protocol, l0, y and half (of the interval; NaN without).
    """
    from plotly.graph_objects import Figure, Scatter

    figure = Figure()
    for number, (protocol, mine) in enumerate(points.groupby("protocol", sort=True)):
        figure.add_trace(
            Scatter(
                x=mine["l0"].tolist(),
                y=mine[y].tolist(),
                error_y={"array": mine["half"].tolist(), "thickness": 1, "width": 3},
                mode="markers+text" if len(points) <= _NAMED else "markers",
                text=[f" {html.escape(name)} " for name in mine["name"]],
                # beside the interval's bar, on the side where there is room
                textposition=[
                    "middle right" if l0 < points["l0"].max() / 2 else "middle left"
                    for l0 in mine["l0"]
                ],
                textfont={"size": 11},
                hovertext=[
                    f"{html.escape(name)}<br>L0 {amount(l0)}, {titles[y]} {amount(value, 4)}"
                    for name, l0, value in zip(mine["name"], mine["l0"], mine[y], strict=True)
                ],
                hoverinfo="text",
                marker={"color": (BLUE, ORANGE, GREEN, GREY)[min(number, 3)], "size": 9},
                name=f"protocol {str(protocol)[:8] or 'unknown'}",
                cliponaxis=False,
            )
        )
    figure = finish(figure, titles["l0"], titles[y], height)
    several = points["protocol"].nunique() > 1
    figure.update_layout(hovermode="closest", showlegend=several, legend=_LEGEND)
    figure.update_layout(margin={"t": 26})
    figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(rangemode="tozero")
    return figure


def curves(
    lines: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    title: str,
    *,
    logarithmic: bool = False,
    log_tokens: bool = False,
    height: int = 240,
) -> "Figure":
    """A measurement of several runs over tokens: (run's name, tokens, values) each."""
    from plotly.graph_objects import Figure, Scatter

    figure = Figure()
    for number, (name, tokens, values) in enumerate(lines):
        figure.add_trace(
            Scatter(
                x=list(tokens),
                y=list(values),
                mode="lines+markers" if len(values) < _NAMED else "lines",
                name=html.escape(name),
                line={"color": COLOURS[number % len(COLOURS)], "width": 2},
                marker={"size": 5},
                hovertemplate="%{y:.4g} at %{x:,.3s} tokens<extra>"
                + html.escape(name)
                + "</extra>",
            )
        )
    figure = finish(figure, "tokens", title, height)
    figure.update_layout(hovermode="closest", showlegend=len(lines) > 1, legend=_LEGEND)
    if logarithmic:
        figure.update_yaxes(type="log", dtick=1, exponentformat="power")
    if log_tokens:
        figure.update_xaxes(type="log", dtick=1, title="tokens (log scale)")
    return figure


def _spans_decades(values: np.ndarray) -> bool:
    """Whether an axis of these values is better logarithmic."""
    known = values[np.isfinite(values.astype(float))]
    return bool(len(known) and known.min() > 0 and np.log10(known.max() / known.min()) > 2)


def percent(share: float) -> str:
    """A share as a percentage with two or three figures.

    >>> percent(0.5), percent(0.0123), percent(0.00001), percent(0.0)
    ('50 %', '1.23 %', '0.001 %', '0 %')
    """
    value = 100 * share
    if value == 0:
        return "0 %"
    digits = max(2 - int(np.floor(np.log10(value))), 0)
    text = f"{value:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} %"


def position_profile(profile: PositionProfile, height: int = 170) -> "Figure":
    """At which share of the kept positions of each stretch of a sequence a feature fires."""
    from plotly.graph_objects import Bar, Figure

    low, high = profile.edges[:-1], profile.edges[1:] - 1
    share = 100 * profile.counts / np.maximum(profile.kept, 1)
    text = [
        f"index {a}{'' if a == b else f' to {b}'}: {count:,} of {kept:,} positions"
        for a, b, count, kept in zip(low, high, profile.counts, profile.kept, strict=True)
    ]
    bars = Bar(
        x=(low + high) / 2,
        y=np.where(profile.counts > 0, share, np.nan),
        width=(high - low + 1) * 0.94,
        marker={"color": BLUE, "line": {"width": 0}},
        hovertext=text,
        hoverinfo="text",
    )
    figure = finish(Figure(bars), "index in the sequence", "% of positions", height)
    figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(range=[-0.5, float(profile.edges[-1]) - 0.5])
    return figure


def difference_scatter(rows: "DataFrame", fdr: float, height: int = 330) -> "Figure":
    """Features by how often they fire and in which group more, those that differ in colour.

    rows: columns feature, density_a, density_b, log2_ratio, q; each point carries its feature.
    """
    from plotly.graph_objects import Figure, Scattergl

    differs = (rows["q"] <= fdr).to_numpy()
    up = (rows["log2_ratio"] > 0).to_numpy()
    figure = Figure()
    for name, chosen, colour in (
        ("no difference found", ~differs, "rgba(128,128,128,0.45)"),
        ("more in A", differs & up, BLUE),
        ("more in B", differs & ~up, ORANGE),
    ):
        some = rows[chosen]
        text = [
            f"feature {f}: {percent(a)} of A, {percent(b)} of B"
            for f, a, b in zip(some["feature"], some["density_a"], some["density_b"], strict=True)
        ]
        figure.add_trace(
            Scattergl(
                x=some[["density_a", "density_b"]].max(axis=1),
                y=some["log2_ratio"],
                mode="markers",
                name=f"{name} ({len(some):,})",
                marker={"color": colour, "size": 5 if name[0] == "n" else 7},
                customdata=some["feature"],
                hovertext=text,
                hoverinfo="text",
            )
        )
    finish(figure, "density where it fires more", "log₂ (density in A / density in B)", height)
    figure.update_layout(
        hovermode="closest",
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    largest = max(float(rows[["density_a", "density_b"]].to_numpy().max()), 1e-9)
    ticks = [10.0**e for e in range(-7, 1) if 10.0**e < 3 * largest]
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=[percent(t) for t in ticks])
    figure.update_yaxes(zeroline=True, zerolinecolor=_AXIS)
    return figure


def query_chart(frame: "DataFrame", x: str, y: str, kind: str, height: int = 380) -> "Figure":
    """A column of numbers over another column: "bar", "line" or "point"."""
    from plotly.graph_objects import Bar, Figure, Scatter

    # numbers of features and the like are names: between 3 and 900 is nothing
    numeric = pd_types.is_numeric_dtype(frame[x]) and x not in _NUMBERS_THAT_NAME
    across = [value if numeric else _literal(value) for value in frame[x].tolist()]
    up = frame[y].tolist()
    if kind == "bar":
        trace = Bar(x=across, y=up, marker={"color": BLUE, "line": {"width": 0}})
    else:
        mode = "lines" if kind == "line" else "markers"
        trace = Scatter(x=across, y=up, mode=mode, marker={"color": BLUE}, line={"color": BLUE})
    trace.hovertemplate = "%{x}: %{y}<extra></extra>"
    figure = finish(Figure(trace), _literal(x), _literal(y), height)
    figure.update_layout(hovermode="closest")
    if not numeric:
        figure.update_xaxes(type="category")
    return figure


def _literal(text: object) -> str:
    """Any text, for Plotly, which reads tags in its texts."""
    return html.escape(plain_visible(str(text)), quote=False)


def similarity_histogram(
    a: np.ndarray, b: np.ndarray, names: tuple[str, str], chance: float | None, height: int = 260
) -> "Figure":
    """How similar each feature's most similar one of the other SAE is; 20 bins over [0, 1]."""
    from plotly.graph_objects import Bar, Figure

    edges = np.linspace(0, 1, 21)
    figure = Figure()
    for values, name, colour in ((a, names[0], BLUE), (b, names[1], ORANGE)):
        counts, _ = np.histogram(np.clip(values, 0, 1), edges)
        text = [
            f"{name}: {count:,} features at {low:.2f} to {high:.2f}"
            for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
        ]
        figure.add_trace(
            Bar(
                x=(edges[:-1] + edges[1:]) / 2,
                y=counts,
                name=_literal(name),
                marker={"color": colour, "line": {"width": 0}},
                hovertext=[_literal(each) for each in text],
                hoverinfo="text",
            )
        )
    finish(figure, "largest similarity to a feature of the other SAE", "features", height)
    figure.update_layout(
        barmode="group",
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    if chance is not None:
        figure.add_vline(
            x=chance, line={"dash": "dot", "width": 1.5, "color": "gray"}, annotation_text="chance"
        )
    figure.update_xaxes(range=[0, 1.01], dtick=0.1)
    return figure
