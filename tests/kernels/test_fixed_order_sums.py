"""Sums whose bits do not depend on the number of threads."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sae.kernels import fixed_order_sums

VALUES = torch.randn(300, 1001, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(300, generator=torch.Generator().manual_seed(1))


def by_threads(function: Callable[[], Tensor]) -> list[Tensor]:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(function())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    return found


@pytest.mark.parametrize(
    "function",
    [
        lambda: fixed_order_sums.total(VALUES),
        lambda: fixed_order_sums.total(VALUES.double()),
        lambda: fixed_order_sums.of_rows(WEIGHT, VALUES),
    ],
)
def test_threads_change_no_bit(function: Callable[[], Tensor]) -> None:
    first, *others = by_threads(function)
    assert all(torch.equal(first, other) for other in others)


def test_threads_change_no_bit_of_a_deterministic_product() -> None:
    left, right = torch.rand(100, 5000), torch.rand(5000, 60)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = by_threads(lambda: fixed_order_sums.product(left, right))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first, other) for other in others)
    torch.testing.assert_close(first, fixed_order_sums.product(left, right))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (1024,), (1025,), (3, 0, 2), (70, 333)])
def test_values_and_gradients(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found = fixed_order_sums.total(values)
    found.backward()
    torch.testing.assert_close(found, values.sum())
    assert values.grad is not None
    assert torch.equal(values.grad, torch.ones(shape, dtype=torch.float64))


def test_of_rows() -> None:
    torch.testing.assert_close(
        fixed_order_sums.of_rows(WEIGHT, VALUES), WEIGHT @ VALUES, rtol=1e-4, atol=1e-4
    )
