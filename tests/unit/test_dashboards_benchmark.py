"""The comparison with SAEDashboard's pages: equal ones are found equal, every fault is seen."""

import copy
from pathlib import Path

import numpy as np
import pytest

from benchmarks import dashboards
from saescope.errors import InputError
from store import FeatureStore
from tests.tiny_store import make_tiny_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = Path(tmp_path_factory.mktemp("dashboards"))
    with FeatureStore.open(make_tiny_store(path)) as opened:
        yield opened


def page(store: FeatureStore, feature: int) -> dict:
    """What SAEDashboard's definitions give, computed position by position."""
    position, activation = store.activations(feature)
    low, high = activation.min(), activation.max()
    bars = [0] * dashboards.BINS
    for each in activation:
        bars[min(int((each - low) / (high - low) * len(bars)), len(bars) - 1)] += 1
    rows = [
        (float(a), int(p))
        for p, a in zip(position, activation, strict=True)
        if 6 <= p % store.context < store.context - 5
    ]
    rows.sort(key=lambda each: (-each[0], each[1]))
    top = rows[: dashboards.TOP]
    around = [[0.0] * 5 + [round(a, 4)] + [0.0] * 5 for a, _ in top]
    at = [[p // store.context, p % store.context] for _, p in top]
    return {
        "histogram": bars,
        "density": len(activation) / int(store.meta["n_tokens"]),
        "groups": [{"at": at, "activations": around}, {"at": [], "activations": [[0.0] * 11]}],
        "logits_top": [each.token_id for each in store.logits(feature).top],
    }


@pytest.fixture(scope="module")
def feature(store) -> int:
    def spread(number: int) -> int:
        _, activation = store.activations(number)
        return len(np.unique(activation))

    return max(store.live_features(), key=spread)


def test_equal_pages_are_equal(store, feature):
    found = dashboards.compare(page(store, feature), store, feature)
    assert found.same_histogram
    assert found.same_density
    assert found.same_top
    assert found.misplaced == 0
    assert found.zeros == 1


def test_a_bar_a_density_and_a_position_that_differ_are_seen(store, feature):
    right = page(store, feature)
    bar, density, top = (copy.deepcopy(right) for _ in range(3))
    full = next(i for i, count in enumerate(bar["histogram"]) if count)
    bar["histogram"][full] -= 1
    bar["histogram"][full - 1 if full else 1] += 1
    density["density"] *= 1.01
    top["groups"][0]["activations"][0][5] *= 1.1
    seen = [dashboards.compare(each, store, feature) for each in (bar, density, top)]
    assert [each.same_histogram for each in seen] == [False, True, True]
    assert seen[0].misplaced == 1
    assert [each.same_density for each in seen] == [True, False, True]
    assert [each.same_top for each in seen] == [True, True, False]


def test_positions_left_out_for_other_reasons_are_refused():
    tokens = np.array([[5, 1, 2, 1], [5, 2, 1, 3]])
    keep = np.array([[False, True, False, True], [False, False, True, True]])
    assert dashboards.special_tokens(tokens, keep) == [2]
    keep[0, 1] = False
    with pytest.raises(InputError, match="other reasons"):
        dashboards.special_tokens(tokens, keep)
