"""Absorption and splitting by their definitions: numbers by hand, and planted dictionaries."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from sae.evaluation.planted import PlantedConfig, PlantedDictionary
from sae.probing.absorption import absorption, main_latents
from sae.probing.planted_absorption import ParentAbsorption, planted_absorption
from saescope.errors import InputError

MAIN = np.array([0])
# latents 0 and 1 lie along p, 2 and 3 at cosines 0.6 and 0.05 with it, 4 away from it
P = np.array([2.0, 0.0])
DECODER = np.array([[1.0, 0.0], [2.0, 0.0], [0.6, 0.8], [0.05, np.sqrt(1 - 0.05**2)], [-1.0, 0.0]])


def of(x: float, **codes: float) -> tuple[float, bool]:
    """Fraction and full absorption of one row with A = x and these codes."""
    dense = np.zeros((1, 5))
    for name, value in codes.items():
        dense[0, int(name[1:])] = value
    rows = np.array([[x, 3.0]])
    found = absorption(rows, sparse.csr_array(dense), DECODER, P, MAIN)
    return float(found.fraction[0]), bool(found.full[0])


@pytest.mark.parametrize(
    ("x", "codes", "fraction", "full"),
    [
        (2.0, {"f0": 2.0}, 0.0, False),  # the main latent writes all of A
        (2.0, {"f0": 2.5, "f1": 1.0}, 0.0, False),  # more than A, whatever others write
        (2.0, {"f1": 1.0}, 1.0, True),  # 1 x 2 of A = 2, and the main latent is silent
        (2.0, {"f0": 0.5, "f1": 0.5}, 2 / 3, False),  # m = 0.5, a = 1: 1 / 1.5
        (2.0, {"f0": 1.0, "f1": 5.0}, 0.5, False),  # a is no more than A - m = 1
        (2.0, {"f0": 0.5, "f1": 0.395}, 0.0, False),  # a = 0.79 is less than 0.8
        (2.0, {"f1": 0.4}, 1.0, True),  # a = 0.8 is just enough
        (2.0, {"f2": 1.0}, 0.0, False),  # writes 0.6: too little for either
        (2.0, {"f2": 1.5}, 1.0, True),  # writes 0.9 of 2
        (2.0, {"f3": 20.0}, 0.0, True),  # writes 1 of 2 at a cosine of 0.05: full alone
        (2.0, {"f4": -1.0}, 0.0, False),  # writes 1 of 2, but points away
        (2.0, {"f0": 1e-9, "f1": 1.0}, 1.0, True),  # below 1e-8 is silent
        (-1.0, {"f1": 1.0}, 0.0, False),  # the concept is not there
        (2.0, {}, 0.0, False),
    ],
)
def test_a_row_by_hand(x: float, codes: dict[str, float], fraction: float, full: bool) -> None:
    found, fully = of(x, **codes)
    assert found == pytest.approx(fraction, abs=1e-12)
    assert fully is full


def test_three_absorbers_at_most_are_counted() -> None:
    decoder = np.tile([1.0, 0.0], (6, 1))
    codes = sparse.csr_array(np.array([[0.5, 0.1, 0.2, 0.3, 0.4, 0.0]]))
    found = absorption(np.array([[2.0, 0.0]]), codes, decoder, P, MAIN)
    assert found.fraction[0] == pytest.approx(0.9 / 1.4)  # 0.4 + 0.3 + 0.2, without 0.1


def test_lengths_of_decoder_rows_do_not_matter() -> None:
    """c_i is of what a latent writes: folding a length into the code changes nothing."""
    draw = np.random.default_rng(0)
    x, p = draw.normal(size=(50, 4)) + 1, np.ones(4)
    decoder = draw.normal(size=(8, 4))
    codes = np.maximum(draw.normal(size=(50, 8)), 0)
    length = np.linspace(0.2, 5, 8)
    one = absorption(x, sparse.csr_array(codes), decoder, p, MAIN)
    other = absorption(x, sparse.csr_array(codes / length), decoder * length[:, None], 3 * p, MAIN)
    assert one.fraction.any()
    np.testing.assert_allclose(one.fraction, other.fraction, atol=1e-12)
    np.testing.assert_array_equal(one.full, other.full)


def test_a_concept_of_two_latents_is_split_and_one_of_one_is_not() -> None:
    draw = np.random.default_rng(1)
    y = np.arange(400) % 4 == 0
    half = np.arange(400) % 8 == 0
    codes = np.zeros((400, 6))
    codes[:, 0] = y & half
    codes[:, 1] = y & ~half
    codes[:, 2] = y
    codes[:, 3:] = draw.random((400, 3)) < 0.1
    both = main_latents(sparse.csr_array(codes[:, [0, 1, 3, 4, 5]]), y, seed=0)
    assert sorted(both.latents.tolist()) == [0, 1]
    assert both.f1 == 1.0
    one = main_latents(sparse.csr_array(codes), y, seed=0)
    assert one.latents.tolist() == [2]


def test_a_latent_that_fires_elsewhere_stands_for_nothing() -> None:
    y = np.arange(40) % 2 == 0
    found = main_latents(sparse.csr_array((~y).astype(float)[:, None]), y, seed=0)
    assert found.latents.tolist() == []
    assert found.f1 == 0.0
    with pytest.raises(InputError, match="two rows with the label"):
        main_latents(sparse.csr_array(np.ones((3, 1))), np.array([True, False, False]), seed=0)


def test_shapes_that_do_not_fit_are_named() -> None:
    codes = sparse.csr_array((1, 5))
    with pytest.raises(InputError, match="shapes do not fit"):
        absorption(np.ones((2, 2)), codes, DECODER, P, MAIN)
    with pytest.raises(InputError, match="shapes do not fit"):
        absorption(np.ones((1, 3)), codes, DECODER, np.ones(3), MAIN)
    with pytest.raises(InputError, match="length 0"):
        absorption(np.ones((1, 2)), codes, DECODER, np.zeros(2), MAIN)


# ---- planted parents and children ---------------------------------------------------------------

ROWS = 4000


@pytest.fixture(scope="module")
def planted() -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """A dictionary of three families, its true codes, each feature's parent, and rows."""
    config = PlantedConfig(features=24, active=1.2, structure="hierarchical", children=7)
    dictionary = PlantedDictionary(replace(config, child_probability=0.2, zipf=0.2))
    basis = torch.linalg.qr(dictionary.directions.T).Q.T  # orthogonal: no interference
    dictionary.directions = basis.contiguous()
    true = dictionary.sample(ROWS, stream=0).codes.double().numpy()
    parent = np.full(24, -1)
    families = dictionary.families.numpy()
    parent[families[:, 1]] = families[:, 0]
    return dictionary.directions.double().numpy(), true, parent, true @ basis.double().numpy()


def measured(
    planted: tuple[Any, np.ndarray, np.ndarray, np.ndarray], codes: np.ndarray, decoder: np.ndarray
) -> list[ParentAbsorption]:
    directions, true, parent, x = planted
    return planted_absorption(
        x, sparse.csr_array(codes), decoder, sparse.csr_array(true), directions, parent
    )


def test_the_true_dictionary_absorbs_nothing(planted: Any) -> None:
    directions, true, _, _ = planted
    found = measured(planted, true, directions)
    assert [each.parent for each in found] == [0, 8, 16]
    for each in found:
        assert each.main == (each.parent,)
        assert (each.f1, each.fraction, each.full) == (1.0, 0.0, 0.0)
        assert (each.recall_with_child, each.recall_alone) == (1.0, 1.0)


def test_children_that_absorb_their_parent_are_found(planted: Any) -> None:
    """Family 0's child latents write the parent too, whose own latent is silent there."""
    directions, true, _, _ = planted
    codes, decoder = true.copy(), directions.copy()
    child = true[:, 1:8].sum(1) > 0
    codes[child, 0] = 0
    decoder[1:8] += directions[0]
    first, *others = measured(planted, codes, decoder)
    test = (true[:, 0] > 0) & (np.arange(ROWS) >= ROWS // 2)
    share = child[test].mean()
    assert first.main == (0,)  # each child is too rare to raise F1 by 0.03
    assert 0.15 < share < 0.25
    # amounts are 1 to 2: the child's latent writes at least half of the parent's, above 0.4
    assert first.full == pytest.approx(share)
    assert first.fraction == pytest.approx(share)
    assert (first.recall_with_child, first.recall_alone) == (0.0, 1.0)
    for each in others:
        assert (each.fraction, each.full, each.recall_with_child) == (0.0, 0.0, 1.0)


def test_frequent_children_that_take_their_parent_over_split_it(planted: Any) -> None:
    """Half of the parent's rows have one latent, half another: both are main, neither absorbs."""
    directions, true, _, _ = planted
    even = np.arange(ROWS) % 2 == 0
    codes = np.hstack([true, np.where(even, 0, true[:, 0])[:, None]])
    codes[~even, 0] = 0
    first = measured(planted, codes, np.vstack([directions, directions[:1]]))[0]
    assert sorted(first.main) == [0, 24]
    assert (first.fraction, first.full, first.recall_alone) == (0.0, 0.0, 1.0)


def test_a_random_dictionary_absorbs_next_to_nothing(planted: Any) -> None:
    draw = np.random.default_rng(2)
    decoder = draw.normal(size=(24, 48))
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    codes = np.abs(draw.normal(size=(ROWS, 24))) * (draw.random((ROWS, 24)) < 0.1)
    for each in measured(planted, codes, decoder):
        assert each.full < 0.05
        assert each.fraction < 0.05
        assert each.f1 < 0.5  # nor does it know the concept


def test_without_a_parent_that_fires_there_is_an_error(planted: Any) -> None:
    directions, true, _, x = planted
    with pytest.raises(InputError, match="no parent fires"):
        planted_absorption(
            x,
            sparse.csr_array(true),
            directions,
            sparse.csr_array(true),
            directions,
            np.full(24, -1),
        )
