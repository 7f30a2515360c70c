"""Charts for docs, drawn by Plotly and photographed in a headless Chromium."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
_WIDTH, _HEIGHT = 900, 540
_BAR, _TITLE = 26, 50
"""pixels of a bar, and of what is between panels"""


def write_chart(
    path: Path, series: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str
) -> None:
    """Write a PNG with a line through each series' points (x, y), x on a logarithmic scale."""
    import plotly.graph_objects as go

    figure = go.Figure(layout={"template": "plotly_white", "width": _WIDTH, "height": _HEIGHT})
    marks = ("circle", "square", "diamond", "triangle-up", "x", "star")
    for number, (name, points) in enumerate(series.items()):
        xs, ys = zip(*sorted(points), strict=True)
        figure.add_scatter(
            x=xs, y=ys, name=name, mode="lines+markers",
            marker={"symbol": marks[number % len(marks)], "size": 8},
            line={"dash": "solid" if number < 10 else "dot"},
        )  # fmt: skip
    ticks = [2.0**n for n in range(11)]
    figure.update_xaxes(title=x, type="log", tickvals=ticks, ticktext=[f"{t:g}" for t in ticks])
    figure.update_yaxes(title=y)
    _photograph(figure, path)


def write_bars(path: Path, panels: Mapping[str, Mapping[str, float]], *, x: str) -> None:
    """Write a PNG of horizontal bars, a panel beneath another, the smallest value on top."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    lengths = [len(bars) for bars in panels.values()]
    plot = _BAR * sum(lengths) + _TITLE * (len(panels) - 1)
    figure = make_subplots(
        rows=len(panels), subplot_titles=list(panels), row_heights=lengths,
        vertical_spacing=_TITLE / plot,
    )  # fmt: skip
    for number, bars in enumerate(panels.values(), start=1):
        names = sorted(bars, key=lambda name: bars[name], reverse=True)
        values = [bars[name] for name in names]
        colours = ["#1f77b4" if name.startswith("saescope") else "#b0b0b0" for name in names]
        figure.add_trace(
            go.Bar(
                x=values, y=names, orientation="h", marker={"color": colours},
                text=[f"{value:.3g}" for value in values], textposition="outside",
                cliponaxis=False,
            ),
            row=number, col=1,
        )  # fmt: skip
    figure.update_layout(
        template="plotly_white", width=_WIDTH, height=plot + 2 * _TITLE, showlegend=False,
        margin={"t": _TITLE, "b": _TITLE, "l": 180, "r": 60},
    )  # fmt: skip
    figure.update_xaxes(showticklabels=False, showgrid=False)  # the values stand beside the bars
    figure.update_xaxes(title=x, row=len(panels), col=1)
    _photograph(figure, path)


def _photograph(figure: Any, path: Path) -> None:
    from playwright.sync_api import sync_playwright

    width, height = figure.layout.width, figure.layout.height
    path.parent.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width + 20, "height": height + 20})
        page.set_content(figure.to_html(include_plotlyjs=True))
        page.locator(".main-svg").first.wait_for()
        page.locator(".plotly-graph-div").screenshot(path=path)
        browser.close()
