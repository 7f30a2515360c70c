"""The fused optimiser step against torch's Adam in float64 between projection and unit norm."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae import kernels
from sae.kernels.adam import adam_, gradient_square

LR, BETA1, BETA2, EPS = 1e-2, 0.9, 0.999, 1e-8
SHAPES = [(1, 1), (3, 5), (17, 33), (64, 24), (5, 1000), (2, 4097), (70, 700), (1,), (9,), (4097,),
          (40_000,), ()]  # fmt: skip
MATRICES = [shape for shape in SHAPES if len(shape) == 2]


@pytest.fixture(params=["torch", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Within the test, the named backend for float32 on the CPU."""
    if request.param not in kernels.available():
        pytest.skip("no compiler here")
    with kernels.using(request.param):
        assert kernels.backend() == request.param
        yield request.param


def draw(*shape: int, seed: int = 0, unit: bool = False) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values / values.norm(dim=-1, keepdim=True) if unit else values


def projected(gradient: Tensor, unit: Tensor) -> Tensor:
    return gradient - (gradient * unit).sum(-1, keepdim=True) * unit


class Reference:
    """torch.optim.Adam in float64 between explicit steps."""

    def __init__(self, start: Tensor, unit_rows: bool) -> None:
        self.parameter = torch.nn.Parameter(start.double().clone())
        self.unit_rows = unit_rows
        self.adam = torch.optim.Adam([self.parameter], lr=LR, betas=(BETA1, BETA2), eps=EPS)

    def step(self, gradient: Tensor, scale: float) -> None:
        gradient = gradient.double()
        if self.unit_rows:
            gradient = projected(gradient, self.parameter.detach())
        self.parameter.grad = gradient * scale
        self.adam.step()
        if self.unit_rows:
            with torch.no_grad():
                norm = self.parameter.norm(dim=-1, keepdim=True)
                self.parameter.div_(torch.where(norm > 0, norm, 1.0))

    @property
    def moments(self) -> list[Tensor]:
        return [self.adam.state[self.parameter][name] for name in ("exp_avg", "exp_avg_sq")]


def take(
    parameter: Tensor, gradient: Tensor, moments: list[Tensor], step: int, scale: float, unit: bool
) -> None:
    adam_(
        parameter, gradient, *moments, lr=LR, beta1=BETA1, beta2=BETA2, eps=EPS, step=step,
        scale=scale, unit_rows=unit,
    )  # fmt: skip


def agree(
    shape: tuple[int, ...], unit: bool, dtype: torch.dtype, *, steps: int = 6, scale: float = 0.3
) -> None:
    start = draw(*shape, unit=unit).to(dtype)
    expected, found = Reference(start, unit), start.clone()
    moments = [torch.zeros_like(found) for _ in range(2)]
    for step in range(1, steps + 1):
        gradient = (draw(*shape, seed=step) * 10 ** (step - 3)).to(dtype)
        kept = gradient.clone()
        square = gradient_square(found, gradient, unit)
        exact = gradient.double()
        exact = projected(exact, found.double()) if unit else exact
        assert square.dtype == torch.float64
        assert float(square) == pytest.approx(float(exact.square().sum()), rel=1e-5, abs=1e-12)
        take(found, gradient, moments, step, scale, unit)
        expected.step(gradient, scale)
        assert torch.equal(gradient, kept)
    tolerance: Any = (
        {"rtol": 1e-4, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-11}
    )
    torch.testing.assert_close(found.double(), expected.parameter.detach(), **tolerance)
    for moment, reference in zip(moments, expected.moments, strict=True):
        size = float(reference.abs().max())
        torch.testing.assert_close(
            moment.double(),
            reference,
            rtol=tolerance["rtol"],
            atol=size * tolerance["rtol"] + 1e-30,
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_adam(backend: str, shape: tuple[int, ...]) -> None:
    agree(shape, False, torch.float32)
    agree(shape, False, torch.float32, scale=1.0)
    if backend == "torch":
        agree(shape, False, torch.float64)


@pytest.mark.parametrize("shape", MATRICES)
def test_agrees_with_adam_between_projection_and_unit_norm(
    backend: str, shape: tuple[int, int]
) -> None:
    agree(shape, True, torch.float32)
    if backend == "torch":
        agree(shape, True, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_go_to_torch(dtype: torch.dtype) -> None:
    start = draw(6, 5, unit=True).to(dtype)
    expected, found = Reference(start, True), start.clone()
    moments = [torch.zeros_like(found) for _ in range(2)]
    gradient = draw(6, 5, seed=1).to(dtype)
    take(found, gradient, moments, 1, 1.0, True)
    expected.step(gradient, 1.0)
    torch.testing.assert_close(found, expected.parameter.detach().to(dtype), rtol=0.02, atol=0.01)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 70), st.booleans(), st.integers(0, 10**6))
def test_any_shape(rows: int, width: int, unit: bool, seed: int) -> None:
    for name in ("torch", "cpu"):
        with kernels.using(name):
            parameter = draw(rows, width, seed=seed, unit=unit).float()
            gradient = draw(rows, width, seed=seed + 1).float()
            exact = gradient.double()
            exact = projected(exact, parameter.double()) if unit else exact
            square = float(gradient_square(parameter, gradient, unit))
            assert square == pytest.approx(float(exact.square().sum()), rel=1e-5, abs=1e-10)
            moments = [torch.zeros_like(parameter), torch.zeros_like(parameter)]
            take(parameter, gradient, moments, 1, 1.0, unit)
            assert torch.isfinite(parameter).all()
            if unit:
                torch.testing.assert_close(parameter.norm(dim=1), torch.ones(rows))


def test_a_projection_that_leaves_little_does_not_cancel(backend: str) -> None:
    unit = draw(50, 33, unit=True).float()
    gradient = 1000 * unit + draw(50, 33, seed=1).float()
    exact = projected(gradient.double(), unit.double()).square().sum()
    assert float(gradient_square(unit, gradient, True)) == pytest.approx(float(exact), rel=2e-4)


@pytest.mark.parametrize("step", [1, 2, 10, 1000, 100_000])
def test_bias_correction_by_step(backend: str, step: int) -> None:
    """From given moments, by the formula."""
    w, g, m, v = (draw(7, 9, seed=seed) for seed in range(4))
    v = v.square()
    found, moments = w.float(), [m.float(), v.float()]
    take(found, g.float(), moments, step, 0.5, False)
    m = BETA1 * m + (1 - BETA1) * 0.5 * g
    v = BETA2 * v + (1 - BETA2) * (0.5 * g).square()
    root = (v / (1 - BETA2**step)).sqrt() + EPS
    expected = w - LR * (m / (1 - BETA1**step)) / root
    torch.testing.assert_close(found, expected.float())
    torch.testing.assert_close(moments, [m.float(), v.float()])


def test_zero_rows_and_zero_gradients(backend: str) -> None:
    """A row of zeros gives no NaN; without gradient a unit row stays and its moments decay."""
    start = draw(4, 20, unit=True).float()
    start[0] = 0
    gradient = draw(4, 20, seed=1).float()
    gradient[1] = 0
    found, moments = start.clone(), [torch.zeros_like(start), torch.zeros_like(start)]
    moments[0][2], moments[1][2] = 0.5, 2.0
    gradient[2] = 0
    take(found, gradient, moments, 5, 1.0, True)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(found[1], start[1])
    torch.testing.assert_close(moments[0][2], torch.full((20,), 0.5 * BETA1))
    torch.testing.assert_close(moments[1][2], torch.full((20,), 2.0 * BETA2))
    nothing = torch.zeros(3, 20)
    take(nothing, torch.zeros(3, 20), [torch.zeros(3, 20), torch.zeros(3, 20)], 1, 1.0, True)
    assert nothing.eq(0).all()
    assert float(gradient_square(nothing, nothing, True)) == 0.0


def test_denormal_moments_become_zero_in_cpp() -> None:
    """They would make a dead feature's arithmetic a hundred times slower, for good."""
    if "cpu" not in kernels.available():
        pytest.skip("no compiler here")
    found, zeros = torch.ones(2, 40), torch.zeros(2, 40)
    moments = [torch.full((2, 40), 1e-39), torch.full((2, 40), 1e-39)]
    with kernels.using("cpu"):
        take(found, zeros, moments, 1000, 1.0, False)
    assert all(moment.eq(0).all() for moment in moments)
    assert found.eq(1).all()
    assert torch.tensor(1e-39).mul(0.5) > 0  # and nobody else's arithmetic has changed


@pytest.mark.parametrize("shape", [(700, 97), (123_457,)])
def test_the_number_of_threads_changes_no_bit(backend: str, shape: tuple[int, ...]) -> None:
    unit = len(shape) == 2
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            parameter, gradient = draw(*shape, unit=unit).float(), draw(*shape, seed=1).float()
            moments = [torch.zeros_like(parameter) for _ in range(2)]
            square = gradient_square(parameter, gradient, unit)
            for step in (1, 2):
                take(parameter, gradient, moments, step, 0.7, unit)
            results.append((square, parameter, *moments))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_strided_tensors(backend: str) -> None:
    """A gradient, or even a parameter, that is not contiguous."""
    gradient = draw(12, 30, seed=1).float()
    plain, strided = draw(30, 12, unit=True).float(), torch.zeros(12, 30).T
    strided.copy_(plain)
    results = []
    for parameter, grad in (
        (plain, gradient.T.contiguous()),
        (plain.clone(), gradient.T),
        (strided, gradient.T),
    ):
        moments = [torch.zeros_like(parameter) for _ in range(2)]
        square = gradient_square(parameter, grad, True)
        take(parameter, grad, moments, 1, 1.0, True)
        results.append((square, parameter))
    for square, parameter in results[1:]:
        torch.testing.assert_close(square, results[0][0])
        torch.testing.assert_close(parameter, results[0][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("unit", [False, True])
def test_a_gradient_that_is_not_finite_shows(backend: str, value: float, unit: bool) -> None:
    gradient = draw(8, 50, seed=1).float()
    gradient[3, 49] = value
    assert not torch.isfinite(gradient_square(draw(8, 50, unit=True).float(), gradient, unit))
