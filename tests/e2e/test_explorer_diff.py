"""The explorer's page about two groups of documents, in every state."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import streamlit as st

from dashboards import comparisons, find_stores
from store import Annotations, FeatureStore
from store.diff import diff, documents_of_feature
from tests.diff_store import SHIFTED, make_topic_store
from tests.e2e.test_explorer import links, open_page, parameter, shown
from tests.older_stores import as_store_schema

DIFF = "diff"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    make_topic_store(tmp_path)
    monkeypatch.setenv(find_stores.STORES_VARIABLE, str(tmp_path))
    yield tmp_path
    st.cache_resource.clear()
    st.cache_data.clear()


def test_groups_are_written_and_read() -> None:
    for kind, words, group in (
        ("title", "music|song", "title:*music*|*song*"),
        ("key", "news/*", "key:news/*"),
        ("title", " a b | *c ", "title:*a b*|*c"),
        ("train", "left over", "split:train"),
        ("rest", "", "rest"),
        ("topic", "Arts|*x*", "topic:Arts|*x*"),
        ("all", "", "all"),
        ("title", "", "title:"),
    ):
        assert comparisons.written_group(kind, words) == group
        assert comparisons.written_group(*comparisons.read_group(group)) == group


def test_before_anything_is_chosen(folder: Path) -> None:
    app = open_page(DIFF)
    assert "Choose two groups of documents and press Compare" in app.info[0].value
    assert "documents are exchanged, not positions" in shown(app)
    assert not app.dataframe
    assert not app.error


def test_compare_by_words_of_titles(folder: Path) -> None:
    with Annotations.open(folder / "topic", sae_hash="5ae") as notes:
        notes.set_label(SHIFTED[0], "*rivers*")
    app = open_page(DIFF)
    app.text_input(key="diff_A_words").set_value("river")
    app.button[0].click().run()
    assert not app.exception
    assert not app.error
    assert parameter(app, "a") == "title:*river*"
    assert parameter(app, "b") == "rest"
    with FeatureStore.open(folder / "topic") as store:
        wanted = diff(store, "title:*river*")
    up = int((wanted.differing["difference"].to_numpy() > 0).sum())
    assert [m.value for m in app.metric] == [
        *(f"{len(wanted.differing)}", f"{up}", f"{len(wanted.differing) - up}")
    ]
    assert "30 documents · 930 positions" in shown(app)
    frame = app.dataframe[0].value
    assert frame["feature"].tolist() == wanted.differing["feature"].to_pylist()
    assert frame["density_a"].tolist() == pytest.approx(
        [100 * x for x in wanted.differing["density_a"].to_pylist()]
    )
    assert dict(zip(frame["feature"], frame["label"], strict=True))[SHIFTED[0]] == "*rivers*"
    app.toggle[0].set_value(False).run()
    assert len(app.dataframe[0].value) == len(wanted.rows)
    assert app.get("plotly_chart")


def test_a_link_opens_the_comparison_and_a_features_documents(folder: Path) -> None:
    app = open_page(DIFF, a="title:*river*", b="split:held_out", feature=str(SHIFTED[3]))
    assert app.selectbox(key="diff_B").value == "held_out"
    assert app.text_input(key="diff_A_words").value == "river"
    assert any(f"Feature {SHIFTED[3]}" in m.value for m in app.markdown)
    assert ("Open this feature", f"sae=topic&feature={SHIFTED[3]}") in links(app)
    with FeatureStore.open(folder / "topic") as store:
        wanted = documents_of_feature(store, SHIFTED[3], "title:*river*").to_pandas()
    found = app.dataframe[1].value
    assert found["title"].tolist() == wanted["title"].tolist()
    assert found["positions"].tolist() == wanted["positions"].tolist()
    assert found["share"].tolist() == pytest.approx((100 * wanted["share"]).tolist())
    others = app.dataframe[2].value["title"].tolist()
    assert others
    assert all(title.startswith("Place") for title in others), "B's documents only"


def test_compare_topics(folder: Path) -> None:
    app = open_page(DIFF)
    app.selectbox(key="diff_A").set_value("topic").run()
    assert app.multiselect(key="diff_A_names").options == ["Rivers", "Towns"]
    app.multiselect(key="diff_A_names").set_value(["Rivers"])
    app.selectbox(key="diff_B").set_value("source").run()
    app.multiselect(key="diff_B_names").set_value(["source0|x", "source2|x"])
    app.selectbox(key="diff_B").set_value("topic").run()
    app.multiselect(key="diff_B_names").set_value(["Towns"])
    app.button[0].click().run()
    assert not app.exception
    assert not app.error
    assert (parameter(app, "a"), parameter(app, "b")) == ("topic:Rivers", "topic:Towns")
    with FeatureStore.open(folder / "topic") as store:
        wanted = diff(store, "topic:Rivers", "topic:Towns")
    assert app.metric[0].value == f"{len(wanted.differing)}"
    assert "Towns · 50 documents · 1,550 positions" in shown(app)


def test_a_link_with_topics_fills_the_fields(folder: Path) -> None:
    app = open_page(DIFF, a="source:source0?x|*2?x", b="source:source1?x")
    assert app.multiselect(key="diff_A_names").value == ["source0|x", "source2|x"]
    assert app.multiselect(key="diff_B_names").value == ["source1|x"]
    assert "60 documents" in shown(app)
    assert not app.exception


def test_a_store_without_topics_says_so(folder: Path) -> None:
    as_store_schema(folder / "topic" / "features.duckdb", 3)
    app = open_page(DIFF, a="topic:Rivers")
    assert app.multiselect(key="diff_A_names").disabled
    assert app.multiselect(key="diff_A_names").placeholder == "The store has no topics of documents"
    assert "builds it anew, and labels stay" in app.error[0].value.replace("\\", "")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"a": "title:*none*"}, "no document is in this group"),
        ({"a": "<b>"}, "no group of documents"),
        ({"a": "title:*river*", "b": "split:train"}, "a document can be in one group only"),
        ({"a": "all"}, "it needs more of them"),
    ],
)
def test_wrong_groups_are_one_clear_error(
    folder: Path, parameters: dict[str, str], message: str
) -> None:
    app = open_page(DIFF, **parameters)
    assert message in app.error[0].value
    assert "Choose other documents above" in shown(app)
    assert not app.dataframe


def test_wrong_parameters_are_said_and_replaced(folder: Path) -> None:
    app = open_page(
        DIFF, a="title:*river*", permutations="7", fdr="2", other="gone", feature="4000", x="1"
    )
    said = [w.value for w in app.warning]
    assert len(said) == 4
    for part in ("'7' is no choice", "'2' is no choice", "no store named 'gone'", "'4000' is no"):
        assert any(part in each.replace("\\", "") for each in said), part
    assert app.metric
    assert "x" not in app.query_params


def test_too_few_permutations_are_said(folder: Path) -> None:
    app = open_page(DIFF, a="key:*/?", permutations="1000", fdr="0.01")
    assert not any("Feature" in m.value for m in app.markdown)
    app = open_page(DIFF, a="title:*river*", permutations="1000", fdr="0.01")
    with FeatureStore.open(folder / "topic") as store:
        undecided = diff(store, "title:*river*", permutations=1000, fdr=0.01).undecided
    said = any("choose more permutations" in w.value for w in app.warning)
    assert said == (undecided > 0)


def test_two_stores_of_one_sae(folder: Path) -> None:
    make_topic_store(folder, seed=4, shifted=False, name="plain")
    make_topic_store(folder, seed=4, name="foreign", sae_hash="another")
    app = open_page(DIFF, sae="topic")
    assert app.selectbox(key="diff_other").options == ["topic", "plain"]
    app.text_input(key="diff_A_words").set_value("river")
    app.selectbox(key="diff_other").set_value("plain")
    app.button[0].click().run()
    assert not app.error
    assert parameter(app, "other") == "plain"
    assert "90 documents · 2,790 positions" in shown(app)
    app = open_page(DIFF, sae="topic", a="all", other="foreign")
    assert "is the store of another SAE" in app.error[0].value


def test_titles_inject_nothing(folder: Path) -> None:
    app = open_page(DIFF, a="title:*river*", feature=str(SHIFTED[0]))
    titles = app.dataframe[1].value["title"]
    assert isinstance(titles, pd.Series)
    assert titles.str.contains("<").all(), "shown as text in a table"
    assert "River <" not in shown(app)
