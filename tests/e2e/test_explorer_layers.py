"""The pages Layers and Pictures, and features filtered by topic and by layer."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from dashboards import fact_figures, find_stores
from dashboards.feature_view import view_of
from store import StoreWriter
from store.pictures import GRID
from tests.e2e.test_explorer import FEATURES, links, open_page, parameter, shown
from tests.facts_store import make_facts_store
from tests.older_stores import as_store_schema
from tests.tiny_store import make_tiny_store

LAYERS, PICTURES = "layers", "pictures"
D_SAE, PLACES, DOCUMENTS = 16, 4, 6


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with facts, one of texts, one of pictures."""
    root = tmp_path_factory.mktemp("stores")
    make_facts_store(root)
    make_tiny_store(root)
    make_picture_store(root / "views" / "features.duckdb")
    return root


def make_picture_store(path: Path) -> None:
    """Six pictures of 2 x 2 places; feature n fires at place n % 4 of pictures 0 to n % 6, with
    activation n + 1."""
    meta = {GRID: {"rows": 2, "columns": 2, "first": 0}}
    with StoreWriter(path, meta=meta, d_sae=D_SAE, context=PLACES, threads=1) as writer:
        writer.add_vocabulary(["[1,1]", "[1,2]", "[2,1]", "[2,2]"])
        shape = (DOCUMENTS, PLACES)
        document = np.repeat(np.arange(DOCUMENTS)[:, None], PLACES, axis=1)
        tokens = np.tile(np.arange(PLACES), (DOCUMENTS, 1))
        writer.add_sequences(0, tokens, document, np.ones(shape, bool), np.zeros(DOCUMENTS, int))
        numbers = np.arange(DOCUMENTS)
        titles = [f"picture <{n}>" for n in numbers]
        table = {"document": numbers, "key": titles, "title": titles, "split": [0] * DOCUMENTS}
        writer.add_documents(pa.table(table))
        fires = [(n, d) for n in range(D_SAE) for d in range(n % 6 + 1)]
        feature, picture = (np.array(each) for each in zip(*fires, strict=True))
        writer.add_activations(picture * PLACES + feature % PLACES, feature, feature + 1.0)
        writer.finish()


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv(find_stores.STORES_VARIABLE, str(tmp_path))
    yield tmp_path
    st.cache_resource.clear()
    st.cache_data.clear()


def traces(figure: Any) -> Any:
    return figure.data


def infos(app: AppTest) -> str:
    return " ".join(each.value for each in app.info)


# ---- Layers -------------------------------------------------------------------------------------


def test_layers_of_a_store_of_several(folder: Path) -> None:
    app = open_page(LAYERS, sae="facts")
    text = shown(app)
    assert "3 features of 4 fire at any of 2 layers, measured on 100 training tokens" in text
    assert "more than one for 66.7 % of the features" in text  # features 0 and 2 of three
    table = app.dataframe[0].value
    # at layer 0 feature 0 has 75 %, feature 2 has 50 %, feature 1 nothing
    assert table["feature"].tolist() == [0, 2, 1]
    assert table["0"].tolist() == [75, 50, 0]
    assert table["1"].tolist() == [25, 50, 100]


def test_layers_of_one_layer_or_of_an_older_store_say_what_to_do(folder: Path) -> None:
    app = open_page(LAYERS, sae="tiny")
    assert "of one layer" in infos(app)
    assert "--mix-layers all" in app.code[0].value
    st.cache_resource.clear()
    as_store_schema(folder / "tiny" / "features.duckdb", 3)
    assert "--replace" in infos(open_page(LAYERS, sae="tiny"))


def test_the_heat_map_has_the_shares() -> None:
    shares = np.array([[0.75, 0.0], [0.25, 1.0]])
    figure = fact_figures.layer_heat_map(shares, np.array([7, 3]), ["blocks.0.x", "blocks.5.x"])
    cells, *rows = traces(figure)
    assert np.asarray(cells.z).tolist() == [[75, 0], [25, 100]]
    # the points that a click finds lie on the cells, and name their feature and share
    assert [np.asarray(row.y).tolist() for row in rows] == [[0, 0], [1, 1]]
    assert [np.asarray(row.x).tolist() for row in rows] == [[0, 1]] * 2
    assert np.asarray(rows[1].customdata).tolist() == [[7, 25], [3, 100]]
    assert "layer 5:" in rows[1].hovertemplate
    assert list(figure.to_dict()["layout"]["yaxis"]["ticktext"]) == ["0", "5"]


# ---- Features by topic and layer ----------------------------------------------------------------


def test_features_are_filtered_by_topic_and_by_layer(folder: Path) -> None:
    def features(**given: str) -> list[int]:
        return open_page(FEATURES, sae="facts", **given).dataframe[0].value["feature"].tolist()

    assert features() == [0, 1, 2]
    assert features(group="topic:Arts") == [0]
    assert features(layer="0") == [0, 2]
    assert features(layer="1") == [1]
    app = open_page(FEATURES, sae="facts", group="topic:Arts", layer="0")
    assert (parameter(app, "group"), parameter(app, "layer")) == ("topic:Arts", "0")
    assert "No feature fits" in infos(open_page(FEATURES, sae="facts", group="topic:Science"))


def test_groups_and_layers_that_a_store_has_not_are_left_out(folder: Path) -> None:
    app = open_page(FEATURES, sae="tiny", group="topic:Arts", layer="0")
    assert "no sense here: group, layer" in app.warning[0].value
    assert not {"table_group", "table_layer"} & {each.key for each in app.selectbox}
    assert view_of({"group": "topic:x"}, [], ["topic:y"])[1] == ["group"]


# ---- Pictures -----------------------------------------------------------------------------------


def test_pictures_are_in_order_and_paged(folder: Path) -> None:
    app = open_page(PICTURES, sae="views", sort="max")
    strongest = [label for label, _ in links(app)]
    assert strongest == [f"Feature {n}" for n in range(15, 3, -1)]
    text = shown(app)
    assert "1 to 12 of 16 live features" in text
    assert "picture &lt;0&gt;" in text
    app = open_page(PICTURES, sae="views", sort="max", order="up", p="2")
    assert [label for label, _ in links(app)] == [f"Feature {n}" for n in range(12, 16)]
    assert parameter(app, "p") == "2"


def test_one_feature_has_its_places_and_pictures(folder: Path) -> None:
    app = open_page(PICTURES, sae="views", feature="9")
    assert ("Open feature 9", "sae=views&feature=9") in links(app)
    assert shown(app).count("<figure") == 4  # 9 % 6 + 1 pictures
    (chart,) = app.get("plotly_chart")
    assert '"z":' in chart.proto.spec
    assert parameter(app, "feature") == "9"


def test_the_places_of_a_feature() -> None:
    figure = fact_figures.place_map(np.array([[0.0, 0.5], [0.25, 0.0]]))
    (trace,) = traces(figure)
    assert np.asarray(trace.z).tolist() == [[0, 50], [25, 0]]


def test_wrong_addresses_of_pictures_are_named(folder: Path) -> None:
    app = open_page(PICTURES, sae="views", sort="colour", order="x", p="-3", feature="99")
    text = " ".join(each.value for each in app.warning)
    assert "sort, order" in text
    assert "Features go from 0 to 15" in text


def test_a_store_of_texts_has_no_pictures(folder: Path) -> None:
    app = open_page(PICTURES, sae="tiny")
    assert "vision or diffusion" in infos(app)
    assert 'kind = "vision"' in app.code[0].value
