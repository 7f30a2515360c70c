"""Rows less a vector before they are encoded: its gradient, by the short way and the long."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sae import kernels
from sae.kernels import autograd

Encode = Callable[[Tensor, Tensor, Tensor | None], Tensor]
ROW_PTR, INDEX = torch.tensor([0, 2, 2, 5, 6, 7, 7]), torch.tensor([1, 8, 0, 3, 5, 8, 2])
ENCODE: dict[str, Encode] = {
    "topk": lambda x, W, b: kernels.encode_topk(x, W, b, 3, signed=True)[1],
    "above": lambda x, W, b: kernels.encode_above(x, W, b, 0.5)[2],
    "top_of_batch": lambda x, W, b: kernels.encode_top_of_batch(x, W, b, 11)[2],
    "selected": lambda x, W, b: kernels.encode_selected(x, W, b, ROW_PTR, INDEX),
}


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [6, 4], shift, W [9, 4], b; y alone has no gradient."""
    generator = torch.Generator().manual_seed(0)
    y, shift, W, b = (
        torch.randn(*shape, generator=generator, dtype=dtype)
        for shape in ((6, 4), (4,), (9, 4), (9,))
    )
    return y, shift.requires_grad_(), W.requires_grad_(), b.requires_grad_()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", ENCODE)
def test_finite_differences(name: str, *, biased: bool) -> None:
    y, shift, W, b = problem()

    def encoded(shift: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return ENCODE[name](kernels.subtract_bias(y, shift), W, b if biased else None).square()

    assert torch.autograd.gradcheck(encoded, (shift, W, b))


@pytest.mark.parametrize("backend", sorted(kernels.BACKENDS))
@pytest.mark.parametrize("name", ENCODE)
def test_as_a_plain_difference(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAESCOPE_KERNELS", backend)
    y, *weights = problem(torch.float32)
    found = []
    for subtract in (kernels.subtract_bias, torch.sub):
        value = ENCODE[name](subtract(y, weights[0]), *weights[1:])
        found.append((value, *torch.autograd.grad(value.square().sum(), weights)))
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain)


def test_no_gradient_of_rows_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    y, shift, W, b = problem()

    def fail(*_: object) -> Tensor:
        raise AssertionError("a gradient of every row")

    value = ENCODE["topk"](kernels.subtract_bias(y, shift), W, b)
    monkeypatch.setattr(autograd, "_decode", fail)
    value.sum().backward()
    assert shift.grad is not None


def test_rows_with_a_gradient_and_masked_rows_go_the_long_way() -> None:
    y, shift, W, b = problem()
    visible = torch.tensor([True, False, True, True])

    def of(y: Tensor, shift: Tensor) -> Tensor:
        return ENCODE["topk"](kernels.subtract_bias(y, shift) * visible, W, b)

    assert torch.autograd.gradcheck(of, (y.clone().requires_grad_(), shift))
    assert torch.autograd.gradcheck(lambda shift: of(y, shift), (shift,))
    (d_shift,) = torch.autograd.grad(of(y, shift).sum(), shift)
    assert d_shift[1] == 0
    assert d_shift[0] != 0


def test_used_again_after_the_encoder() -> None:
    y, shift, W, b = problem()

    def twice(shift: Tensor) -> Tensor:
        x = kernels.subtract_bias(y, shift)
        encoded = ENCODE["topk"](x, W, b).sum() + ENCODE["selected"](x, W, None).sum()
        return encoded + x.square().sum()

    assert torch.autograd.gradcheck(twice, (shift,))
