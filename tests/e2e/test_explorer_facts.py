"""Topics, layers, heads and effects on all logits in the explorer: the numbers are the store's."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import streamlit as st

from dashboards import fact_figures, find_stores
from dashboards.feature_html import features_page
from dashboards.group_bars import groups_html
from store import Annotations, FeatureStore
from store.export.record import read_record
from store.export.saedashboard import dashboard_feature
from store.export.tables import rows_of
from store.fact_results import Enrichment, HeadNorm, Layer, LayerShare
from store.results import Histogram
from tests.e2e.test_explorer import FEATURE, open_page, shown
from tests.facts_store import make_facts_store
from tests.older_stores import as_store_schema


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_facts_store(tmp_path_factory.mktemp("facts")).parent


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    shutil.copytree(made, tmp_path / "facts")
    monkeypatch.setenv(find_stores.STORES_VARIABLE, str(tmp_path))
    yield tmp_path
    st.cache_resource.clear()
    st.cache_data.clear()


def titles(text: str) -> set[str]:
    wanted = ("Topics and sources", "Layers", "Attention heads")
    return {title for title in wanted if f"##### {title}" in text}


def test_a_feature_shows_what_its_store_has(folder: Path) -> None:
    text = shown(open_page(FEATURE, feature="0"))
    assert titles(text) == {"Topics and sources", "Layers", "Attention heads"}
    assert "100 % of its positions, 50 % expected" in text
    assert "in 5 documents, 2.5 expected · q 2.4e-02" in text
    assert 'href="features?sae=facts&amp;group=topic%3AArts"' in text
    assert "It fires at 2 of 2 layers. Mean layer 0.25" in text
    text = shown(open_page(FEATURE, feature="2"))
    assert "In none more than by chance." in text
    assert "It fires at 2 of 2 layers. Mean layer 0.50" in text


def test_an_older_store_shows_none_of_it(folder: Path) -> None:
    as_store_schema(folder / "facts" / "features.duckdb", 3)
    assert titles(shown(open_page(FEATURE, feature="0"))) == set()


def test_bars_are_escaped() -> None:
    group = Enrichment(
        kind="topic", name='<img src="x">', documents=1, expected=0.5, log_odds=1.0, q=0.01,
        positions=1, share=0.4, expected_share=0.2,
    )  # fmt: skip
    for text in (groups_html([group]), groups_html([group], 'a"b')):
        assert "<img" not in text
        assert "width:40.0%" in text
        assert "left:20.0%" in text
    assert "<a " not in groups_html([group])


def traces(figure: Any) -> Any:
    return figure.data


def test_figures_have_the_numbers() -> None:
    layers = [
        Layer(0, "blocks.3.hook_resid_post", 100, 0.5),
        Layer(1, "blocks.9.hook_resid_post", 100, None),
    ]
    shares = [LayerShare(0, 7, 3.0, 0.75), LayerShare(1, 2, 1.0, 0.25)]
    (bars,) = traces(fact_figures.layer_profile(layers, shares))
    assert (list(bars.x), list(bars.y)) == (["3", "9"], [75, 25])
    assert "fires on 7 of 100 tokens" in bars.hovertext[0]
    (bars,) = traces(fact_figures.head_norms([HeadNorm(0, 3.0, 0.75), HeadNorm(1, 1.0, 0.25)]))
    assert list(bars.y) == [75, 25]
    counts = np.array([2, 0, 1])
    histogram = Histogram(np.array([-1.5, -0.5, 0.5, 1.5]), counts)
    (bars,) = traces(fact_figures.logit_histogram(histogram))
    assert (list(bars.x), bars.y[0], bars.y[2]) == ([-1, 0, 1], 2, 1)
    assert bars.hovertext[2] == "0.50 to 1.50: 1 token"
    (line,) = traces(fact_figures.adjacent_layers(layers))
    assert (list(line.x), list(line.y)) == (["3–9"], [0.5])


def test_exports_have_the_facts(made: Path) -> None:
    with FeatureStore.open(made) as store, Annotations.open(made) as notes:
        record = read_record(store, notes, 0)
        (row,) = rows_of("enrichment", record)
        assert row[:6] == (0, 0, "topic", "Arts", 5, 2.5)
        first, second = rows_of("layers", record)
        assert first[1:] == (0, "blocks.0.hook_resid_post", 6, 3.0, 0.75)
        assert second[-1] == 0.25
        assert rows_of("heads", record) == [(0, 0, 3.0, 0.75), (0, 1, 1.0, 0.25)]
        page = features_page([record], store.overview(), "x")
        assert "Arts" in page
        assert "<span>blocks.0.hook_resid_post</span><span>75 %</span>" in page
        assert "<span>head 1</span><span>25 %</span>" in page
        found = dashboard_feature(store, read_record(store, notes, 1))
        assert found["logits_hist_data_bar_heights"] == [3] + [0] * 38 + [1]
        assert found["logits_hist_data_bar_values"][0] == pytest.approx(-0.475)
        assert dashboard_feature(store, record)["decoder_weights_dist"] == [0.75, 0.25]
