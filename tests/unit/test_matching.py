"""Matching features of two SAEs, with answers that are known."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array, csr_array

from saescope.errors import InputError
from store import FeatureStore
from store.compare import compare_stores, same_harvest
from store.matching import (
    Matching,
    correlation_blocks,
    cosine_blocks,
    expected_max_cosine,
    match_features,
)
from tests.renumbered_store import make_renumbered_store
from tests.tiny_store import CONTEXT, D_SAE, N_SEQUENCES, make_rows, make_tiny_store


def by_cosine(a: np.ndarray, b: np.ndarray, **options: float) -> Matching:
    return match_features(cosine_blocks(a, b), len(a), len(b), **options)  # type: ignore[arg-type]


def test_an_sae_and_itself_with_permuted_features() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(700, 24))
    order = rng.permutation(700)
    # lengths do not count
    found = by_cosine(a, a[order] * rng.uniform(0.1, 9, (700, 1)))
    assert len(found.matched) == 700
    pairs = found.pairs.to_pandas()
    assert (order[pairs["feature_b"]] == pairs["feature_a"]).all()
    assert (order[found.nearest_a] == np.arange(700)).all()
    assert found.mean_max_a == pytest.approx(1, abs=1e-6)
    assert len(found.unmatched_a) == len(found.unmatched_b) == 0


def test_a_planted_dictionary_in_two_seeds() -> None:
    """400 shared features with noise, 100 and 300 of each one's own: those and no others match."""
    rng = np.random.default_rng(1)
    shared = rng.normal(size=(400, 128))
    a = np.concatenate([shared + 0.3 * rng.normal(size=shared.shape), rng.normal(size=(100, 128))])
    b = np.concatenate([rng.normal(size=(300, 128)), shared + 0.3 * rng.normal(size=shared.shape)])
    found = by_cosine(a, b)
    matched = found.matched.to_pandas()
    assert len(matched) == 400
    assert (matched["feature_a"] + 300 == matched["feature_b"]).all()
    assert found.unmatched_a.tolist() == list(range(400, 500))
    assert found.unmatched_b.tolist() == list(range(300))
    # cosine of two noisy copies: 1 / (1 + 0.09)
    assert matched["similarity"].mean() == pytest.approx(1 / 1.09, abs=0.005)


def test_random_decoders_have_the_chance_value() -> None:
    rng = np.random.default_rng(2)
    for d, n_a, n_b in ((16, 800, 300), (64, 600, 900)):
        found = by_cosine(rng.normal(size=(n_a, d)), rng.normal(size=(n_b, d)))
        assert found.mean_max_a == pytest.approx(expected_max_cosine(d, n_b), abs=0.006)
        assert found.mean_max_b == pytest.approx(expected_max_cosine(d, n_a), abs=0.006)


def test_expected_max_cosine_by_hand() -> None:
    # in 3 dimensions a cosine is uniform over [-1, 1]: the largest of n has mean (n - 1) / (n + 1)
    for n in (1, 2, 5, 99):
        assert expected_max_cosine(3, n) == pytest.approx((n - 1) / (n + 1), abs=1e-4)
    # in 2 it is cos of a uniform angle: of two, the mean is 4 / pi^2
    assert expected_max_cosine(2, 2) == pytest.approx(4 / np.pi**2, abs=1e-3)


def test_the_matching_is_the_hungarian_one() -> None:
    rng = np.random.default_rng(3)
    for n_a, n_b in ((6, 6), (40, 25), (25, 40), (1, 5), (300, 300)):
        similarity = rng.uniform(0.01, 1, (n_a, n_b)).astype(np.float32)
        for size in (1, 7, 1000):
            blocks = [(i, similarity[i : i + size]) for i in range(0, n_a, size)]
            found = match_features(blocks, n_a, n_b, candidates=400)
            rows, columns = linear_sum_assignment(similarity, maximize=True)
            total = found.pairs["similarity"].to_numpy().sum()
            assert total == pytest.approx(similarity[rows, columns].sum(), rel=1e-6)
            assert len(found.pairs) == min(n_a, n_b)
            assert found.nearest_a.tolist() == similarity.argmax(1).tolist()
            assert found.nearest_b.tolist() == similarity.argmax(0).tolist()
            np.testing.assert_array_equal(found.similarity_b, similarity.max(0))
            other = found.flipped
            assert other.nearest_a.tolist() == similarity.argmax(0).tolist()
            assert other.pairs["feature_a"].equals(found.pairs["feature_b"])
            assert other.pairs["feature_b"].equals(found.pairs["feature_a"])


def test_greedy_would_be_worse() -> None:
    # both features of A like b0 best; only one can have it
    similarity = np.array([[0.9, 0.8], [0.85, 0.1]], dtype=np.float32)
    found = match_features([(0, similarity)], 2, 2, threshold=0.82)
    pairs = {(r["feature_a"], r["feature_b"]) for r in found.pairs.to_pylist()}
    assert pairs == {(0, 1), (1, 0)}
    assert found.nearest_a.tolist() == [0, 0]
    assert found.matched.num_rows == 1
    assert found.unmatched_a.tolist() == [0]
    assert found.unmatched_b.tolist() == [1]
    assert (found.mean_max_a, found.mean_max_b) == pytest.approx((0.875, 0.85))


def test_pairs_that_are_not_similar_are_no_pairs() -> None:
    similarity = np.array([[0.5, -0.2], [-0.1, -0.3], [0.0, -1.0]], dtype=np.float32)
    found = match_features([(0, similarity)], 3, 2)
    assert found.pairs.to_pylist() == [{"feature_a": 0, "feature_b": 0, "similarity": 0.5}]


def test_few_candidates_keep_the_best_ones() -> None:
    rng = np.random.default_rng(4)
    a = rng.normal(size=(500, 32))
    order = rng.permutation(500)
    found = by_cosine(a, a[order], candidates=2)
    assert len(found.matched) == 500


def test_wrong_blocks_and_options() -> None:
    block = np.zeros((2, 3), np.float32)
    for blocks in ([(1, block)], [(0, block)], [(0, block), (2, block[:, :2])]):
        with pytest.raises(InputError, match="blocks"):
            match_features(blocks, 4, 3)
    with pytest.raises(InputError, match="threshold"):
        match_features([(0, block)], 2, 3, threshold=1.5)
    with pytest.raises(InputError, match=r"different widths.*given: \(4, 5\)"):
        by_cosine(np.ones((2, 4)), np.ones((2, 5)))
    with pytest.raises(InputError, match="not of the same positions"):
        list(correlation_blocks(csr_array((3, 2)), csr_array((4, 2))))


def test_correlations_are_those_of_numpy() -> None:
    rng = np.random.default_rng(5)
    a = rng.exponential(size=(200, 300)) * (rng.random((200, 300)) < 0.2)
    b = rng.exponential(size=(200, 9)) * (rng.random((200, 9)) < 0.3)
    a[:, 3] = 0
    b[:, 4] = 2.5  # fires everywhere alike
    b[:, 5] = 3 * a[:, 7]
    blocks = list(correlation_blocks(csr_array(a), csr_array(b)))
    assert [first for first, _ in blocks] == [0, 256]
    found = np.concatenate([block for _, block in blocks])
    with np.errstate(invalid="ignore"):
        wanted = np.nan_to_num(np.corrcoef(a.T, b.T)[:300, 300:])
    wanted[:, 4] = 0
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert found[7, 5] == pytest.approx(1)
    assert not found[3].any()


def test_stores_of_one_harvest(tmp_path: Path) -> None:
    order = np.random.default_rng(6).permutation(D_SAE)
    one, two = make_tiny_store(tmp_path), make_renumbered_store(tmp_path, order)
    rows = make_rows()
    with FeatureStore.open(one) as a, FeatureStore.open(two) as b:
        assert same_harvest(a, b)
        found = compare_stores(a, b)
        few = compare_stores(a, b, most_activations=a.overview().n_activations // 4 + 1)
    pairs = found.matching.matched.to_pandas()
    live = np.unique(rows.feature)
    assert sorted(pairs["feature_a"]) == live.tolist()
    assert (order[pairs["feature_a"]] == pairs["feature_b"]).all()
    assert pairs["similarity"].min() == pytest.approx(1)
    assert found.positions == found.all_positions == rows.keep.sum()
    assert few.positions == rows.keep[: N_SEQUENCES // 4].sum()
    inside = rows.position < N_SEQUENCES // 4 * CONTEXT
    dense = coo_array(
        (rows.activation, (rows.position, rows.feature)), shape=(N_SEQUENCES * CONTEXT, D_SAE)
    ).toarray()[: N_SEQUENCES // 4 * CONTEXT][rows.keep[: N_SEQUENCES // 4].ravel()]
    pair = few.matching.pairs.to_pylist()[-1]
    assert set(few.matching.matched["feature_a"].to_pylist()) <= set(rows.feature[inside])
    again = np.argsort(order)[pair["feature_b"]]
    wanted = np.corrcoef(dense[:, pair["feature_a"]], dense[:, again])[0, 1]
    assert pair["similarity"] == pytest.approx(wanted, abs=1e-5)


def test_stores_of_two_harvests(tmp_path: Path) -> None:
    one = make_tiny_store(tmp_path)
    two = make_renumbered_store(tmp_path, np.arange(D_SAE), harvest="another")
    with FeatureStore.open(one) as a, FeatureStore.open(two) as b:
        assert not same_harvest(a, b)
        with pytest.raises(InputError, match=r"only over one harvest.*given: 'another'"):
            compare_stores(a, b)


def test_every_assignment_by_hand() -> None:
    """Against all assignments of a small matrix, where some similarities are negative."""
    rng = np.random.default_rng(7)
    for _ in range(20):
        similarity = rng.uniform(-1, 1, (4, 4)).astype(np.float32)
        found = match_features([(0, similarity)], 4, 4)
        best = max(
            sum(max(float(similarity[i, j]), 0) for i, j in enumerate(each))
            for each in itertools.permutations(range(4))
        )
        assert found.pairs["similarity"].to_numpy().sum() == pytest.approx(best, abs=1e-6)
