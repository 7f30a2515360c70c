"""The explorer's pages Token and SQL on a tiny store, without a browser."""

import re
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from dashboards.figures import query_chart
from dashboards.tokens import spellings_html
from dashboards.views import sql, token
from store import Annotations, FeatureStore
from store.results import Occurrences, Spelling
from tests.e2e.test_explorer import folder, made, open_page, parameter, shown
from tests.tiny_store import CONTEXT, DEAD, EVERYWHERE, WORDS, make_rows

__all__ = ["folder", "made"]  # fixtures

ROWS = make_rows()
TOKENS, KEEP = ROWS.tokens.ravel(), ROWS.keep.ravel()


def places(word: str) -> list[int]:
    return np.flatnonzero((WORDS.index(word) == TOKENS) & KEEP).tolist()


def fires(feature: int) -> dict[int, float]:
    mine = ROWS.feature == feature
    return dict(zip(ROWS.position[mine].tolist(), ROWS.activation[mine].tolist(), strict=True))


def texts(app: AppTest) -> str:
    return "\n".join([shown(app), *(i.value for i in app.info)]).replace("\\", "")


def examples(app: AppTest) -> list[tuple[int, int]]:
    """Sequence and index of the examples on the page."""
    body = "\n".join(str(h.proto.body) for h in app.get("html"))
    found = re.findall(r'ss-peak[^>]*data-tip="[^"]*sequence (\d+), position (\d+)', body)
    return [(int(a), int(b)) for a, b in found]


def test_a_token_and_the_features_that_fire_on_it(folder: Path) -> None:
    with Annotations.open(folder / "tiny") as notes:
        notes.set_label(EVERYWHERE, "always on")
    app = open_page("token", q="the", order="share")
    at = places(" the")
    said = texts(app)
    assert f"<b>{len(at)} occurrences</b>" in said
    assert f"features fire at the last token of any of {len(at)} occurrences." in said
    frame = app.dataframe[0].value
    assert len(frame) > 10
    for row in frame.to_dict("records"):
        mine = fires(row["feature"])
        values = [mine[p] for p in at if p in mine]
        assert row["share"] == pytest.approx(100 * len(values) / len(at))
        assert row["match"] == pytest.approx(200 * len(values) / (len(at) + len(mine)))
        assert row["lift"] == pytest.approx(len(values) / len(at) / (len(mine) / KEEP.sum()))
        assert row["mean"] == pytest.approx(np.mean(values))
        assert row["max"] == max(values)
    assert frame["share"].is_monotonic_decreasing
    first = frame.iloc[0]
    assert (first.feature, first.about, first.share) == (EVERYWHERE, "always on", 100.0)
    assert f"##### Feature {EVERYWHERE} · always on" in said
    mine = fires(EVERYWHERE)
    strongest = sorted(at, key=lambda p: (-mine[p], p))
    assert examples(app) == [divmod(p, CONTEXT) for p in strongest[: token.PER_PAGE]]
    assert parameter(app, "q") == "the"
    assert parameter(app, "order") == "share"
    assert parameter(app, "feature") == str(EVERYWHERE)


def test_a_label_that_does_not_fit_its_column_ends_in_an_ellipsis(folder: Path) -> None:
    with Annotations.open(folder / "tiny") as notes:
        notes.set_label(EVERYWHERE, "fires on every word of every text")
    app = open_page("token", q="the", order="share")
    assert app.dataframe[0].value.iloc[0].about == "fires on every word of …"
    assert "fires on every word of every text" in texts(app)


def test_where_a_feature_is_silent(folder: Path) -> None:
    at, mine = places(" the"), fires(5)
    silent = [p for p in at if p not in mine]
    assert 0 < len(silent) < len(at)
    app = open_page("token", q="the", feature="5", side="silent")
    said = texts(app)
    assert f"Fires at {len(at) - len(silent)} of {len(at)} occurrences" in said
    assert examples(app) == [divmod(p, CONTEXT) for p in silent[: token.PER_PAGE]]
    app = open_page("token", q="the", feature=str(EVERYWHERE), side="silent")
    assert "It is silent at none." in texts(app)


def test_links_say_what_is_shown(folder: Path) -> None:
    app = open_page("token", q=" the", space="with", case="any", order="lift", by="text")
    assert app.text_input(key="token_q").value == " the"
    assert app.toggle(key="token_case").value is True
    names = {"q": " the", "space": "with", "case": "any", "order": "lift"}
    assert {name: parameter(app, name) for name in names} == names
    app.text_input(key="token_q").input("river").run()
    assert not app.exception
    assert parameter(app, "q") == "river"
    assert f"<b>{len(places(' river'))} occurrences</b>" in texts(app)


@pytest.mark.parametrize(
    ("q", "by", "said"),
    [
        ("2", "id", f"<b>{len(places(' the'))} occurrences</b>"),
        ("Pa", "begins", f"<b>{len(places(' Paris'))} occurrences</b>"),
        ("Pa", "text", "“Pa” is nowhere in the 640 tokens"),
        ("zebra", "begins", "“Any case” finds capitals too."),
        ("<|bos|>", "text", "It stands 40 times where no feature does"),
        ("<b>bold</b>", "text", f"<b>{len(places(' <b>bold</b>'))} occurrences</b>"),
    ],
)
def test_ways_to_look(folder: Path, q: str, by: str, said: str) -> None:
    app = open_page("token", q=q, by=by)
    assert said in texts(app)
    assert not app.error


def test_nothing_asked_and_wrong_questions(folder: Path) -> None:
    app = open_page("token")
    assert "Type a word, a phrase or a token's number" in app.info[0].value
    app.button[0].click().run()
    assert not app.exception
    assert "occurrences</b>" in texts(app)
    app = open_page("token", q="1; DROP TABLE feature", by="id")
    assert "are no token ids" in app.error[0].value
    app = open_page("token", q="99999", by="id")
    assert "no such token" in app.error[0].value
    app = open_page("token", q="the", by="magic", feature="x", space="-", side="--")
    assert len(app.warning) == 3
    assert "by=magic is none of text, begins, id" in app.warning[0].value.replace("\\", "")
    assert "occurrences</b>" in texts(app)
    app = open_page("token", q="the", feature="99")
    assert "Feature 99" not in texts(app), "there is none"


def test_a_feature_that_fires_nowhere_there(folder: Path) -> None:
    app = open_page("token", q="the", feature=str(DEAD[0]), side="silent")
    at = places(" the")
    assert f"##### Feature {DEAD[0]}" in texts(app)
    assert f"Fires at 0 of {len(at)} occurrences (0 %)." in texts(app)
    assert examples(app) == [divmod(p, CONTEXT) for p in at[: token.PER_PAGE]]
    app.text_input(key="token_q").input("river").run()
    first = app.dataframe[0].value["feature"].iloc[0]
    assert f"##### Feature {first}" in texts(app), "another question, another feature"
    assert parameter(app, "feature") == str(first)


def test_texts_of_tokens_never_become_markup() -> None:
    words = ("<img src=x>", " ", "", "\n", '"&')
    way = Spelling((1, 2, 3, 4, 5), words, 1)
    body = spellings_html(Occurrences(np.array([3]), np.array([5]), 2, (way,)))
    assert "<img" not in body
    assert "&lt;img" in body
    assert "␣" in body
    assert "<b>1 occurrence</b>" in body
    assert "and 2 where no feature fires" in body


def test_an_answer_as_a_table_a_chart_and_csv(folder: Path) -> None:
    query = "SELECT feature, max, max AS max FROM feature ORDER BY max DESC, feature LIMIT 3"
    app = open_page("sql", q=query)
    frame = app.dataframe[0].value
    assert list(frame.columns) == ["feature", "max", "max_2"]
    with FeatureStore.open(folder / "tiny") as features:
        top = features.features(sort="max", descending=True, limit=3).rows["feature"].to_pylist()
    assert frame["feature"].tolist() == top
    assert "3 rows in" in texts(app)
    assert len(app.get("plotly_chart")) == 1
    assert [b.proto.label for b in app.get("download_button")] == ["CSV"]
    assert parameter(app, "q") == query


@pytest.mark.parametrize("name", sql.EXAMPLES)
def test_every_example_answers(folder: Path, name: str) -> None:
    app = open_page("sql")
    assert not app.dataframe
    app.selectbox(key="sql_example").select(name).run()
    assert app.text_area(key="sql_query").value == sql.EXAMPLES[name]
    app.button[0].click().run()
    assert not app.exception
    assert not app.error
    if name != "Pairs that fire together":
        assert len(app.dataframe[0].value) > 1


def test_an_example_against_numpy(folder: Path) -> None:
    app = open_page("sql", q=sql.EXAMPLES["Active features at each index of a sequence"])
    frame = app.dataframe[0].value
    counts = np.bincount(ROWS.position % CONTEXT, minlength=CONTEXT) / len(ROWS.tokens)
    assert frame["index"].tolist() == np.flatnonzero(counts).tolist()
    np.testing.assert_allclose(frame["active_features"], counts[counts > 0])
    app = open_page("sql", q=sql.EXAMPLES["Commonest tokens"])
    frame = app.dataframe[0].value
    counts = np.bincount(TOKENS, minlength=len(WORDS))
    assert frame["times"].tolist() == counts[frame["token_id"]].tolist()
    assert frame["times"].tolist()[:5] == sorted(counts.tolist(), reverse=True)[:5]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("SELEC 1", 'syntax error at or near "SELEC"'),
        ("DROP TABLE feature", "only reads (given: 'DROP'; allowed: SELECT statements)"),
        ("SELECT 1; SELECT 2", "has to be one statement"),
        ("SELECT * FROM read_text('/etc/passwd')", "no other files, no network"),
        ("SELECT * FROM range(100001)", "at most 100,000 rows; add LIMIT 100000"),
    ],
)
def test_wrong_statements_are_sentences(folder: Path, query: str, said: str) -> None:
    app = open_page("sql", q=query)
    assert said in app.error[0].value.replace("\\", "")
    assert not app.dataframe
    assert app.text_area(key="sql_query").value == query


def test_no_query_no_rows_and_no_numbers(folder: Path) -> None:
    app = open_page("sql", q="SELECT feature FROM feature WHERE feature < 0")
    assert [i.value for i in app.info] == ["No row fits the query."]
    app = open_page("sql", q="SELECT text FROM vocabulary")
    assert [i.value for i in app.info] == ["A chart needs a column of numbers."]
    app.text_area(key="sql_query").input("  ")
    app.button[0].click().run()
    assert "Write a query first" in app.warning[0].value
    app = open_page(
        "sql", q="SELECT NULL AS a, [1, 2] AS b, 'x'::BLOB AS c, 1.5::DECIMAL(9, 2) AS d"
    )
    assert app.dataframe[0].value["d"].tolist() == [1.5]


def test_the_tables_are_explained_and_escaped(folder: Path) -> None:
    with duckdb.connect(str(folder / "tiny" / "features.duckdb")) as con:
        con.execute("ALTER TABLE feature ADD COLUMN topic VARCHAR")
    body = texts(open_page("sql"))
    assert "<code>activation_by_position</code>" in body
    assert "<code>density</code><span>double</span><span>n_active / kept positions</span>" in body
    assert "<code>topic</code><span>varchar</span><span>added by the indexer</span>" in body


def test_an_answer_of_another_store_is_not_shown(folder: Path) -> None:
    app = open_page("sql", q="SELECT 1 AS one")
    path = folder / "tiny" / "features.duckdb"
    shutil.copy(path, folder / "new.duckdb")
    (folder / "new.duckdb").replace(path)
    app.run()
    assert "The store has changed since" in app.info[0].value


def test_charts_of_answers() -> None:
    frame = pd.DataFrame({"<b>x": ["<i>", "b\n"], "y": [1.0, 2.0]})
    figure = query_chart(frame, "<b>x", "y", "bar").to_plotly_json()
    (bars,) = figure["data"]
    assert (bars["type"], bars["x"], bars["y"]) == ("bar", ["&lt;i&gt;", "b↵"], [1.0, 2.0])
    assert figure["layout"]["xaxis"]["title"]["text"] == "&lt;b&gt;x"
    assert figure["layout"]["yaxis"]["title"]["text"] == "y"
    (line,) = query_chart(frame, "y", "y", "line").to_plotly_json()["data"]
    assert (line["type"], line["mode"], line["x"]) == ("scatter", "lines", [1.0, 2.0])
    (points,) = query_chart(frame, "y", "y", "point").to_plotly_json()["data"]
    assert points["mode"] == "markers"
    named = pd.DataFrame({"feature": [900, 3], "y": [1, 2]})
    figure = query_chart(named, "feature", "y", "bar").to_plotly_json()
    assert (figure["data"][0]["x"], figure["layout"]["xaxis"]["type"]) == (["900", "3"], "category")
