"""Gradients of the sparse operations, once for every backend.

Each backward pass touches only the entries there are. Codes that are not sparse (penalised
architectures, early in training) are multiplied as dense matrices instead.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sae.kernels import fixed_order_sums
from sae.kernels.backend import Backend
from sae.kernels.torch_backend import row_of_entry

Selection = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]
"""(x, W, b) to (row_ptr, index, value): which pre-activations are kept"""


class SubtractBias(Function):
    """y [batch, d] minus a vector [d]. `Encode` recognises it, and skips the gradient of its rows.

    The gradient of b_dec, say, is a sum over rows of what went back through the encoder; which is
    W_enc times a sum over rows, one vector for all of them.
    """

    shift: Tensor

    @staticmethod
    def forward(ctx: Any, y: Tensor, shift: Tensor) -> Tensor:
        ctx.shift = shift
        return y - shift

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        d_shift = -gradients[0].sum(0) if ctx.needs_input_grad[1] else None
        return gradients[0], d_shift

    @staticmethod
    def shift_of(x: Tensor) -> Tensor | None:
        """The vector, if x is rows without a gradient minus a vector with one; else None."""
        node: Any = x.grad_fn
        if not isinstance(node, SubtractBias._backward_cls):
            return None
        return node.shift if node.needs_input_grad == (False, True) else None


class Encode(Function):
    """Pre-activations of the entries that `select` keeps, rectified if asked.

    shift [d_in]: what was subtracted from x, if of the two it alone is to have a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        shift: Tensor | None,
        select: Selection,
        rectify: bool,
        backend: Backend,
    ) -> tuple[Tensor, Tensor, Tensor]:
        row_ptr, index, value = select(x, W, b)
        if rectify:
            value = value.relu()
        ctx.mark_non_differentiable(row_ptr, index)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, W, row_ptr, index, value if rectify else None)
        ctx.backend = backend
        return row_ptr, index, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if gradients[2] is None:
            return (None,) * 7
        x, W, row_ptr, index, value = ctx.saved_tensors
        d_pre = gradients[2].contiguous()
        if value is not None:  # an entry that was kept but cut to 0 must not move its feature
            d_pre = torch.where(value > 0, d_pre, 0.0)
        of_x, of_W, of_b, of_shift, *_ = ctx.needs_input_grad
        d_x = d_W = d_b = d_shift = None
        if of_x:
            d_x = _decode(ctx.backend, row_ptr, index, d_pre, W)
        if of_W:
            d_W = _weight_gradient(ctx.backend, row_ptr, index, d_pre, x, len(W))
        if of_b or of_shift:
            sums = ctx.backend.feature_sums(index, d_pre, len(W))
            d_b = sums if of_b else None
            d_shift = -fixed_order_sums.product(sums.to(W.dtype)[None], W)[0] if of_shift else None
        return d_x, d_W, d_b, d_shift, None, None, None


class Decode(Function):
    """A weighted sum of decoder rows."""

    @staticmethod
    def forward(
        ctx: Any, row_ptr: Tensor, index: Tensor, value: Tensor, W: Tensor, backend: Backend
    ) -> Tensor:
        ctx.save_for_backward(row_ptr, index, value, W)
        ctx.backend = backend
        return _decode(backend, row_ptr, index, value, W)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        row_ptr, index, value, W = ctx.saved_tensors
        d_x_hat = gradients[0].contiguous()
        d_value = d_W = None
        if ctx.needs_input_grad[2]:
            d_value = entry_dots(ctx.backend, row_ptr, index, d_x_hat, W)
        if ctx.needs_input_grad[3]:
            d_W = _weight_gradient(ctx.backend, row_ptr, index, value, d_x_hat, len(W))
        return None, None, d_value, d_W, None


class DecodeError(Function):
    """Squared error of each row's reconstruction, and the error itself (without gradient).

    With e = f W + b - t and l = ||e||^2 per row: dl/df = 2 <e, W>, dl/dW = 2 f e, dl/db = 2 e. The
    dots are taken in the forward pass, while a row's features are in the cache.
    """

    @staticmethod
    def forward(
        ctx: Any,
        row_ptr: Tensor,
        index: Tensor,
        value: Tensor,
        W: Tensor,
        b: Tensor,
        target: Tensor,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        if _dense(backend, index, row_ptr, len(W)):
            error = fixed_order_sums.product(_scatter(row_ptr, index, value, len(W)), W)
            error = error.to(value.dtype) + b - target
            squared, dots = error.square().sum(1), entry_dots(backend, row_ptr, index, error, W)
        else:
            error, squared, dots = backend.decode_error(row_ptr, index, value, W, b, target)
        ctx.mark_non_differentiable(error)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(row_ptr, index, value, W, error, dots)
        ctx.backend = backend
        return squared, error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if gradients[0] is None:
            return (None,) * 7
        row_ptr, index, value, W, error, dots = ctx.saved_tensors
        weight = 2 * gradients[0]
        of_entry = weight[row_of_entry(row_ptr, len(index))]
        d_value = d_W = d_b = d_target = None
        if ctx.needs_input_grad[2]:
            d_value = of_entry * dots
        if ctx.needs_input_grad[3]:
            d_W = _weight_gradient(ctx.backend, row_ptr, index, of_entry * value, error, len(W))
        if ctx.needs_input_grad[4]:
            d_b = fixed_order_sums.of_rows(weight, error)
        if ctx.needs_input_grad[5]:
            d_target = -weight[:, None] * error
        return None, None, d_value, d_W, d_b, d_target, None


def _dense(backend: Backend, index: Tensor, row_ptr: Tensor, d_sae: int) -> bool:
    return len(index) > backend.DENSE * (len(row_ptr) - 1) * d_sae


def _scatter(row_ptr: Tensor, index: Tensor, value: Tensor, d_sae: int) -> Tensor:
    batch = len(row_ptr) - 1
    dense = value.new_zeros(batch * d_sae)
    dense[row_of_entry(row_ptr, len(index)) * d_sae + index] = value
    return dense.view(batch, d_sae)


def _decode(backend: Backend, row_ptr: Tensor, index: Tensor, value: Tensor, W: Tensor) -> Tensor:
    if _dense(backend, index, row_ptr, len(W)):
        # autocast would return bfloat16 here, and nowhere else
        return fixed_order_sums.product(_scatter(row_ptr, index, value, len(W)), W).to(value.dtype)
    return backend.decode(row_ptr, index, value, W)


def entry_dots(backend: Backend, row_ptr: Tensor, index: Tensor, rows: Tensor, W: Tensor) -> Tensor:
    """The dot product of an entry's row and its feature's row of W, [entries]."""
    if _dense(backend, index, row_ptr, len(W)):
        at = row_of_entry(row_ptr, len(index)) * len(W) + index
        return (rows @ W.T).view(-1)[at].to(rows.dtype)
    return backend.entry_dots(row_ptr, index, rows, W)


def _weight_gradient(
    backend: Backend, row_ptr: Tensor, index: Tensor, value: Tensor, rows: Tensor, d_sae: int
) -> Tensor:
    if _dense(backend, index, row_ptr, d_sae):
        return (_scatter(row_ptr, index, value, d_sae).T @ rows).to(rows.dtype)
    return backend.weight_gradient(row_ptr, index, value, rows, d_sae)
