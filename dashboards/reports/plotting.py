"""Charts of reports as Plotly figures, for the explorer."""

import html
import math
from typing import TYPE_CHECKING, Any

from dashboards.figures import COLOURS, finish
from dashboards.tokens import plain_visible
from saescope.pieces import Chart, Series

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_HEIGHT = 300
_NAMED = 14
"""points up to which each has its name beside it"""


def figure_of(chart: Chart) -> "Figure":
    """The figure that says what the chart's drawing says."""
    from plotly.graph_objects import Figure

    figure = Figure([_trace(chart, series, n) for n, series in enumerate(chart.series)])
    finish(figure, _literal(chart.x), _literal(chart.y), _HEIGHT)
    _, _, low, high = chart.bounds()
    figure.update_yaxes(range=[low, high])
    several = len(chart.series) > 1
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    figure.update_layout(hovermode="closest", showlegend=several, legend=legend, barmode="group")
    if several:  # room for the legend
        figure.update_layout(margin={"t": 30})
    if chart.ticks:
        names = [_literal(each) for each in chart.ticks]
        figure.update_xaxes(tickvals=list(range(len(names))), ticktext=names)
    elif chart.log_x:
        wide = _decades(chart) > 1
        figure.update_xaxes(type="log", dtick=1 if wide else None, exponentformat="power")
    elif chart.kind == "points":
        figure.update_xaxes(rangemode="tozero")
    return figure


def _decades(chart: Chart) -> float:
    left, right, *_ = chart.bounds()
    return math.log10(right / left)


def _trace(chart: Chart, series: Series, number: int) -> Any:
    from plotly.graph_objects import Bar, Scatter

    colour, name = COLOURS[number % len(COLOURS)], _literal(series.name)
    x, y = list(series.x), list(series.y)
    if chart.kind == "bars":
        return Bar(x=x, y=y, name=name, marker={"color": colour, "line": {"width": 0}})
    if chart.kind == "steps":
        # the last bin ends at the last edge
        line = {"shape": "hv", "color": colour, "width": 2}
        fill = "tozeroy" if len(chart.series) == 1 else None
        return Scatter(x=x, y=[*y, y[-1]], name=name, mode="lines", line=line, fill=fill)
    points = chart.kind == "points"
    named = points and sum(len(each.x) for each in chart.series) <= _NAMED
    half = [0.0 if each is None else each for each in series.half] or None
    return Scatter(
        x=x,
        y=y,
        name=name,
        mode="lines+markers" if not points else "markers+text" if named else "markers",
        line={"color": colour, "width": 2},
        marker={"color": colour, "size": 8 if points else 6},
        error_y={"array": half, "thickness": 1, "width": 3} if half else None,
        text=[f" {_literal(each)} " for each in series.labels] if named else None,
        textposition=_sides(chart, series) if named else None,
        textfont={"size": 11},
        hovertext=[_literal(each) for each in series.labels or [series.name] * len(x)],
        hovertemplate=f"%{{hovertext}}<br>%{{y:{chart.form}}}<extra></extra>",
        cliponaxis=False,
    )


def _sides(chart: Chart, series: Series) -> list[str]:
    """On which side of each point there is room for its name."""
    _, right, *_ = chart.bounds()
    return ["middle right" if x < right / 2 else "middle left" for x in series.x]


def _literal(text: str) -> str:
    """Any text, for Plotly, which reads tags in its texts."""
    return html.escape(plain_visible(text), quote=False)
