"""Facts of features in a store: groups of documents, layers, heads, effects on all logits."""

from collections.abc import Iterator
from fractions import Fraction
from math import comb, log
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from saescope.errors import ArtefactError, InputError
from store import FeatureStore, StoreWriter
from store.enrichment import overlap_p_values
from store.fact_results import DocumentGroup, HeadNorm, Layer, LayerShare
from tests.facts_store import D_SAE, SITES, make_facts_store, make_writer
from tests.older_stores import as_store_schema
from tests.tiny_store import make_tiny_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeatureStore]:
    path = make_facts_store(tmp_path_factory.mktemp("facts"))
    with FeatureStore.open(path) as opened:
        yield opened


def test_a_planted_topic_is_found_with_the_numbers_of_hand(store: FeatureStore) -> None:
    """Of 10 documents with a topic, 5 of Arts, feature 0 fires in just these 5: by chance once in
    C(10, 5) = 252. Three live features and two topics are 6 tests, so q = 6 / 252."""
    (found,) = store.enrichments(0)
    assert (found.kind, found.name) == ("topic", "Arts")
    assert (found.documents, found.expected) == (5, 2.5)
    assert found.q == pytest.approx(6 / 252, rel=1e-10)
    assert found.log_odds == pytest.approx(log(5.5 * 5.5 / (0.5 * 0.5)), rel=1e-12)
    assert (found.positions, found.share, found.expected_share) == (7, 1.0, 0.5)


def test_no_other_feature_has_a_topic(store: FeatureStore) -> None:
    assert [store.enrichments(number) for number in (1, 2, 3)] == [[], [], []]


def test_groups_are_listed_with_their_features(store: FeatureStore) -> None:
    """A source that all documents are of is none."""
    assert store.document_groups() == [
        DocumentGroup("topic", "Arts", 5, 1),
        DocumentGroup("topic", "Science", 5, 0),
    ]
    assert store.features_of_group("topic", "Arts") == [0]
    assert store.features_of_group("topic", "Science") == []
    assert store.features_of_group("source", "Arts") == []


def exact_tail(both: int, drawn: int, marked: int, total: int) -> Fraction:
    ways = sum(
        comb(marked, x) * comb(total - marked, drawn - x)
        for x in range(both, min(drawn, marked) + 1)
    )
    return Fraction(ways, comb(total, drawn))


def test_p_values_are_those_of_exact_arithmetic() -> None:
    rng = np.random.default_rng(0)
    total = 300
    drawn, marked = rng.integers(0, total + 1, (2, 200))
    low, high = np.maximum(0, drawn + marked - total), np.minimum(drawn, marked)
    both = rng.integers(low, high + 1)
    found = overlap_p_values(both, drawn, marked, total)
    for p, x, n, k in zip(found, both.tolist(), drawn.tolist(), marked.tolist(), strict=True):
        exact = exact_tail(x, n, k, total)
        if x * total > n * k:
            assert p == pytest.approx(float(exact), rel=1e-9)
        else:
            assert p == 1.0


def test_random_documents_are_enriched_no_more_often_than_stated(tmp_path: Path) -> None:
    """500 features at random over 60 documents of 4 random topics: at a rate of 5 % hardly any."""
    rng = np.random.default_rng(1)
    path = tmp_path / "features.duckdb"
    with StoreWriter(path, meta={}, d_sae=500, context=2, threads=1) as writer:
        writer.add_vocabulary(["a"])
        document = np.repeat(np.arange(60)[:, None], 2, axis=1)
        keep = np.tile([False, True], (60, 1))
        writer.add_sequences(0, np.zeros((60, 2), int), document, keep, np.zeros(60, int))
        numbers = np.arange(60)
        names = [str(n) for n in numbers]
        table = {"document": numbers, "key": names, "title": names, "split": [0] * 60}
        writer.add_documents(pa.table(table))
        at, feature = np.nonzero(rng.random((60, 500)) < 0.3)
        writer.add_activations(2 * at + 1, feature, np.ones(len(at)))
        topics = [f"topic {n}" for n in rng.integers(0, 4, 60)]
        writer.add_document_groups("topic", numbers, topics)
        writer.finish()
    with FeatureStore.open(path) as found:
        assert sum(len(found.enrichments(n)) for n in range(500)) <= 2


def test_the_histogram_of_effects_on_logits(store: FeatureStore) -> None:
    found = store.logit_histogram(1)
    assert found is not None
    assert (found.edges[0], found.edges[20], found.edges[-1]) == (-0.5, 0.5, 1.5)
    assert found.counts.nonzero()[0].tolist() == [0, 39]
    assert found.counts.sum() == 4
    assert store.logit_histogram(0) is None


def test_the_profile_of_layers(store: FeatureStore) -> None:
    assert store.layers() == [Layer(0, SITES[0], 100, 0.75), Layer(1, SITES[1], 100, None)]
    assert store.layer_profile(0) == [LayerShare(0, 6, 3.0, 0.75), LayerShare(1, 2, 1.0, 0.25)]
    assert store.layer_profile(3) == []
    assert store.layer_shares().tolist() == [[0.75, 0, 0.5, 0], [0.25, 1, 0.5, 0]]


def test_the_norms_of_heads(store: FeatureStore) -> None:
    assert store.head_norms(0) == [HeadNorm(0, 3.0, 0.75), HeadNorm(1, 1.0, 0.25)]
    assert [each.share for each in store.head_norms(1)] == [0, 0]


def test_stores_without_these_things_have_none_of_them(tmp_path: Path) -> None:
    with FeatureStore.open(make_tiny_store(tmp_path)) as tiny:
        assert tiny.has_facts
        assert tiny.document_groups() == tiny.enrichments(3) == tiny.layers() == []
        assert tiny.layer_profile(3) == tiny.head_norms(3) == []
        assert tiny.layer_shares().shape == (0, tiny.d_sae)


@pytest.mark.parametrize("schema", [2, 3])
def test_an_older_store_says_to_build_it_anew(tmp_path: Path, schema: int) -> None:
    path = make_tiny_store(tmp_path)
    as_store_schema(path, schema)
    with FeatureStore.open(path) as older:
        assert not older.has_facts
        assert older.feature(3).n_active > 0
        for query in (older.enrichments, older.layer_profile, older.head_norms):
            with pytest.raises(ArtefactError, match=rf"schema {schema}.*--replace"):
                query(3)


def test_wrong_facts_are_refused(tmp_path: Path) -> None:
    def one(document: list[int], names: list[str], kind: str = "topic") -> None:
        writer.add_document_groups(kind, document, names)

    with pytest.raises(RuntimeError), make_writer(tmp_path / "f.duckdb") as writer:  # noqa: PT012
        with pytest.raises(InputError, match="no such kind"):
            one([0], ["a"], "colour")
        with pytest.raises(InputError, match="given twice"):
            one([0, 0], ["a", "b"])
        with pytest.raises(InputError, match="too many groups"):
            one(list(range(101)), [str(n) for n in range(101)])
        with pytest.raises(InputError, match="wrong shape"):
            writer.add_logit_histograms([0], [0.0], [1.0], np.zeros((1, 39), int))
        with pytest.raises(InputError, match="out of range"):
            writer.add_logit_histograms([D_SAE], [0.0], [1.0], np.zeros((1, 40), int))
        with pytest.raises(InputError, match="no table of layers"):
            writer.add_layer_profiles(np.full((2, D_SAE), -1.0), None)
        with pytest.raises(InputError, match="wrong shape"):
            writer.add_head_norms(np.zeros((D_SAE + 1, 2)))
