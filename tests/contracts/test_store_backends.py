"""A store in Parquet, here and in an object store, answers every query as the DuckDB file does."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from saescope.errors import ArtefactError, InputError
from saescope.paths import as_path
from store import FeatureFilter, FeatureStore
from store.diff import diff
from store.export.parquet_store import Layout, write_parquet_store
from tests.s3_server import s3_bucket
from tests.tiny_store import (
    D_SAE,
    DEAD,
    EVERYWHERE,
    N_DOCUMENTS,
    N_SEQUENCES,
    RARE,
    make_tiny_store,
)

SMALL = Layout(group_rows=64, file_rows=300, other_rows=16)
BACKENDS = ("folder", "s3")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, FeatureStore]]:
    """The tiny store as a DuckDB file, as a folder of Parquet files, and in a bucket."""
    folder = tmp_path_factory.mktemp("backends")
    with s3_bucket(folder / "cache"):
        found = {"file": FeatureStore.open(make_tiny_store(folder))}
        for name, path in (("folder", folder / "tiny?[a]*"), ("s3", as_path("s3://bucket/a/tiny"))):
            write_parquet_store(found["file"], path, layout=SMALL)
            found[name] = FeatureStore.open(path)
        yield found
        for store in found.values():
            store.close()


FEATURES = (EVERYWHERE, RARE, 0, 20, DEAD[0])


def _of_features(name: str) -> Callable[[FeatureStore], Any]:
    return lambda store: [getattr(store, name)(feature) for feature in FEATURES]


def _of_several(name: str) -> Callable[[FeatureStore], Any]:
    return lambda store: getattr(store, name)(FEATURES)


def _token_queries(store: FeatureStore) -> Any:
    found = store.occurrences(" Paris", match="begins")
    return [
        found,
        *(store.features_on(found, exact=exact) for exact in (False, True)),
        store.features_on(found, order="max", anywhere=True),
        store.firing_on(EVERYWHERE, found),
        store.silent_on(20, found),
        store.examples_at(EVERYWHERE, found.position[:5].tolist(), 3),
    ]


def _corpus(store: FeatureStore) -> Any:
    corpus = store.corpus
    return [corpus.sequence, corpus.tokens, corpus.document, corpus.keep, corpus.joined]


QUERIES: dict[str, Callable[[FeatureStore], Any]] = {
    "activations": lambda store: [
        store.activations(f, limit) for f in FEATURES for limit in (None, 0, 7)
    ],
    "activations_between": lambda store: store.activations_between(40, 200),
    "coactivating": _of_features("coactivating"),
    "coactivating_of": _of_several("coactivating_of"),
    "corpus": _corpus,
    "densities": FeatureStore.densities,
    "document": lambda store: [store.document(n) for n in (0, 7, N_DOCUMENTS - 1)],
    "document_groups": FeatureStore.document_groups,
    "documents": lambda store: [store.documents(), store.documents("TITLE <2", 3, 1)],
    "enrichments": _of_features("enrichments"),
    "enrichments_of": _of_several("enrichments_of"),
    "examples": lambda store: [
        store.examples(f, kind, window)
        for f in FEATURES
        for kind in ("top", "interval")
        for window in (None, 2)
    ],
    "feature": _of_features("feature"),
    "statistics_of": _of_several("statistics_of"),
    "examples_of": _of_several("examples_of"),
    "feature_map": FeatureStore.feature_map,
    "features": lambda store: [
        store.features(FeatureFilter(), column, descending, 20, 3)
        for column in store.columns
        for descending in (False, True)
    ],
    "features_of_document": lambda store: [store.features_of_document(n) for n in (0, 24)],
    "features_of_group": lambda store: store.features_of_group("topic", "none"),
    "features_of_position": lambda store: [store.features_of_position(2, n) for n in range(16)],
    "features_of_sequence": lambda store: [
        store.features_of_sequence(n) for n in range(N_SEQUENCES)
    ],
    "first_groups": lambda store: store.first_groups("topic"),
    "fires_near": lambda store: store.fires_near(EVERYWHERE, 0, 3),
    "fires_without": lambda store: store.fires_without(EVERYWHERE, 0),
    "grid": lambda store: store.grid,
    "has_facts": lambda store: store.has_facts,
    "head_norms": _of_features("head_norms"),
    "measured_effects": _of_features("measured_effects"),
    "measured_effects_of": _of_several("measured_effects_of"),
    "head_norms_of": _of_several("head_norms_of"),
    "activations_below": lambda store: store.activations_below(EVERYWHERE, 1.0),
    "histogram": _of_features("histogram"),
    "histograms_of": _of_several("histograms_of"),
    "layer_profile": _of_features("layer_profile"),
    "layer_profiles_of": _of_several("layer_profiles_of"),
    "layer_shares": FeatureStore.layer_shares,
    "layers": FeatureStore.layers,
    "live_features": FeatureStore.live_features,
    "logit_histogram": _of_features("logit_histogram"),
    "logit_histograms_of": _of_several("logit_histograms_of"),
    "logits": _of_features("logits"),
    "logits_of": _of_several("logits_of"),
    "neighbours": _of_features("neighbours"),
    "neighbours_of": _of_several("neighbours_of"),
    "next_live": _of_features("next_live"),
    "number_columns": lambda store: store.number_columns,
    "occurrences": _token_queries,
    "overview": lambda store: dataclasses.replace(store.overview(), bytes=0),
    "picture": lambda store: store.picture(0),
    "position_profile": _of_features("position_profile"),
    "previous_live": _of_features("previous_live"),
    "random_live": lambda store: store.random_live(3),
    "sql": lambda store: [
        store.sql(f"SELECT * FROM {table.name} ORDER BY ALL") for table in store.tables()
    ],
    "tables": FeatureStore.tables,
    "token_profile": _of_features("token_profile"),
    "top_tokens": lambda store: store.top_tokens(range(D_SAE)),
    "vocabulary": lambda store: [store.vocabulary.text(n) for n in range(len(store.vocabulary))],
    "diff": lambda store: diff(store, "key:doc-1*", permutations=50).rows,
}
"""by the query that each is of"""
_TOGETHER = {"examples_at", "features_on", "firing_on", "silent_on"}
"""queries that the one of `occurrences` asks too"""
_NO_QUERIES = {"open", "close", "database"}


def _same(one: Any, other: Any) -> bool:
    """Whether two answers are equal, arrays and tables in them too."""
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, pa.Table):
        return one.equals(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if dataclasses.is_dataclass(one):
        return type(one) is type(other) and _same(vars(one), vars(other))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


def _answer(store: FeatureStore, query: str) -> Any:
    try:
        return QUERIES[query](store)
    except (ArtefactError, InputError) as error:
        return type(error), str(error).removeprefix(str(store.path))


def test_every_query_has_its_row() -> None:
    names = {name for name, _ in inspect.getmembers(FeatureStore) if not name.startswith("_")}
    assert names == (QUERIES.keys() - {"diff"}) | _TOGETHER | _NO_QUERIES


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("query", QUERIES)
def test_answers_are_those_of_the_file(
    stores: dict[str, FeatureStore], query: str, backend: str
) -> None:
    assert _same(_answer(stores["file"], query), _answer(stores[backend], query))


HOSTILE = (
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM 'https://example.org/x.parquet'",
    "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM read_text('/etc/hostname')",
    "COPY feature TO '/tmp/never.csv'",
    "ATTACH '/tmp/never.duckdb'",
    "SET enable_external_access = true",
    "CREATE TABLE x AS SELECT 1",
    "DROP VIEW feature",
    "INSTALL httpfs",
    "SELECT 1; SELECT 2",
)
OF_THE_STORE = (
    "SELECT * FROM '{}'",
    "SELECT * FROM read_parquet('{}')",
    "DESCRIBE SELECT * FROM read_parquet('{}')",
    "SELECT (SELECT count(*) FROM parquet_metadata('{}'))",
    "WITH x AS (SELECT * FROM Read_Blob('{}')) SELECT * FROM x",
    "SELECT * FROM query('SELECT * FROM ''{}''')",
    "SELECT * FROM glob('store://*')",
)


@pytest.mark.parametrize("backend", ["file", *BACKENDS])
@pytest.mark.parametrize("query", HOSTILE)
def test_a_reader_reaches_nothing_else(
    stores: dict[str, FeatureStore], query: str, backend: str
) -> None:
    with pytest.raises(InputError):
        stores[backend].sql(query)


@pytest.mark.parametrize("query", OF_THE_STORE)
def test_a_reader_names_no_file_of_the_store(stores: dict[str, FeatureStore], query: str) -> None:
    views = stores["folder"].sql("SELECT sql FROM duckdb_views() WHERE view_name = 'histogram'")
    name = views["sql"][0].as_py().split("'")[1]
    assert name.startswith("store://histogram/")
    with pytest.raises(InputError, match="reads the store only"):
        stores["folder"].sql(query.format(name))
