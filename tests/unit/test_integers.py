"""Whole numbers of any library are numbers; truth values, floats and strings are not."""

from typing import Any

import numpy as np
import pytest
import torch

from sae.architectures.topk import TopKConfig, TopKSAE
from saescope.errors import InputError
from saescope.integers import as_index, as_indices

INTEGERS = [
    7,
    np.int64(7),
    np.uint8(7),
    np.int16(7),
    np.array(7),
    torch.tensor(7),
    torch.tensor(7, dtype=torch.int32),
    torch.arange(8)[-1],
]
NOT_INTEGERS = [
    True,
    np.True_,
    torch.tensor(True),
    7.0,
    np.float32(7),
    np.array(7.0),
    torch.tensor(7.0),
    "7",
    b"7",
    None,
    [7],
    np.array([7]),
    torch.tensor([7]),
    7j,
]


@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_every_kind_of_integer_becomes_pythons(value: Any) -> None:
    found = as_index(value, where="feature", low=0, high=7)
    assert type(found) is int
    assert found == 7


@pytest.mark.parametrize("value", NOT_INTEGERS, ids=repr)
def test_what_is_no_integer_is_refused_in_one_clear_error(value: Any) -> None:
    with pytest.raises(InputError, match=r"^feature: is not a whole number .*allowed: 0 to 9"):
        as_index(value, where="feature", low=0, high=9)


@pytest.mark.parametrize("value", [-1, 8, np.int64(8), torch.tensor(-1), 2**70])
def test_out_of_range_says_what_is_allowed(value: Any) -> None:
    with pytest.raises(InputError, match=r"feature: out of range \(given: -?\d+; allowed: 0 to 7"):
        as_index(value, where="feature", low=0, high=7)


def test_open_ranges() -> None:
    assert as_index(2**70, where="n", low=0) == 2**70
    with pytest.raises(InputError, match="whole numbers from 0"):
        as_index(-1, where="n", low=0)
    with pytest.raises(InputError, match="whole numbers up to 3"):
        as_index(4, where="n", high=3)


@pytest.mark.parametrize(
    "values",
    [
        [3, 5],
        (3, 5),
        range(3, 6, 2),
        np.array([3, 5]),
        torch.tensor([3, 5]),
        [np.int64(3), 5],
        {3: "a", 5: "b"},
        iter([3, 5]),
    ],
    ids=lambda each: type(each).__name__,
)
def test_every_kind_of_list(values: Any) -> None:
    found = as_indices(values, where="positions", low=0)
    assert found == [3, 5]
    assert all(type(each) is int for each in found)


@pytest.mark.parametrize(
    "values", ["35", b"35", 3, np.int64(3), np.array(3), torch.tensor(3), None], ids=repr
)
def test_what_is_no_list_is_refused(values: Any) -> None:
    with pytest.raises(InputError, match="positions: is not a list of whole numbers"):
        as_indices(values, where="positions")


@pytest.mark.parametrize(
    "values",
    [[1.0], np.array([1.5]), np.array([True]), torch.ones(2), np.array([[1]]), ["1"], [None]],
    ids=repr,
)
def test_lists_of_something_else_are_refused(values: Any) -> None:
    with pytest.raises(InputError, match="positions: is not a whole number"):
        as_indices(values, where="positions")


def test_no_number_of_an_empty_list() -> None:
    assert as_indices(np.array([], np.int64), where="positions") == []


def test_a_configuration_with_numpys_numbers_trains() -> None:
    config = TopKConfig(d_sae=np.int64(16), k=np.int32(2))  # type: ignore[arg-type]
    assert (type(config.k), type(config.d_sae)) == (int, int)
    made = TopKSAE(config, np.int64(4))  # type: ignore[arg-type]
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    plain = TopKSAE(TopKConfig(d_sae=16, k=2), 4)
    plain.load_state_dict(made.state_dict())
    assert torch.equal(made(x).x_hat, plain(x).x_hat)


def test_prompts_and_limits_of_any_library(tiny_model: Any) -> None:
    ids = tiny_model.tokenize("The river")
    expected = tiny_model.generate_ids("The river", max_new_tokens=2)
    given = torch.tensor(ids)
    assert tiny_model.generate_ids(given, max_new_tokens=np.int64(2)) == expected
    assert tiny_model.token_strings(np.array(ids)) == tiny_model.token_strings(ids)
    with pytest.raises(InputError, match="prompt: out of range"):
        tiny_model.generate_ids([10**6])
    with pytest.raises(InputError, match="max_new_tokens: is not a whole number"):
        tiny_model.generate_ids(ids, max_new_tokens=2.0)
