"""The figures show the numbers they are given, with titled axes."""

from typing import Any

import numpy as np
import pytest

from dashboards.fact_figures import mark_activation
from dashboards.figures import activation_histogram, density_histogram, percent
from store.results import Histogram


def bars(figure: Any) -> Any:
    """The figure's only trace."""
    (trace,) = figure.data
    return trace


def layout(figure: Any) -> Any:
    return figure.layout


def test_activation_histogram_has_every_count() -> None:
    counts = np.zeros(40, dtype=np.int64)
    counts[[0, 5, 39]] = (1000, 40, 1)
    figure = activation_histogram(Histogram(np.linspace(0, 8, 41), counts))
    trace = bars(figure)
    shown = np.nan_to_num(np.asarray(trace["y"], dtype=float))
    np.testing.assert_array_equal(shown, counts)
    np.testing.assert_allclose(np.asarray(trace["x"])[[0, 39]], [0.1, 7.9])
    assert trace["hovertext"][5] == "1.00 to 1.20: 40 positions"
    assert layout(figure).xaxis.title.text == "activation"
    assert layout(figure).yaxis.title.text == "positions (log scale)"
    assert layout(figure).yaxis.type == "log"
    assert layout(figure).yaxis.range[0] < 0, "a single position has a bar of some height"


@pytest.mark.parametrize("mark", [2.0, 7.0, 9.0])
def test_an_activation_is_marked_and_in_sight(mark: float) -> None:
    counts = np.ones(40, dtype=np.int64)
    figure = activation_histogram(Histogram(np.linspace(0, 8, 41), counts))
    mark_activation(figure, mark)
    (line,) = layout(figure).shapes
    assert (line.x0, line.x1) == (mark, mark)
    assert layout(figure).annotations[0].text == f"your text {mark:.2f}"
    assert layout(figure).xaxis.range[1] > max(mark, 8.0)


def test_few_positions_are_counted_on_a_plain_axis() -> None:
    counts = np.zeros(40, dtype=np.int64)
    counts[3] = 2
    figure = activation_histogram(Histogram(np.linspace(0, 1, 41), counts))
    assert layout(figure).yaxis.type is None
    assert layout(figure).yaxis.title.text == "positions"
    assert layout(figure).yaxis.dtick == 1


def test_density_histogram_counts_each_live_feature_once() -> None:
    densities = np.array([0.0, 0.0, 1e-5, 0.9e-4, 1e-4, 0.01, 0.3, 1.0, 1.0])
    figure = density_histogram(densities)
    trace = bars(figure)
    counts = np.asarray(trace["y"])
    assert counts.sum() == 7
    assert counts[-1] == 2, "a feature that always fires is in the last bin"
    assert layout(figure).xaxis.title.text.startswith("density (share of positions")
    assert layout(figure).yaxis.title.text == "features"
    assert "100 %" in layout(figure).xaxis.ticktext


@pytest.mark.parametrize("densities", [[1.0], [0.5, 0.5], [1e-9], [1e-3]])
def test_density_histogram_of_few_features(densities: list[float]) -> None:
    assert np.sum(bars(density_histogram(np.array(densities)))["y"]) == len(densities)


def test_figures_have_no_background_of_their_own() -> None:
    for figure in (
        density_histogram(np.array([0.1])),
        activation_histogram(Histogram(np.linspace(0, 1, 41), np.arange(40))),
    ):
        assert layout(figure).paper_bgcolor == layout(figure).plot_bgcolor == "rgba(0,0,0,0)"
        assert layout(figure).showlegend is False


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100 %"), (0.1234, "12.3 %"), (0.05, "5 %"), (0.000123, "0.0123 %"), (0.0, "0 %")],
)
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text
