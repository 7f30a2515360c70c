"""Figures of effects on all logits, of layers and of attention heads; marks on histograms."""

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dashboards.amounts import amount, counted, span
from dashboards.figures import BLUE, ORANGE, finish, percent
from store.fact_results import HeadNorm, Layer, LayerShare
from store.results import Histogram

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_MOST_TICKS = 16
_QUIET = "rgba(128,128,128,0.6)"
_SEQUENTIAL = ((0.0, "rgba(61,126,166,0)"), (0.25, "rgba(61,126,166,0.45)"), (1.0, BLUE))
"""clear to blue, so that the page's own ground shows where there is nothing"""


def layer_names(sites: Sequence[str]) -> list[str]:
    """Short names of sites: the layers' numbers where nothing else differs.

    >>> layer_names(["blocks.3.hook_resid_post", "blocks.9.hook_resid_post"])
    ['3', '9']
    >>> layer_names(["blocks.3.hook_resid_post", "blocks.3.hook_mlp_out"])
    ['3 resid_post', '3 mlp_out']
    """
    pieces = [site.removeprefix("blocks.").partition(".") for site in sites]
    if any(not number.isdigit() for number, *_ in pieces):
        return list(sites)
    if len({rest for *_, rest in pieces}) == 1:
        return [number for number, *_ in pieces]
    return [f"{number} {rest.replace('hook_', '')}" for number, _, rest in pieces]


def mark_activation(figure: "Figure", activation: float) -> None:
    """Draw a line at an activation, possibly above all others, on a histogram of activations."""
    layout: Any = figure.layout
    low, high = layout.xaxis.range
    figure.update_xaxes(range=[low, max(high, 1.01 * activation)])
    figure.add_vline(
        x=activation,
        line={"width": 2, "color": ORANGE},
        annotation={"text": f"your text {amount(activation)}", "font": {"color": ORANGE}},
        annotation_position="top left" if activation > high / 2 else "top right",
    )


def logit_histogram(histogram: Histogram, height: int = 150) -> "Figure":
    """How many tokens of the vocabulary the feature has which effect on."""
    from plotly.graph_objects import Bar, Figure

    edges, counts = histogram.edges, histogram.counts
    text = [
        f"{span(low, high)}: {counted(int(count), 'token')}"
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    middle = (edges[:-1] + edges[1:]) / 2
    bars = Bar(
        x=middle,
        y=np.where(counts > 0, counts, np.nan),
        width=np.diff(edges) * 0.94,
        marker={"color": np.where(middle < 0, "#b05060", BLUE), "line": {"width": 0}},
        hovertext=text,
        hoverinfo="text",
    )
    figure = finish(Figure(bars), "effect on the logit", "tokens (log scale)", height)
    top = np.log10(max(int(counts.max()), 10))
    figure.update_yaxes(type="log", range=[-0.3, top + 0.15], dtick=1 if top < 3 else 2)
    return figure


def layer_profile(
    layers: Sequence[Layer], shares: Sequence[LayerShare], height: int = 190
) -> "Figure":
    """A feature's share at each layer."""
    from plotly.graph_objects import Bar, Figure

    names = layer_names([each.site for each in layers])
    text = []
    for layer, each in zip(layers, shares, strict=True):
        where = f"{layer.site}: {percent(each.share)}"
        fires = (
            "" if each.count is None else f", fires on {each.count:,} of {layer.tokens:,} tokens"
        )
        text.append(where + fires)
    bars = Bar(
        x=names,
        y=[100 * each.share for each in shares],
        marker={"color": BLUE, "line": {"width": 0}},
        hovertext=text,
        hoverinfo="text",
    )
    what = "% of activation" if layers[0].tokens else "% of decoder norm"
    figure = finish(Figure(bars), "layer", what, height)
    figure.update_xaxes(type="category")
    figure.update_yaxes(rangemode="tozero")
    return figure


def head_norms(heads: Sequence[HeadNorm], height: int = 170) -> "Figure":
    """The share of a feature's decoder norm in each head, and what an equal share would be."""
    from plotly.graph_objects import Bar, Figure

    bars = Bar(
        x=[each.head for each in heads],
        y=[100 * each.share for each in heads],
        marker={"color": BLUE, "line": {"width": 0}},
        hovertext=[
            f"head {each.head}: {percent(each.share)}, norm {amount(each.norm, 3)}"
            for each in heads
        ],
        hoverinfo="text",
    )
    figure = finish(Figure(bars), "head", "% of decoder norm", height)
    figure.add_hline(y=100 / len(heads), line={"dash": "dot", "width": 1.5, "color": _QUIET})
    figure.update_xaxes(dtick=1 if len(heads) <= 16 else None)
    figure.update_yaxes(rangemode="tozero")
    return figure


def layer_heat_map(
    shares: np.ndarray, features: np.ndarray, sites: Sequence[str], height: int = 430
) -> "Figure":
    """Features [n], in their order, by layer: shares [layers, n].

    Streamlit reports no clicks on a heat map. So on each cell lies an invisible point, whose index
    is the feature's column; a click anywhere finds the nearest, which is that of its cell.
    """
    from plotly.graph_objects import Figure, Heatmap, Scattergl

    names = layer_names(sites)
    trace = Heatmap(
        z=100 * shares,
        colorscale=_SEQUENTIAL,
        zmin=0,
        zmax=100,
        colorbar={"title": {"text": "%", "side": "top"}, "thickness": 10, "outlinewidth": 0},
        hoverinfo="skip",
    )
    figure = finish(Figure(trace), "features, by their mean layer", "layer", height)
    for layer, name in enumerate(names):
        figure.add_trace(
            Scattergl(
                x=np.arange(len(features)),
                y=np.full(len(features), layer),
                mode="markers",
                marker={"opacity": 0},
                customdata=np.stack([features, 100 * shares[layer]], axis=1),
                hovertemplate=f"feature %{{customdata[0]:d}}, layer {html.escape(name)}: "
                "%{customdata[1]:.1f} %<extra></extra>",
                showlegend=False,
            )
        )
    figure.update_layout(hovermode="closest", hoverdistance=-1)
    figure.update_xaxes(showticklabels=False, ticks="", showline=False, title={"standoff": 14})
    figure.update_xaxes(range=[-0.5, len(features) - 0.5], showgrid=False)
    ticks = np.arange(0, len(names), -(-len(names) // _MOST_TICKS))
    figure.update_yaxes(range=[len(names) - 0.5, -0.5], showgrid=False)
    figure.update_yaxes(tickvals=ticks, ticktext=[names[tick] for tick in ticks])
    return figure


def layer_bars(
    values: np.ndarray, names: Sequence[str], x: str, y: str, *, height: int = 240
) -> "Figure":
    """A number for each layer, or for each number of layers."""
    from plotly.graph_objects import Bar, Figure

    bars = Bar(
        x=list(names),
        y=values.tolist(),
        marker={"color": BLUE, "line": {"width": 0}},
        hovertemplate=f"{x} %{{x}}: %{{y:,}}<extra></extra>",
    )
    figure = finish(Figure(bars), x, y, height)
    figure.update_xaxes(type="category")
    figure.update_yaxes(rangemode="tozero")
    return figure


def adjacent_layers(layers: Sequence[Layer], height: int = 240) -> "Figure":
    """How alike the activations of each two neighbouring layers are."""
    from plotly.graph_objects import Figure, Scatter

    names = layer_names([each.site for each in layers])
    pairs = [
        (f"{name}–{after}", each.cosine_next)
        for name, after, each in zip(names[:-1], names[1:], layers[:-1], strict=True)
    ]
    line = Scatter(
        x=[name for name, _ in pairs],
        y=[cosine for _, cosine in pairs],
        mode="lines+markers",
        line={"color": ORANGE, "width": 2},
        hovertemplate="layers %{x}: cosine %{y:.3f}<extra></extra>",
    )
    figure = finish(Figure(line), "neighbouring layers", "mean cosine", height)
    low = min((cosine for _, cosine in pairs if cosine is not None), default=0.0)
    figure.update_xaxes(type="category")
    figure.update_yaxes(range=[min(0.0, low) - 0.02, 1.02])
    return figure


def place_map(shares: np.ndarray, height: int = 300) -> "Figure":
    """Shares [rows, columns] of a picture's places, the first row on top."""
    from plotly.graph_objects import Figure, Heatmap

    rows, columns = shares.shape
    trace = Heatmap(
        z=100 * shares,
        x=list(range(1, columns + 1)),
        y=list(range(1, rows + 1)),
        colorscale=_SEQUENTIAL,
        zmin=0,
        colorbar={"title": {"text": "%", "side": "top"}, "thickness": 10, "outlinewidth": 0},
        hovertemplate="row %{y}, column %{x}: %{z:.1f} % of pictures<extra></extra>",
    )
    figure = finish(Figure(trace), "column", "row", height)
    figure.update_layout(hovermode="closest")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure
