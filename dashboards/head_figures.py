"""What `saescope attention` measured, as tables and figures: families by head, and curves."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from dashboards.amounts import amount
from dashboards.figures import BLUE, GREY, finish

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def overview(heads: Sequence[Mapping[str, Any]], repeats: Sequence[Mapping[str, Any]]) -> Any:
    """A row a head: each family's share with its interval and null, and what repeats do.

    A head without features has empty cells.
    """
    rows = []
    for row, repeat in zip(heads, repeats, strict=True):
        cells = {name: _cell(row, name) for name in _families(heads)}
        various = ""
        if row["effective"] is not None:
            low, high = row["others"]
            various = f"{amount(row['effective'])} ({amount(low)} to {amount(high)})"
        rows.append(
            {
                "head": row["head"],
                "features": row["features"],
                **cells,
                "families": various,
                "repeats": repeat["verdict"],
            }
        )
    return pd.DataFrame(rows)


def _families(heads: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(next((row["shares"] for row in heads if row["shares"]), {}))


def _cell(row: Mapping[str, Any], name: str) -> str:
    if not row["shares"]:
        return ""
    low, high = row["intervals"][name]
    numbers = (row["shares"][name], low, high, row["random"].get(name, 0.0))
    return f"{numbers[0]:.0%} [{100 * numbers[1]:.0f}, {100 * numbers[2]:.0f}] · {numbers[3]:.0%}"


def family_bars(row: Mapping[str, Any], height: int = 250) -> "Figure":
    """A head's families: shares with 95% intervals over texts, and those of random directions."""
    from plotly.graph_objects import Bar, Figure, Scatter

    names = list(row["shares"])
    shares = [100 * row["shares"][name] for name in names]
    ends = [[100 * end for end in row["intervals"][name]] for name in names]
    null = [100 * row["random"].get(name, 0.0) for name in names]
    bars = Bar(
        x=names,
        y=shares,
        marker={"color": BLUE, "line": {"width": 0}},
        error_y={
            "type": "data",
            "symmetric": False,
            # a share decided on all texts can lie outside of what draws of texts give
            "array": [max(high - share, 0) for (_, high), share in zip(ends, shares, strict=True)],
            "arrayminus": [max(s - low, 0) for (low, _), s in zip(ends, shares, strict=True)],
            "thickness": 1.2,
            "width": 4,
            "color": GREY,
        },
        hovertext=[
            f"{name}: {share:.0f}%, 95% interval {low:.0f} to {high:.0f}%; of random directions "
            f"{at:.0f}%"
            for name, share, (low, high), at in zip(names, shares, ends, null, strict=True)
        ],
        hoverinfo="text",
    )
    marks = Scatter(
        x=names,
        y=null,
        mode="markers",
        marker={"symbol": "line-ew", "size": 34, "line": {"width": 2, "color": GREY}},
        hoverinfo="skip",
    )
    figure = finish(Figure([bars, marks]), "", "% of its features", height)
    figure.update_layout(bargap=0.35)
    figure.update_yaxes(rangemode="tozero")
    return figure


def prefix_curve(curve: Mapping[str, Any], what: str, height: int = 250) -> "Figure":
    """Means by the length of the repeat, with the effect's interval, and those of shuffled ones."""
    from plotly.graph_objects import Figure, Scatter

    lengths = curve["lengths"]
    repeated = Scatter(
        x=lengths,
        y=curve["repeated"],
        mode="lines+markers",
        line={"color": BLUE},
        error_y={"type": "data", "array": curve["half_width"], "thickness": 1.2, "width": 4},
        hovertext=[
            f"{n} repeated: {amount(at)}, above the null by {amount(effect)} ± {amount(half)}"
            for n, at, effect, half in zip(
                lengths, curve["repeated"], curve["effect"], curve["half_width"], strict=True
            )
        ],
        hoverinfo="text",
    )
    shuffled = Scatter(
        x=lengths,
        y=curve["shuffled"],
        mode="lines",
        line={"color": GREY, "dash": "dot"},
        hovertext=[f"shuffled: {amount(at)}" for at in curve["shuffled"]],
        hoverinfo="text",
    )
    figure = finish(Figure([shuffled, repeated]), "repeated tokens", what, height)
    figure.update_xaxes(tickvals=lengths)
    figure.update_yaxes(rangemode="tozero")
    return figure


def features_of(found: Mapping[str, Any], head: int) -> pd.DataFrame:
    """The features of a head, those with the largest share in it first."""
    given = found["features"]
    frame = pd.DataFrame(
        {
            "feature": given["feature"],
            "head": given["head"],
            "share": given["head_share"],
            "firings": given["firings"],
            "family": given["family"],
            "random": given["random_family"],
            **given["shares"],
            "null": given["random_shares"]["induction"],
        }
    )
    own = pd.DataFrame(frame[frame["head"] == head]).drop(columns=["head"])
    return own.sort_values("share", ascending=False, kind="stable").reset_index(drop=True)


def tests_of_features(found: Mapping[str, Any]) -> pd.DataFrame:
    """The features that were put to the prefix-length test, and the largest effect of each."""
    rows = []
    for each in found["prefix"]:
        curve = each["activation"]
        best = max(range(len(curve["effect"])), key=curve["effect"].__getitem__)
        rows.append(
            {
                "feature": each["feature"],
                "chosen": each["chosen"],
                "before": each["text"],
                "verdict": curve["verdict"],
                "half": curve["half_length"],
                "effect": curve["effect"][best],
                "interval": curve["half_width"][best],
                "null": curve["shuffled"][best],
            }
        )
    return pd.DataFrame(rows)
