"""Triton programs for the optimiser: `sae.kernels.adam` says what is computed.

A program has one row, or where rows do not matter a stretch of elements, and reads it once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae.kernels.triton_launch import blocks, launch, power_of_2

_STRETCH = 2048
"""elements a program has of a parameter whose rows do not matter"""


@triton.jit
def _load(param, grad, width, size, UNIT: tl.constexpr, WIDTH: tl.constexpr) -> Any:
    """This program's elements: where they are, which are inside, the parameter, the gradient."""
    column = tl.arange(0, WIDTH)
    where = tl.program_id(0).to(tl.int64) * width + column
    inside = (column < width) & (where < size)
    w = tl.load(param + where, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + where, mask=inside, other=0.0).to(tl.float32)
    if UNIT:  # only what is orthogonal to the row
        g -= tl.sum(g * w, 0) * w
    return where, inside, w, g


@triton.jit
def _square(param, grad, out, width, size, UNIT: tl.constexpr, WIDTH: tl.constexpr):
    _, _, _, g = _load(param, grad, width, size, UNIT, WIDTH)  # type: ignore[misc]
    tl.store(out + tl.program_id(0), tl.sum(g * g, 0))


@triton.jit
def _adam(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    width,
    size,
    keep1,
    new1,
    keep2,
    new2,
    eps,
    step_size,
    root_correction,
    scale,
    tiny,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    where, inside, w, g = _load(param, grad, width, size, UNIT, WIDTH)  # type: ignore[misc]
    g *= scale
    m = tl.load(exp_avg + where, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq + where, mask=inside, other=0.0).to(tl.float32)
    m = keep1 * m + new1 * g
    v = keep2 * v + new2 * g * g
    w -= step_size * tl.div_rn(m, tl.sqrt_rn(v) * root_correction + eps)
    if UNIT:
        w = tl.where(inside, w, 0.0)
        norm = tl.sqrt_rn(tl.sum(w * w, 0))
        w = tl.div_rn(w, tl.where(norm > tiny, norm, 1.0))
    tl.store(param + where, w, mask=inside)
    tl.store(exp_avg + where, m, mask=inside)
    tl.store(exp_avg_sq + where, v, mask=inside)


def gradient_square(param: Tensor, grad: Tensor, unit_rows: bool) -> Tensor:
    """Squared norm of a gradient, float64 []; with unit_rows of its part orthogonal to the rows."""
    programs, shape = _shape(param, unit_rows)
    squares = torch.empty(programs, dtype=torch.float32, device=param.device)
    given = (param.contiguous(), grad.contiguous(), squares)
    launch(_square, (programs,), param, *given, **shape)
    return squares.sum(dtype=torch.float64)


def adam_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    unit_rows: bool,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    step_size: float,
    root_correction: float,
    scale: float,
) -> None:
    """One step of Adam in place on contiguous tensors.

    With unit_rows the gradient is projected first, and the rows are put to norm 1 afterwards.
    """
    programs, shape = _shape(param, unit_rows)
    launch(
        _adam,
        (programs,),
        param,
        param,
        grad.contiguous(),
        exp_avg,
        exp_avg_sq,
        keep1=beta1,
        new1=1 - beta1,
        keep2=beta2,
        new2=1 - beta2,
        eps=eps,
        step_size=step_size,
        root_correction=root_correction,
        scale=scale,
        tiny=torch.finfo(param.dtype).tiny,
        **shape,
    )


def _shape(param: Tensor, unit_rows: bool) -> tuple[int, dict[str, int | bool]]:
    """Number of programs, and what each of them takes."""
    width = param.shape[-1] if unit_rows else _STRETCH
    lanes = max(16, power_of_2(width))
    return blocks(param.numel(), width), {
        "width": width,
        "size": param.numel(),
        "UNIT": unit_rows,
        "WIDTH": lanes,
        "num_warps": min(max(1, lanes // 256), 32 if lanes > 8192 else 16),
    }
