"""Permutation tests over documents, and the Benjamini-Hochberg adjustment."""

from itertools import combinations

import numpy as np
import pytest

from saescope.errors import InputError
from store.permutation import (
    Relabellings,
    benjamini_hochberg,
    density_difference,
    density_p_values,
)


def test_adjusted_p_values_by_hand() -> None:
    # sorted 0.005, 0.01, 0.02, 0.9, 1: times 5/1, 5/2, 5/3, 5/4, 1, then the least from above
    p = np.array([0.02, 0.9, 0.005, 1.0, 0.01])
    np.testing.assert_allclose(benjamini_hochberg(p), [0.1 / 3, 1.0, 0.025, 1.0, 0.025], rtol=1e-12)
    assert benjamini_hochberg(np.empty(0)).tolist() == []
    assert benjamini_hochberg(np.array([0.3])).tolist() == [0.3]
    for wrong in ([0.0], [0.5, 1.1], [float("nan")]):
        with pytest.raises(InputError, match="p-values lie above 0 and at most at 1"):
            benjamini_hochberg(np.array(wrong))


def test_rejections_are_those_of_the_step_up_procedure() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.uniform(1e-4, 1, 30) ** 3
        sorted_ = np.sort(p)
        below = np.flatnonzero(sorted_ <= 0.1 * np.arange(1, 31) / 30)
        bound = sorted_[below[-1]] if len(below) else 0
        assert (benjamini_hochberg(p) <= 0.1).tolist() == (p <= bound).tolist()


def test_relabellings_keep_sizes_and_are_the_same_for_a_seed() -> None:
    for n_a in (2, 7):
        many = Relabellings(9, n_a, 600, 3)
        labels = np.concatenate(list(many.blocks()), axis=1)
        assert labels.shape == (9, 600)
        assert (labels.sum(0) == n_a).all()
        again = np.concatenate(list(Relabellings(9, n_a, 600, 3).blocks()), axis=1)
        np.testing.assert_array_equal(labels, again)
        np.testing.assert_array_equal(labels, np.concatenate(list(many.blocks()), axis=1))
        other = np.concatenate(list(Relabellings(9, n_a, 600, 4).blocks()), axis=1)
        assert (labels != other).any()
        # each document is as often in A as any other: 600 n_a / 9, with a deviation below 12
        assert np.abs(labels.sum(1) - 600 * n_a / 9).max() < 50


def exact_p(counts: np.ndarray, kept: np.ndarray, n_a: int) -> float:
    """The share of all divisions whose difference is at least that of the first n_a documents."""

    def difference(chosen: tuple[int, ...]) -> float:
        inside = np.isin(np.arange(len(kept)), chosen)
        return abs(
            counts[inside].sum() / kept[inside].sum() - counts[~inside].sum() / kept[~inside].sum()
        )

    observed = difference(tuple(range(n_a)))
    all_ = [difference(chosen) for chosen in combinations(range(len(kept)), n_a)]
    return float(np.mean([value >= observed - 1e-12 for value in all_]))


def test_p_values_are_those_of_all_divisions() -> None:
    rng = np.random.default_rng(1)
    kept = rng.integers(5, 20, 10)
    counts = rng.binomial(kept, 0.3, (6, 10))
    counts[0, :4] = kept[:4]  # fires everywhere in A
    counts[0, 4:] = 0
    counts[1] = 0
    counts[1, 0] = 1
    in_a = np.arange(10) < 4
    found = density_p_values(counts, kept, in_a, Relabellings(10, 4, 20_000, 0))
    wanted = [exact_p(row, kept, 4) for row in counts]
    assert wanted[0] == pytest.approx(1 / 210)
    # 50 hits decide: a deviation of 1 / sqrt(50) of p at most; here seeds are fixed
    np.testing.assert_allclose(found, wanted, rtol=0.35, atol=2e-3)
    assert found.min() >= 1 / 20_001


def test_p_is_the_50th_hits_rank_or_counts_all() -> None:
    counts, kept = np.array([[3, 0, 1, 0, 2, 5]]), np.full(6, 10)
    in_a = np.array([True, True, True, False, False, False])
    relabellings = Relabellings(6, 3, 1000, 7)
    labels = np.concatenate(list(relabellings.blocks()), axis=1)
    in_each = (counts @ labels)[0]
    differences = density_difference(in_each, np.array(11), np.array(30.0), 60.0)
    hit = np.abs(differences) >= abs(4 / 30 - 7 / 30) - 1e-12
    rank = int(np.flatnonzero(np.cumsum(hit) >= 50)[0]) + 1
    assert density_p_values(counts, kept, in_a, relabellings).tolist() == [50 / rank]
    # fewer than 50: (r + 1) / (B + 1)
    few = Relabellings(6, 3, 40, 7)
    hits = int(hit[:40].sum())
    # the same seed draws the same first forty
    np.testing.assert_array_equal(np.concatenate(list(few.blocks()), axis=1), labels[:, :40])
    assert density_p_values(counts, kept, in_a, few).tolist() == [(hits + 1) / 41]


def test_random_labels_give_p_values_that_are_not_too_small() -> None:
    """Documents differ in length and rate, but not by group: P(p <= a) is at most a."""
    rng = np.random.default_rng(2)
    found = []
    for seed in range(60):
        kept = rng.integers(3, 200, 40)
        rate = rng.beta(0.3, 3, (20, 40))  # a feature's rate differs from document to document
        counts = rng.binomial(kept, rate)
        in_a = rng.permutation(np.arange(40) < 15)
        found.append(density_p_values(counts, kept, in_a, Relabellings(40, 15, 400, seed)))
    p = np.concatenate(found)
    for bound in (0.01, 0.05, 0.2):
        assert (p <= bound).mean() <= bound + 3 * np.sqrt(bound / len(p)), bound
    assert (p <= 0.2).mean() > 0.15, "nor too large"
