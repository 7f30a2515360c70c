"""The explorer's page of the map of decoder directions, in every state."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import numpy as np
import pytest
import streamlit as st

from dashboards import feature_maps, find_stores
from dashboards.feature_maps import Colouring
from dashboards.views import map as page
from store import Annotations, FeatureStore
from tests.e2e.test_explorer import open_page, parameter, shown
from tests.older_stores import as_store_schema
from tests.tiny_store import D_SAE, DEAD, RARE, make_tiny_store


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_store(tmp_path_factory.mktemp("made")).parent


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    shutil.copytree(made, tmp_path / "tiny")
    monkeypatch.setenv(find_stores.STORES_VARIABLE, str(tmp_path))
    yield tmp_path
    st.cache_resource.clear()
    st.cache_data.clear()


def drawn(store: Path, colouring: Colouring, **more: Any) -> dict[str, Any]:
    """The traces of the figure by name."""
    with FeatureStore.open(store) as opened:
        found = opened.feature_map()
        live = opened.densities() > 0
    assert found is not None
    names = [f"name {n}" for n in range(D_SAE)]
    rings: dict[str, Any] = {"hits": [], "chosen": [], **more}
    figure = feature_maps.figure(found, colouring, names, live, **rings)
    traces: Any = figure.data
    return {trace.name: trace for trace in traces}


def test_points_lie_where_the_store_says_and_dead_ones_are_marked(folder: Path) -> None:
    values = [float("nan") if n == 5 else 10.0 ** (n % 4 - 3) for n in range(D_SAE)]
    traces = drawn(folder / "tiny", Colouring("density", values, False), hits=[9], chosen=[1, 2])
    dead = traces[f"never fire ({len(DEAD)})"]
    assert list(dead.customdata) == list(DEAD)
    alive = traces[f"features ({D_SAE - len(DEAD) - 1})"]
    assert 5 not in alive.customdata
    assert list(traces["no value (1)"].customdata) == [5]
    at = list(alive.customdata).index(10)
    assert (alive.x[at], alive.y[at]) == (2, -1)
    assert alive.marker.color[at] == pytest.approx(-1)  # the logarithm of 0.1
    assert list(alive.marker.colorbar.ticktext) == ["0.001", "0.01", "0.1", "1"]
    assert alive.hovertext[at] == "feature 10 · name 10<br>density 0.10"
    assert list(traces["found (1)"].customdata) == [9]
    assert list(traces["chosen (2)"].x) == [1, 2]
    assert traces["chosen (2)"].marker.symbol == "circle-open"


def test_names_are_coloured_by_how_many_have_them(folder: Path) -> None:
    names = ["" if n < 20 else f"<{n % 9}>" for n in range(D_SAE)]
    traces = drawn(folder / "tiny", Colouring("topic of documents", names, True))
    live = [n for n in range(D_SAE) if n not in DEAD]
    counts = {name: sum(names[n] == name for n in live) for name in set(names)}
    assert f"none ({counts['']})" in traces
    groups = [name for name in traces if name.startswith("&lt;")]
    assert len(groups) == 6
    kept = {name.split(" ")[0].replace("&lt;", "<").replace("&gt;", ">") for name in groups}
    rest = sum(count for name, count in counts.items() if name and name not in kept)
    assert f"other ({rest})" in traces
    assert len({traces[name].marker.color for name in groups}) == 6


def test_the_page_before_anything_is_chosen(folder: Path) -> None:
    app = open_page("map")
    assert app.get("plotly_chart")
    assert "Of a feature's 3 nearest directions" in shown(app)
    assert "(4.76 % by chance)" in shown(app)  # 3 of 63
    assert not app.dataframe
    assert not app.error
    assert not app.warning


def test_a_search_lists_what_it_found(folder: Path) -> None:
    with Annotations.open(folder / "tiny", sae_hash="5ae") as notes:
        notes.set_label(5, "<b>harbours</b> at night")
    app = open_page("map")
    app.text_input(key="map_q").set_value("night").run()
    assert app.dataframe[0].value["feature"].tolist() == [5]
    assert "##### 1 feature found" in [m.value for m in app.markdown]
    assert parameter(app, "q") == "night"
    app.text_input(key="map_q").set_value("zzzz").run()
    assert "No feature has “zzzz”" in app.info[0].value
    assert not app.dataframe


def test_a_link_brings_the_chosen_ones_and_a_list_keeps_them(folder: Path) -> None:
    with Annotations.open(folder / "tiny", sae_hash="5ae") as notes:
        notes.add_to_list(3, "read again")
    app = open_page("map", features=f"3,{RARE},40", colour="label")
    assert app.dataframe[0].value["feature"].tolist() == [3, RARE, 40]
    assert app.selectbox(key="map_colour").value == "label"
    assert "##### 3 features chosen" in [m.value for m in app.markdown]
    put = next(b for b in app.button if b.label == "Put on this list")
    assert put.disabled
    app.selectbox(key="map_list").set_value("read again").run()
    next(b for b in app.button if b.label == "Put on this list").click().run()
    assert not app.exception
    with Annotations.open(folder / "tiny", sae_hash="5ae") as notes:
        assert notes.members("read again") == [3, RARE, 40]
        assert app.toast[0].value == "2 features added to read again"
    next(b for b in app.button if b.label == "Choose none").click().run()
    assert not app.dataframe
    assert "features" not in app.query_params


def test_all_go_on_a_list_or_none(folder: Path) -> None:
    with Annotations.open(folder / "tiny", sae_hash="5ae") as notes:
        assert notes.add_all_to_list([4, 2, 4], " a  list ") == 2
        assert notes.add_all_to_list([2, 3], "a list") == 1
        assert sorted(notes.members("a list")) == [2, 3, 4]
        assert [change.what for change in notes.history(3)] == ["list a list"]
        with pytest.raises(ValueError, match="feature"):
            notes.add_all_to_list([8, -1], "a list")
        assert len(notes.members("a list")) == 3


def test_wrong_addresses_are_said(folder: Path) -> None:
    app = open_page("map", features="3,x,99", colour="gone")
    assert app.warning[0].value.endswith("makes no sense here: features, colour.")
    assert app.dataframe[0].value["feature"].tolist() == [3]
    assert app.selectbox(key="map_colour").value == "density"


def test_a_lasso_chooses_and_a_click_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    state: dict[str, Any] = {}
    monkeypatch.setattr(st, "session_state", state)
    points = [{"customdata": 7}, {"customdata": [9]}, {"customdata": 7}]
    page._choose(SimpleNamespace(points=points, box=[], lasso=[{"x": []}]))
    assert state == {"map_features": [7, 9], "map_drawn": 1}
    page._choose(SimpleNamespace(points=points[1:2], box=[], lasso=[]))
    assert state["map_open"] == 9
    page._choose(SimpleNamespace(points=[], box=[], lasso=[]))
    assert state["map_drawn"] == 2


@pytest.mark.parametrize("older", [True, False])
def test_a_store_without_a_map_says_what_to_do(folder: Path, older: bool) -> None:
    path = folder / "tiny" / "features.duckdb"
    if older:
        as_store_schema(path, 3)
    else:
        with duckdb.connect(str(path)) as con:
            con.execute("DELETE FROM map_point")
    app = open_page("map")
    assert (
        "`saescope index RUN --out FOLDER --replace`, without `--no-map`, builds it anew"
        in app.info[0].value
    )
    assert not app.get("plotly_chart")


def test_a_damaged_map_is_an_error_of_one_line(folder: Path) -> None:
    with duckdb.connect(str(folder / "tiny" / "features.duckdb")) as con:
        con.execute("UPDATE map_point SET x = 'nan' WHERE feature = 3")
    app = open_page("map")
    assert "does not fit the other tables" in app.error[0].value.replace("\\", "")


def test_first_groups_are_the_surest(folder: Path) -> None:
    with duckdb.connect(str(folder / "tiny" / "features.duckdb")) as con:
        con.execute("DELETE FROM enrichment")
        for feature, rank, name in ((3, 1, "ships"), (3, 0, "towns"), (4, 2, "ships")):
            con.execute(
                "INSERT INTO enrichment VALUES (?, ?, 'topic', ?, 1, 1, 1, 0, 1, 1, 1)",
                [feature, rank, name],
            )
    with FeatureStore.open(folder / "tiny") as store:
        assert store.first_groups("topic") == {3: "towns", 4: "ships"}
        assert store.first_groups("source") == {}
        named = feature_maps.groups(store, ("x", "x", 0, 0), "topic")
        assert np.array(named)[[2, 3, 4]].tolist() == ["", "towns", "ships"]
