"""Filters of the feature table against plain Python; nothing that is given becomes SQL."""

import shutil
from collections.abc import Iterator
from typing import Any

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saescope.errors import InputError
from store import Between, FeatureFilter, FeatureStore, OneOf
from tests.tiny_store import D_SAE, DEAD, EVERYWHERE, make_tiny_store

INJECTIONS = (
    'density" > 0 OR 1=1 --',
    "density; DROP TABLE db.feature",
    "1=1) OR (1",
    "first_row",
    "rowid",
    "db.feature.density",
    "",
    "DENSITY",
)
TOPICS = ("rivers", "it's", 'a "b"', None)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeatureStore]:
    """The tiny store, with a column of texts and a column of flags that an indexer added."""
    made = make_tiny_store(tmp_path_factory.mktemp("made"))
    path = tmp_path_factory.mktemp("with_topics") / made.name
    shutil.copy(made, path)
    with duckdb.connect(str(path)) as con:
        con.execute("ALTER TABLE feature ADD COLUMN topic VARCHAR")
        con.execute("ALTER TABLE feature ADD COLUMN flag BOOLEAN")
        con.executemany(
            "UPDATE feature SET topic = ? WHERE feature % 4 = ?",
            [(topic, index) for index, topic in enumerate(TOPICS)],
        )
    with FeatureStore.open(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def table(features: FeatureStore) -> list[dict[str, Any]]:
    return features.features(limit=D_SAE).rows.to_pylist()


def found(features: FeatureStore, **filters: Any) -> list[int]:
    page = features.features(FeatureFilter(**filters), limit=D_SAE)
    numbers = page.rows["feature"].to_pylist()
    assert page.total == len(numbers)
    return numbers


NUMBERS = ("density", "mean", "std", "max", "n_active", "n_documents", "encoder_bias", "feature")
BETWEEN = st.builds(
    Between,
    st.sampled_from(NUMBERS),
    st.none() | st.floats(-2, 70, allow_nan=False),
    st.none() | st.floats(-2, 70, allow_nan=False),
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(between=st.lists(BETWEEN, max_size=3), state=st.sampled_from(["all", "live", "dense"]))
def test_bounds_of_any_columns(
    features: FeatureStore, table: list[dict[str, Any]], between: list[Between], state: str
) -> None:
    def fits(row: dict[str, Any]) -> bool:
        least = {"all": -1.0, "live": 0.0, "dense": 0.1}[state]
        return row["density"] > least and all(
            (b.low is None or row[b.column] >= b.low)
            and (b.high is None or row[b.column] <= b.high)
            for b in between
        )

    expected = [row["feature"] for row in table if fits(row)]
    assert found(features, between=tuple(between), state=state) == expected


def test_values_of_texts_are_taken_literally(features: FeatureStore) -> None:
    for index, topic in enumerate(TOPICS[:3]):
        expected = list(range(index, D_SAE, 4))
        assert found(features, one_of=(OneOf("topic", (str(topic),)),)) == expected
    both = found(features, one_of=(OneOf("topic", ("rivers", "it's")),))
    assert both == [n for n in range(D_SAE) if n % 4 < 2]
    assert found(features, one_of=(OneOf("topic", ("' OR 1=1 --",)),)) == []
    assert found(features, one_of=(OneOf("topic", ()),)) == []


def test_features_without_a_label_are_all_but_those_with_one(features: FeatureStore) -> None:
    labelled = (3, 5, 8)
    expected = [n for n in range(D_SAE) if n not in labelled]
    assert found(features, not_ids=labelled) == expected
    assert found(features, not_ids=()) == list(range(D_SAE))
    assert found(features, ids=(5, 6), not_ids=labelled) == [6]


def test_dense_and_dead_features(features: FeatureStore, table: list[dict[str, Any]]) -> None:
    assert tuple(found(features, state="dead")) == DEAD
    dense = found(features, state="dense")
    assert dense == [row["feature"] for row in table if row["density"] > 0.1]
    assert EVERYWHERE in dense
    assert len(dense) < D_SAE


@pytest.mark.parametrize("name", INJECTIONS)
def test_a_column_is_one_of_the_tables_own(features: FeatureStore, name: str) -> None:
    for filters in (
        FeatureFilter(between=(Between(name, 0),)),
        FeatureFilter(one_of=(OneOf(name, ("a",)),)),
    ):
        with pytest.raises(InputError, match="no such column to filter by") as caught:
            features.features(filters)
        assert "encoder_bias" in str(caught.value) or "topic" in str(caught.value)
    with pytest.raises(InputError, match="no such column"):
        features.features(sort=name)


def test_columns_of_another_kind_are_refused(features: FeatureStore) -> None:
    for column in ("topic", "flag"):
        with pytest.raises(InputError, match="no such column to filter by"):
            features.features(FeatureFilter(between=(Between(column, 0),)))
    with pytest.raises(InputError, match="no such column to filter by"):
        features.features(FeatureFilter(one_of=(OneOf("density", ("0",)),)))


@pytest.mark.parametrize("value", ["1", "0 OR 1=1", True, float("nan"), [1]])
def test_bounds_are_numbers(features: FeatureStore, value: Any) -> None:
    with pytest.raises(InputError, match="density: is not a number"):
        features.features(FeatureFilter(between=(Between("density", value),)))
    with pytest.raises(InputError, match="topic: is no text"):
        features.features(FeatureFilter(one_of=(OneOf("topic", (1,)),)))  # type: ignore[arg-type]
