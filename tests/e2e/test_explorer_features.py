"""The explorer's Features page: filters, orders, searches, and its state in the address."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from dashboards import figures, find_stores
from dashboards.feature_view import PARAMETERS, FeatureView, view_of
from store import Annotations, FeatureFilter, FeatureStore
from tests.e2e.test_explorer import open_page, parameter, shown
from tests.tiny_store import D_SAE, DEAD, EVERYWHERE, RARE, make_tiny_store

FEATURES = "features"
LIVE = [f for f in range(D_SAE) if f not in DEAD]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_store(tmp_path_factory.mktemp("made")).parent.parent


@pytest.fixture
def folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(find_stores.STORES_VARIABLE, str(made))
    yield made
    st.cache_resource.clear()
    st.cache_data.clear()


@pytest.fixture
def notes(folder: Path) -> Iterator[Annotations]:
    """Labels of two features, of which one is a favourite."""
    with Annotations.open(folder / "tiny", sae_hash="5ae") as opened:
        opened.set_label(12, "zebra crossings")
        opened.set_label(30, "zoo")
        opened.add_to_list(30)
        yield opened
        for number in (12, 30):
            opened.set_label(number, "")
        opened.remove_from_list(30)


def table(app: AppTest) -> Any:
    return app.dataframe[0].value


def numbers(app: AppTest) -> list[int]:
    assert not app.exception, app.exception
    return table(app)["feature"].tolist()


def test_the_first_page(folder: Path, notes: Annotations) -> None:
    app = open_page(FEATURES)
    assert numbers(app) == LIVE[:50]
    found = table(app).set_index("feature")
    assert found.loc[12, "label"] == "zebra crossings"
    assert found.loc[EVERYWHERE, "density"] == 100.0
    assert all(found["tokens"])
    assert any("␣the" in words for words in found["tokens"]), "a space before a word is seen"
    assert "1 to 50 of 61 features" in shown(app)
    assert "tiny" in [caption.value for caption in app.caption], "the one SAE is named"
    assert set(app.query_params) == {"sae"}


def test_state_and_order(folder: Path) -> None:
    app = open_page(FEATURES)
    app.button_group(key="table_state").set_value("dead").run()
    assert numbers(app) == sorted(DEAD)
    app.button_group(key="table_state").set_value("dense").run()
    with FeatureStore.open(folder / "tiny") as store:
        density = store.densities()
    assert numbers(app) == [f for f in range(D_SAE) if density[f] > 0.1][:50]
    app.button_group(key="table_state").set_value("all")
    app.selectbox(key="table_sort").set_value("density")
    app.button_group(key="table_order").set_value("down").run()
    found = table(app)["density"].tolist()
    assert found == sorted(found, reverse=True)
    assert found[0] == 100.0
    assert [parameter(app, name) for name in ("state", "sort", "order")] == [
        *("all", "density", "down"),
    ]


def test_search(folder: Path, notes: Annotations) -> None:
    app = open_page(FEATURES)
    app.text_input(key="table_q").set_value("zebr").run()
    assert numbers(app) == [12]
    app.text_input(key="table_q").set_value("paris").run()
    with FeatureStore.open(folder / "tiny") as store:
        tokens = store.top_tokens(range(D_SAE), 5)
    wanted = [f for f in LIVE if " Paris" in tokens[f]]
    assert wanted, "a token of the strongest examples is found"
    assert numbers(app) == wanted
    app.text_input(key="table_q").set_value("40").run()
    assert "No feature fits" in app.info[0].value, "40 is dead"
    app.button_group(key="table_state").set_value("all").run()
    assert 40 in numbers(app)
    app.text_input(key="table_q").set_value("no such words").run()
    assert not app.dataframe
    assert "take one back" in app.info[0].value


def test_labels(folder: Path, notes: Annotations) -> None:
    app = open_page(FEATURES)
    app.button_group(key="table_label").set_value("labelled").run()
    assert numbers(app) == [12, 30]
    app.button_group(key="table_label").set_value("favourites").run()
    assert numbers(app) == [30]
    app.text_input(key="table_q").set_value("zebra").run()
    assert not app.dataframe, "the favourite has no such word"
    app.text_input(key="table_q").set_value("").run()
    app.button_group(key="table_label").set_value("unlabelled").run()
    assert numbers(app) == [f for f in LIVE if f not in (12, 30)][:50]


def test_bounds(folder: Path) -> None:
    app = open_page(FEATURES)
    app.number_input(key="table_max_from").set_value(9.5)
    app.number_input(key="table_max_to").set_value(9.75).run()
    strongest = table(app)["max"]
    assert len(strongest) > 0
    assert strongest.between(9.5, 9.75).all()
    app.number_input(key="table_max_from").set_value(None)
    app.number_input(key="table_max_to").set_value(None)
    app.select_slider(key="table_density").set_value((0.03, 0.1)).run()
    density = table(app)["density"]
    assert len(density) > 0
    assert density.between(3, 10).all()
    app.select_slider(key="table_density").set_value((0.0, 1.0))
    app.selectbox(key="table_column").set_value("encoder_bias").run()
    app.number_input(key="table_column_from").set_value(0.5).run()
    bias = table(app)["encoder_bias"]
    assert len(bias) > 0
    assert bias.ge(0.5).all()
    assert parameter(app, "column_from") == "0.5"


def test_the_fold_says_how_many_filters_are_set(folder: Path) -> None:
    app = open_page(FEATURES)
    assert [fold.label for fold in app.expander] == ["Filters and order"]
    app.button_group(key="table_state").set_value("all")
    app.number_input(key="table_max_from").set_value(1.0)
    app.number_input(key="table_max_to").set_value(9.0).run()
    assert app.expander[0].label == "Filters and order · 2 filters set"
    app = open_page(FEATURES, look="scatter", density_to="0.1")
    assert app.expander[0].label == "Filters · 1 filter set"


def test_a_link_opens_the_same_view(folder: Path) -> None:
    state = {
        "state": "all",
        "sort": "max",
        "order": "down",
        "density_from": "0.1",
        "max_from": "2",
        "column": "mean",
        "column_to": "8",
    }
    app = open_page(FEATURES, **state)
    with FeatureStore.open(folder / "tiny") as store:
        rows = store.features(FeatureFilter(density_min=0.1, activation_min=2), limit=D_SAE).rows
    wanted = rows.to_pandas().query("mean <= 8").sort_values("max", ascending=False, kind="stable")
    assert numbers(app) == wanted["feature"].tolist()[:50]
    assert {name: parameter(app, name) for name in state} == state
    app = open_page(FEATURES, sort="nothing", state="<b>", max_from="x", q="y" * 5000)
    assert app.warning[0].value == (
        "The address has what makes no sense here: state, max_from, sort."
    )
    assert len(parameter(app, "q")) == 200


def test_views_and_addresses() -> None:
    view = FeatureView(
        q="a b",
        state="all",
        label="labelled",
        density_from=1e-5,
        density_to=0.25,
        max_from=0.0,
        column="mean",
        column_to=-3.5,
        sort="max",
        order="down",
        look="scatter",
        x="mean",
        y="max",
    )
    address = {name: value for name, value in view.address().items() if value is not None}
    assert view_of(address, ["mean", "max"]) == (view, [])
    assert set(FeatureView().address()) == set(PARAMETERS)
    assert not any(FeatureView().address().values())
    for wrong in ("nan", "inf", "", "1,5", "9" * 400):
        assert view_of({"max_to": wrong}, [])[1] == ([] if wrong[:1] == "9" else ["max_to"])


def test_scatter(folder: Path, notes: Annotations) -> None:
    app = open_page(FEATURES, look="scatter", x="density", y="mean")
    (chart,) = app.get("plotly_chart")
    assert not app.dataframe
    figure = json.loads(chart.proto.spec)
    (trace,) = figure["data"]
    assert len(trace["hovertext"]) == len(LIVE)
    assert any("feature 12 · zebra crossings" in text for text in trace["hovertext"])
    assert "61 features, each a point" in shown(app)
    app.selectbox(key="table_y").set_value("n_documents").run()
    assert parameter(app, "y") == "n_documents"


def test_scatter_figure_by_hand() -> None:
    points = pd.DataFrame({"feature": [4, 9], "density": [0.001, 0.5], "max": [1e-4, 2.0]})
    titles = {"density": "density", "max": "strongest"}
    figure = figures.scatter(points, "density", "max", ["a <b>", "c"], titles)
    text = figure.to_dict()["data"][0]["hovertext"][0]
    assert text == "feature 4 · a &lt;b&gt;<br>density 1.00e-3, strongest 1.00e-4"
    axis = figure.to_dict()["layout"]["xaxis"]
    assert axis["type"] == "log"
    assert axis["title"]["text"] == "density (log scale)"
    near = points.assign(density=[0.0, 0.5])
    linear = figures.scatter(near, "density", "max", ["a", "b"], titles)
    assert linear.to_dict()["layout"]["xaxis"].get("type") is None


def test_small_activations_are_told_apart(folder: Path) -> None:
    app = open_page(FEATURES, q=str(RARE))
    columns = json.loads(app.dataframe[0].proto.columns)
    assert columns["max"]["type_config"]["format"] == "%.4g", "1e-4 is not 0.00"
