"""The Steer page's dose-response: measured with the store's own SAE, drawn with nulls."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import streamlit as st
import torch

import sae
from activations import load_model
from dashboards import find_stores, model_cache
from dashboards.doses import FACTORS, dose_figure, spot_caption
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.commands.effects import EffectsConfig, measure_effects
from sae.steering.dose_result import DoseResponse
from store import FeatureStore
from tests.e2e.test_explorer import open_page, shown
from tests.tiny import make_tiny_harvest, make_tiny_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a harvest, an SAE and its store, whose texts have 20 held out."""
    work = tmp_path_factory.mktemp("doses")
    harvest = make_tiny_harvest(work, make_tiny_model(work / "model"))
    torch.manual_seed(1)
    made = TopKSAE(TopKConfig(d_sae=64, k=6), 32).eval()
    model = load_model(str(work / "model"))
    made.metadata = {
        "site": "blocks.1.hook_resid_post",
        "harvest": str(harvest),
        "model_spec": str(work / "model"),
        "model_hash": model.weights_hash,
    }
    made.save(work / "run")
    sae.index(sae.IndexConfig(run=str(work / "run"), out=str(work / "stores" / "a")))
    return work


@pytest.fixture(autouse=True)
def nothing_loaded() -> Iterator[None]:
    model_cache.forget_all()
    yield
    model_cache.forget_all()
    st.cache_resource.clear()
    st.cache_data.clear()


@pytest.fixture
def stores(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(find_stores.STORES_VARIABLE, str(made / "stores"))
    return made / "stores"


def test_the_page_measures_the_first_feature_that_is_added(stores: Path) -> None:
    with FeatureStore.open(stores / "a") as store:
        feature = store.live_features()[0]
    app = open_page("steer", edits="ablate:1")
    assert not [each for each in app.expander if "Dose-response" in each.label]
    app = open_page("steer", edits=f"ablate:1,add:{feature}:3")
    [fold] = [each for each in app.expander if "Dose-response" in each.label]
    assert fold.label == f"Dose-response of feature {feature}"
    app.button(key="steer_measure_dose").click().run(timeout=120)
    assert not app.exception, app.exception
    assert any(each.value.startswith("Direct words: ") for each in app.caption)
    assert len(app.get("plotly_chart")) == 2


def test_measured_effects_stand_beside_direct_ones(stores: Path) -> None:
    with FeatureStore.open(stores / "a") as store:
        feature = store.live_features()[0]
    app = open_page("feature", feature=str(feature))
    assert "Measured" not in [each.value.strip("*") for each in app.markdown]
    measure_effects(EffectsConfig(store=str(stores / "a"), positions=2, prompt="The river"))
    app = open_page("feature", feature=str(feature))
    headings = [each.value.strip("*") for each in app.markdown]
    assert {"Direct", "Measured"} <= set(headings)
    assert " ± " in shown(app)
    assert "output score" in shown(app)
    assert "(random directions: " in shown(app)
    app = open_page("features", sort="output_score", order="down")
    assert app.session_state["table_sort"] == "output_score"
    assert not app.warning


def by_hand() -> DoseResponse:
    def four(*rows: list[float]) -> np.ndarray:
        return np.repeat(np.array(rows)[:, :, None], 4, axis=2)

    rate, null = [0.0, 0.25, 0.5, 0.75], [0.0, 0.05, 0.0, 0.0]
    kl = [0.1, 0.4, 0.9, 3.0]
    values = {"word_rate:direct": four(rate, null, null), "kl": four(kl, kl, kl)}
    values["target:direct"] = values["word_rate:direct"] * 4
    return DoseResponse(
        feature=3, strengths=tuple(20.0 * f for f in FACTORS),
        sources=("feature", "random", "untrained"), words=("direct",), values=values,
    )  # fmt: skip


def test_the_sweet_spot_is_said_in_units_of_the_largest_activation() -> None:
    assert spot_caption(by_hand(), "direct") == (
        "Direct words: at KL below 1, best at 2 × (2 to 2): 50.0 % of the new tokens, +45.0 points "
        "beside the null (+45.0 to +45.0; 95 % over 4 texts)."
    )
    assert spot_caption(by_hand(), "direct", "target") == (
        "Direct words: at KL below 1, best at 2 × (2 to 2): their log-probability rises by 2.00 "
        "nats, +1.80 beside the null (+1.80 to +1.80; 95 % over 4 texts)."
    )


def test_the_chart_has_the_feature_beside_what_means_nothing() -> None:
    figure = dose_figure(by_hand(), "kl", "KL")
    traces: Any = figure.data
    names = [trace.name for trace in traces]
    assert names == ["the feature", "random directions", "an untrained SAE's features"]
    assert list(traces[0].y) == pytest.approx([0.1, 0.4, 0.9, 3.0])
    layout: Any = figure.layout
    [line] = layout.shapes
    assert line.y0 == 1.0
