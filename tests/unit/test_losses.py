"""Shared loss terms: the fused reconstruction and the cheap gradients against plain formulae."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sae import kernels
from sae.architectures._nested import nested
from sae.core import losses
from sae.core.batch import TrainingBatch
from sae.kernels.codes import SparseCodes

BATCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tilted": {"tilt": 2.0},
    "grouped": {
        "group": torch.arange(15) % 2, "group_variance": torch.tensor([1.0, 7.0]).double(),
    },
    "hidden": {"visible": torch.tensor([True, False, True, True])},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OtherLoss(TrainingBatch):
    """A batch whose loss is no function of squared errors."""

    def reconstruction(self, y_hat: Tensor) -> Tensor:
        return y_hat.sin().sum()


def batch_of(kind: str) -> TrainingBatch:
    """A batch of 15 targets, whose loss is of one of BATCHES, or another one's."""
    target = torch.randn(15, 4, dtype=torch.float64)
    make = OtherLoss if kind == "other" else TrainingBatch
    return make(y=target, target=target, variance=3.0, **BATCHES.get(kind, {}))


def problem(seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Dense codes [15, 20], a fifth of them not 0; W_dec and b_dec; the codes' values."""
    torch.manual_seed(seed)
    dense = torch.randn(15, 20, dtype=torch.float64) * (torch.rand(15, 20) < 0.2)
    W_dec, b_dec = torch.randn(20, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    value = SparseCodes.from_dense(dense).value
    return dense, [each.requires_grad_() for each in (W_dec, b_dec, value)]


@pytest.mark.parametrize("kind", [*BATCHES, "other"])
def test_reconstruct_is_decoding_and_the_batchs_loss(kind: str) -> None:
    dense, inputs = problem()
    W_dec, b_dec, value = inputs
    batch = batch_of(kind)
    assert batch.by_squares == (kind in ("plain", "tilted", "grouped"))
    codes = replace(SparseCodes.from_dense(dense), value=value)
    found = losses.reconstruct(codes, batch, W_dec, b_dec)
    y_hat = codes.dense() @ W_dec + b_dec
    expected = batch.reconstruction(y_hat)
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.y_hat, y_hat)
    left = batch.target - y_hat.detach()
    if batch.visible is not None:
        left = left * ~batch.visible
    torch.testing.assert_close(found.left_over(), left)
    assert not found.left_over().requires_grad
    for one, other in zip(
        torch.autograd.grad(found.loss, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", [*BATCHES, "other"])
def test_silent_entries_have_their_gradient_and_nothing_else(kind: str) -> None:
    dense, inputs = problem()
    W_dec, b_dec, value = inputs
    batch = batch_of(kind)
    codes = replace(SparseCodes.from_dense(dense), value=value)
    silent = SparseCodes.from_dense((dense == 0).double())
    nothing = torch.zeros(len(silent.value), dtype=torch.float64, requires_grad=True)
    silent = replace(silent, value=nothing)
    found = losses.reconstruct(codes, batch, W_dec, b_dec, silent)
    full = codes.dense() + silent.dense()
    expected = batch.reconstruction(full @ W_dec + b_dec)
    torch.testing.assert_close(found.loss, expected)
    for one, other in zip(
        torch.autograd.grad(found.loss, [*inputs, nothing]),
        torch.autograd.grad(expected, [*inputs, nothing]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", [*BATCHES, "other"])
def test_nested_reconstructions_are_those_of_sums_of_codes(kind: str) -> None:
    dense, inputs = problem()
    W_dec, b_dec, value = inputs
    batch = batch_of(kind)
    codes = replace(SparseCodes.from_dense(dense), value=value)
    edges = [(0, 5), (5, 5), (5, 20)]  # the middle one adds nothing
    parts = [codes.select((codes.index >= low) & (codes.index < high)) for low, high in edges]
    found = nested(parts, batch, W_dec, b_dec)
    assert len(found) == 4
    weights = [0.5, 1.0, 0.25, 2.0]
    y_hats = [codes.dense()[:, :width] @ W_dec[:width] + b_dec for width in (0, 5, 5, 20)]
    for one, y_hat in zip(found, y_hats, strict=True):
        torch.testing.assert_close(one.y_hat, y_hat)
        torch.testing.assert_close(one.loss, batch.reconstruction(y_hat))
    zero = torch.zeros(())
    total = sum((w * one.loss for w, one in zip(weights, found, strict=True)), zero)
    whole = [batch.reconstruction(y) for y in y_hats]
    expected = sum((w * each for w, each in zip(weights, whole, strict=True)), zero)
    for one, other in zip(
        torch.autograd.grad(total, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_rows_of_a_matrix_add_their_gradient_to_the_others() -> None:
    torch.manual_seed(0)
    W, rows = torch.randn(9, 3, requires_grad=True), torch.tensor([1, 4, 8])
    weight = torch.randn(3, 3)
    expected = 2 * W.detach()
    expected[rows] += weight
    for terms in (1, 2):  # twice, in either order
        loss = W.square().sum()
        for _ in range(terms):
            loss = (losses.rows_of(W, rows) * weight).sum() / terms + loss
        (gradient,) = torch.autograd.grad(loss, W)
        assert gradient.layout == torch.strided
        torch.testing.assert_close(gradient, expected)


def test_row_norms() -> None:
    torch.manual_seed(0)
    W = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(losses.row_norms, W)
    zero = torch.zeros(2, 3, requires_grad=True)
    norm = losses.row_norms(zero)
    norm.sum().backward()
    assert norm.tolist() == [0, 0]
    assert zero.grad is not None
    assert not zero.grad.any()


@pytest.mark.parametrize("k_aux", [3, 40])
@pytest.mark.parametrize("signed", [False, True])
def test_auxk_is_the_dense_formula(k_aux: int, signed: bool) -> None:
    """With more dead features than are taken, and with fewer."""
    torch.manual_seed(0)
    shapes = [(30, 6), (25, 6), (25,), (25, 6)]
    inputs = [torch.randn(*each, dtype=torch.float64, requires_grad=True) for each in shapes]
    centred, W_enc_T, b_enc, W_dec = inputs
    residual, dead = torch.randn(30, 6, dtype=torch.float64), torch.arange(25) % 3 > 0
    found = losses.auxk(residual, centred, W_enc_T, b_enc, W_dec, dead, k_aux, signed=signed)
    pre = centred @ W_enc_T[dead].T + b_enc[dead]
    size = pre.abs() if signed else pre
    taken = torch.zeros_like(pre).scatter(1, size.topk(min(k_aux, int(dead.sum()))).indices, 1.0)
    e_hat = (pre if signed else pre.relu()) * taken @ W_dec[dead]
    expected = (residual - e_hat).square().sum() / (residual - residual.mean(0)).square().sum()
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(one.to_dense(), other)


def test_the_error_comes_with_the_loss() -> None:
    """One kernel call gives the loss, its gradient's dots and what AuxK starts from."""
    dense, (W_dec, b_dec, value) = problem()
    codes = replace(SparseCodes.from_dense(dense), value=value)
    batch = TrainingBatch.of(torch.randn(15, 4, dtype=torch.float64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "decode", None)
        found = losses.reconstruct(codes, batch, W_dec, b_dec)
    assert found.error is not None
    torch.testing.assert_close(found.left_over(), -found.error)


@pytest.mark.parametrize(
    ("points", "median"),
    [
        # the mean is a point of the data, at which Weiszfeld's iteration stops
        ([[0.0], [0.0], [0.0], [3.0], [12.0]], [0.0]),
        ([[0.0], [0.0], [0.0], [3.0], [12.0 + 1e-6]], [0.0]),
        # a corner of more than 120 degrees is the median; the mean (2, 0.5) is not
        ([[0.0, 0.0], [2.0, 1.0], [4.0, 0.5]], [2.0, 1.0]),
        # Fermat's point of an equilateral triangle
        ([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]], [0.0, 0.0]),
        ([[5.0, 7.0]], [5.0, 7.0]),
        ([[5.0, 7.0]] * 3, [5.0, 7.0]),
    ],
)
def test_geometric_median_by_hand(points: list[list[float]], median: list[float]) -> None:
    for dtype in (torch.float32, torch.float64):
        found = losses.geometric_median(torch.tensor(points, dtype=dtype))
        torch.testing.assert_close(found, torch.tensor(median, dtype=dtype), rtol=1e-5, atol=1e-5)


def test_no_point_near_the_geometric_median_is_better() -> None:
    torch.manual_seed(0)
    for number in range(20):
        points = torch.randn(9, 3, dtype=torch.float64).round(decimals=number % 2)  # ties, too
        points[:4] = points[0]
        found = losses.geometric_median(points, iterations=2000, tolerance=1e-12)
        least = (points - found).norm(dim=1).sum()
        for other in (*points, *(found + 1e-3 * torch.randn(200, 3, dtype=torch.float64))):
            assert (points - other).norm(dim=1).sum() >= least - 1e-9


@pytest.mark.parametrize("size", [None, 1000.0])
def test_what_rounding_makes_of_equal_rows_is_nothing_to_predict(size: float | None) -> None:
    torch.manual_seed(0)
    e = torch.randn(6).expand(50, 6) + 1e-7 * torch.randn(50, 6)
    if size is not None:  # rounding of the targets, not of what is left of them
        e = 3e-5 * torch.randn(50, 6)
    targets = None if size is None else torch.full((50, 6), size)
    assert float(losses.unpredicted(e, torch.tensor(5.0), targets)) == 0
    assert float(losses.unpredicted(e + torch.randn(50, 1), torch.tensor(5.0), targets)) > 0
