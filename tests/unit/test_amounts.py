"""Small activations are told apart wherever the explorer shows them."""

import numpy as np
import pytest

from dashboards import figures
from dashboards.amounts import amount, span
from dashboards.tokens import effects_html, per_token_html, text_html
from store.results import Histogram


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0.00"),
        (1e-4, "1.00e-4"),
        (0.00123456, "1.23e-3"),
        (2.5e-17, "2.50e-17"),
        (0.0123456, "0.0123"),
        (0.0999, "0.0999"),
        (0.1, "0.10"),
        (123.456, "123.46"),
        (-0.004, "-4.00e-3"),
    ],
)
def test_amounts(value: float, shown: str) -> None:
    assert amount(value) == shown
    assert amount(value, signed=True).lstrip("+") == shown


@pytest.mark.parametrize("size", [1e-9, 4e-3, 1.0, 700.0])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_ends_of_a_range_differ(size: float, offset: float) -> None:
    ranges = [span(offset + n * size / 10, offset + (n + 1) * size / 10) for n in range(10)]
    if offset == 0 or size > 1e-6:
        assert len(set(ranges)) == 10
        assert all(len(set(each.split(" to "))) == 2 for each in ranges)


def test_pages_show_small_activations() -> None:
    assert "activation 1.23e-4" in text_html(["a"], [1.23e-4], 1e-3, [True])
    assert '<span class="ss-num">1.23e-3</span>' in per_token_html(
        [(0, "a", [(7, "", 0.00123, 1.0)])], "tiny"
    )
    assert "+1.23e-3" in effects_html([("a", 0.00123)], [("b", -0.002)])
    histogram = Histogram(edges=np.linspace(0, 4e-3, 5), counts=np.array([1, 2, 3, 4]))
    figure = figures.activation_histogram(histogram).to_dict()
    assert figure["data"][0]["hovertext"][0] == "0.0000 to 0.0010: 1 positions"
