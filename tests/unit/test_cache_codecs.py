"""Codes of keys and values, each against what it says of itself, worked out in another way."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sae.analysis.cache_codecs import (
    _STEPS,
    Calibrated,
    Grouped,
    Principal,
    Sparse,
    float8,
    uniform,
)
from saescope.errors import InputError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("along", ["channel", "token"])
def test_groups_have_levels_between_their_ends(along: str) -> None:
    x = normal(2, 3, 8, 12)
    found = Grouped(2, along, 4)(x, 0)
    axis = 2 if along == "channel" else 3
    wanted = np.empty(x.shape)
    ordered, out = np.moveaxis(x.numpy(), axis, -1), np.moveaxis(wanted, axis, -1)
    for at in np.ndindex(*ordered.shape[:-1]):
        for start in range(0, ordered.shape[-1], 4):
            group = ordered[at][start : start + 4]
            levels = np.linspace(group.min(), group.max(), 4)
            nearest = levels[abs(group[:, None] - levels).argmin(1)]
            out[at][start : start + 4] = nearest
    np.testing.assert_allclose(found.x_hat, wanted, atol=5e-3)
    assert found.bits == x.numel() * 2 + x.numel() // 4 * 32


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="divisors of 12"):
        Grouped(2, "token", 5)(normal(1, 1, 4, 12), 0)


@pytest.mark.parametrize(("bits", "error"), [(1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154)])
def test_uniform_levels_are_the_best_for_a_normal_variable(bits: int, error: float) -> None:
    """Max 1960, table II: the mean square error of the best uniform quantiser."""
    x = normal(200_000)
    assert float((uniform(x, torch.tensor(_STEPS[bits]), bits) - x).square().mean()) == (
        pytest.approx(error, rel=0.02)
    )
    assert len(uniform(x, torch.tensor(_STEPS[bits]), bits).unique()) == 2**bits


def test_steps_of_more_bits_are_the_best_too() -> None:
    x = normal(400_000)
    for bits in range(5, 9):
        errors = [
            float((uniform(x, torch.tensor(_STEPS[bits] * f), bits) - x).square().mean())
            for f in (0.85, 1.0, 1.15)
        ]
        assert errors[1] == min(errors)


def test_calibrated_levels_are_about_each_channels_mean() -> None:
    mean, deviation = 5 * normal(3, 8, seed=1), normal(3, 8, seed=2).abs() + 0.1
    rows = mean + deviation * normal(4000, 3, 8)
    codec = Calibrated.fit(rows, 2)
    x = (mean + deviation * normal(500, 3, 8, seed=3)).permute(1, 0, 2)[None]
    found = codec(x, 0)
    relative = ((found.x_hat - x) / deviation[:, None]).square().mean()
    assert float(relative) == pytest.approx(0.1188, rel=0.1)
    assert found.bits == 2 * x.numel()
    assert codec.constant_bits == 16 * 2 * 24


def test_sparse_codes_are_what_their_bits_say() -> None:
    atoms = torch.nn.functional.normalize(normal(100, 16), dim=1)
    mean = normal(16, seed=1)
    index = torch.tensor([[3, 40], [7, 99]])
    x = (2 * atoms[index[:, 0]] - atoms[index[:, 1]] + mean).view(1, 1, 2, 16)
    codec = Sparse.fit(normal(500, 3, 16), atoms, mean, 2)
    found = codec(x, 0)
    # two atoms are found, their values within float8's 3 bits of mantissa
    assert float((found.x_hat - x).norm(dim=-1).max()) < 0.15
    assert found.bits == 2 * 2 * (7 + 8)
    assert codec.constant_bits == 16 * (100 * 16 + 16 + 1)
    assert Sparse(atoms, mean, codec.scale, 4)(x, 0).bits == 2 * 4 * 15


def test_float8_has_256_numbers_and_saturates() -> None:
    x = torch.linspace(-1000, 1000, 100_001)
    found = float8(x, torch.tensor(1.0))
    assert len(found.unique()) < 256
    assert float(found.max()) == 448
    assert float(((found - x) / x)[(x.abs() > 1) & (x.abs() < 448)].abs().max()) <= 1 / 16


def test_principal_components_of_each_head() -> None:
    basis = torch.linalg.qr(normal(2, 8, 8)).Q
    spread = torch.tensor([8.0, 4.0, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05])
    rows = torch.einsum("rhc,hdc->rhd", normal(4000, 2, 8) * spread, basis) + 3
    codec = Principal.fit(rows, 2, 8)
    x = rows[:50].permute(1, 0, 2)[None]
    found = codec(x, 0)
    # what the other six have, and the levels of the two
    wanted = 6 * 0.05**2 + 1.04e-4 * (8**2 + 4**2)
    assert float((found.x_hat - x).square().sum(-1).mean()) == pytest.approx(wanted, rel=0.3)
    assert found.bits == x.shape[1] * x.shape[2] * 2 * 8
    none = Principal.fit(rows, 0, 4)(x, 0)
    torch.testing.assert_close(none.x_hat, rows.mean(0)[None, :, None].expand_as(x))
    assert none.bits == 0
