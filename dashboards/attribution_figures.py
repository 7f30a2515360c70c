"""A feature's attribution as pictures: its text, its heads and layers, and heads by sources."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dashboards.amounts import amount
from dashboards.figures import BLUE, ORANGE, finish
from dashboards.tokens import plain_visible, shortened, token_html

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from sae import Attribution

BARS, HEADS, SOURCES = 14, 10, 16
"""the most that are drawn of each"""
NAMED_HEADS = 6
"""heads whose sources can be looked at alone"""
_DIVERGING = ((0.0, BLUE), (0.5, "rgba(128,128,128,0.06)"), (1.0, ORANGE))
"""blue over nothing to orange, so that the page's own ground shows where there is nothing"""
_SHOWN = 14
"""characters of a token on an axis"""
UNIT = "units of the activation"


def largest_heads(found: "Attribution") -> list[int]:
    """The rows of the few heads that brought most, the most first; none that brought nothing."""
    size = np.abs(found.sources).sum(axis=1)
    order = np.argsort(-size, kind="stable")[:NAMED_HEADS]
    return [int(row) for row in order if size[row] > 0]


def sources_html(found: "Attribution", row: int | None = None) -> str:
    """The text up to the destination, each token shaded by what heads brought from it.

    Args: row is that of one head; None: all of them together.
    """
    values = found.by_source if row is None else found.sources[row]
    through = "attention" if row is None else head_names(found.heads)[row]
    scale = float(np.abs(values).max(initial=0.0))
    spans = []
    for position, (text, value) in enumerate(zip(found.tokens, values, strict=True)):
        tip = f"{plain_visible(text)}\nthrough {through} {amount(value, 3, signed=True)}"
        tip += f"\nposition {position}" + ", the destination" * (position == found.position)
        spans.append(token_html(text, value, scale, tip, peak=position == found.position))
    return f'<div class="ss-big"><div class="ss-text">{"".join(spans)}</div></div>'


def head_names(heads: Sequence[tuple[int, int]]) -> list[str]:
    """Heads' names: with the layer where there are several.

    >>> head_names([(3, 0), (3, 1)]), head_names([(0, 1), (3, 0)])
    (['head 0', 'head 1'], ['head 0.1', 'head 3.0'])
    """
    several = len({layer for layer, _ in heads}) > 1
    return [f"head {layer}.{head}" if several else f"head {head}" for layer, head in heads]


def parts(found: "Attribution") -> list[tuple[str, float]]:
    """Heads (summed over sources), other components and biases, the largest first.

    The biases of attention's outputs are one part.
    """
    heads = zip(head_names(found.heads), found.by_head.tolist(), strict=True)
    own = {name: value for name, value in found.biases.items() if name.startswith("SAE")}
    others = [value for name, value in found.biases.items() if name not in own]
    biases = [*own.items(), *([("attention output biases", sum(others))] if others else [])]
    every = [*heads, *found.components.items(), *biases]
    return sorted(every, key=lambda each: -abs(each[1]))


def part_bars(found: "Attribution") -> "Figure":
    """A bar for each of the largest parts, and one for all the others together."""
    from plotly.graph_objects import Bar, Figure

    every = parts(found)
    shown = every[:BARS] if len(every) > BARS + 1 else every
    rest = every[len(shown) :]
    if rest:
        shown = [*shown, (f"{len(rest)} others", sum(value for _, value in rest))]
    values = [value for _, value in shown]
    bars = Bar(
        x=values,
        y=[name for name, _ in shown],
        orientation="h",
        marker={"color": [ORANGE if v > 0 else BLUE for v in values], "line": {"width": 0}},
        hovertext=[f"{name}: {amount(value, 3, signed=True)}" for name, value in shown],
        hoverinfo="text",
    )
    figure = finish(Figure(bars), UNIT, "", 70 + 20 * len(shown))
    figure.update_layout(hovermode="closest", bargap=0.25)
    figure.update_yaxes(autorange="reversed", nticks=0, dtick=1, showgrid=False, tickfont_size=12)
    figure.update_xaxes(zeroline=True, zerolinecolor="rgba(128,128,128,0.5)", nticks=6)
    return figure


def chosen_cells(found: "Attribution") -> tuple[list[int], list[int]]:
    """Rows and positions of the heads and sources with most in them, in order."""

    def largest(sizes: np.ndarray, most: int) -> list[int]:
        return sorted(np.argsort(-sizes, kind="stable")[:most].tolist())

    size = np.abs(found.sources)
    heads = largest(size.sum(axis=1), HEADS)
    return heads, largest(size[heads].sum(axis=0), SOURCES)


def head_by_source(found: "Attribution") -> "Figure":
    """What each of the heads with most brought from each of the sources with most."""
    from plotly.graph_objects import Figure, Heatmap

    heads, sources = chosen_cells(found)
    z = found.sources[np.ix_(heads, sources)]
    names = [head_names(found.heads)[row] for row in heads]
    texts = [shortened(plain_visible(found.tokens[at]).strip() or "␣", _SHOWN) for at in sources]
    hover = [
        [
            f"{name} from “{text}” at position {at}: {amount(value, 3, signed=True)}"
            for text, at, value in zip(texts, sources, row, strict=True)
        ]
        for name, row in zip(names, z, strict=True)
    ]
    largest = float(np.abs(z).max(initial=0.0)) or 1.0
    columns = list(range(len(sources)))
    trace = Heatmap(
        z=z,
        x=columns,
        y=names,
        xgap=1,
        ygap=1,
        colorscale=_DIVERGING,
        zmin=-largest,
        zmax=largest,
        colorbar={
            "title": {"text": UNIT, "side": "right"},
            "thickness": 10,
            "outlinewidth": 0,
            "nticks": 5,
        },
        hovertext=hover,
        hoverinfo="text",
    )
    figure = finish(Figure(trace), "source token, in the text's order", "", 130 + 20 * len(names))
    figure.update_layout(hovermode="closest")
    figure.update_xaxes(tickvals=columns, ticktext=texts, tickangle=-45, ticks="", showline=False)
    figure.update_yaxes(type="category", nticks=0, dtick=1, showgrid=False, autorange="reversed")
    return figure


def in_words(found: "Attribution") -> str:
    """The sum in Markdown: what came through attention, from MLPs, the embedding and biases."""
    groups = {"attention heads": float(found.sources.sum())}
    if "embedding" in found.components:
        mlps = [value for name, value in found.components.items() if name != "embedding"]
        groups |= {"MLPs": sum(mlps), "the embedding": found.components["embedding"]}
    groups["biases"] = sum(found.biases.values())
    terms = " ".join(
        f"{'−' if value < 0 else '+'} {amount(abs(value))} from {name}"
        for name, value in groups.items()
    ).removeprefix("+ ")
    fires = "" if found.activation else " The feature does not fire here."
    return f"Pre-activation **{amount(found.pre_activation)}** = {terms}.{fires}"


def left_out(found: "Attribution") -> str:
    """What the heat map does not show, in a sentence."""
    heads, sources = chosen_cells(found)
    n_heads, n_sources = found.sources.shape
    shown = float(found.sources[np.ix_(heads, sources)].sum())
    if (len(heads), len(sources)) == (n_heads, n_sources):
        return "The heat map has all heads and sources."
    return (
        f"The heat map has the {len(heads)} of {n_heads} heads and {len(sources)} of {n_sources} "
        f"source tokens with most in them, which sum to {amount(shown, signed=True)}; all sum to "
        f"{amount(float(found.sources.sum()), signed=True)}."
    )
