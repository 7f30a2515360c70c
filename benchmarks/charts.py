"""Line charts for docs, drawn by Plotly and photographed in a headless Chromium."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
_WIDTH, _HEIGHT = 900, 540


def write_chart(
    path: Path, series: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str
) -> None:
    """Write a PNG with a line through each series' points (x, y), x on a logarithmic scale."""
    import plotly.graph_objects as go
    from playwright.sync_api import sync_playwright

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
    path.parent.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": _WIDTH + 20, "height": _HEIGHT + 20})
        page.set_content(figure.to_html(include_plotlyjs=True))
        page.locator(".main-svg").first.wait_for()
        page.locator(".plotly-graph-div").screenshot(path=path)
        browser.close()
