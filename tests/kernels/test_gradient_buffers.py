"""Gradient buffers are reused, and nothing of what was in it is seen."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sae import kernels
from sae.kernels import cpp_backend, gradient_buffers
from tests.unit.test_trainer import D_IN, make_trainer


def test_what_is_given_is_taken_once() -> None:
    first, second = torch.zeros(3, 5), torch.zeros(3, 5)
    gradient_buffers.give([first, second, torch.zeros(5)])
    taken = {gradient_buffers.take(3, 5).data_ptr() for _ in range(2)}
    assert taken == {first.data_ptr(), second.data_ptr()}
    fresh = gradient_buffers.take(3, 5)
    assert fresh.shape == (3, 5)
    assert fresh.data_ptr() not in taken
    assert gradient_buffers.take(5, 3).shape == (5, 3)


def test_nothing_piles_up() -> None:
    kept = torch.zeros(4, 4)
    gradient_buffers.give([kept])
    gradient_buffers.give([])
    assert gradient_buffers.take(4, 4).data_ptr() != kept.data_ptr()


def test_only_what_can_be_handed_out_is_kept() -> None:
    gradient_buffers.give([torch.zeros(3, 5).T, torch.zeros(5, 3, dtype=torch.float64)])
    found = gradient_buffers.take(5, 3)
    assert found.is_contiguous()
    assert found.dtype == torch.float32


@pytest.mark.skipif("cpu" not in kernels.available(), reason="no compiler here")
def test_training_uses_it_and_sees_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, again = (make_trainer(tmp_path / name, kernels="cpu") for name in ("plain", "again"))
    generator = torch.Generator().manual_seed(0)
    reused: list[bool] = []

    def taken(rows: int, width: int) -> torch.Tensor:
        before = {each.data_ptr() for kept in gradient_buffers._unused.values() for each in kept}
        found = gradient_buffers.take(rows, width)
        reused.append(found.data_ptr() in before)
        return found

    monkeypatch.setattr(cpp_backend, "gradient_buffers", SimpleNamespace(take=taken))
    for step in range(6):
        x = torch.randn(16, D_IN, generator=generator)
        plain.train_step(x)
        reused.clear()
        for parameter in again.sae.parameters() if step else ():
            assert parameter.grad is not None
            parameter.grad.fill_(math.nan)
        again.train_step(x)
        assert reused.count(True) == (2 if step else 0)
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.sae.parameters(), again.sae.parameters(), strict=True)
    )
