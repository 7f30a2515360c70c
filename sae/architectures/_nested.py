"""Reconstructions that each go on from the one before: prefixes of a dictionary, rising k.

    y_hat_0 = b_dec,   y_hat_l = y_hat_(l-1) + f_l W_dec
Every entry is decoded once. The error e_l = y_hat_l - t of each level and its squares are made in
one pass; with L = sum_l c_l ||e_l||^2, row by row, dL/d(f_l W_dec) = 2 sum_(i >= l) c_i e_i.

Detached, a level's error is the last ones' only to look at: it teaches what that level adds, and no
level before it, but for the last level, which teaches all. dL/d(f_l W_dec) = 2 (c_l e_l + c_n e_n).
"""

from itertools import accumulate
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sae import kernels
from sae.core.batch import TrainingBatch
from sae.core.losses import Reconstruction
from sae.kernels.codes import SparseCodes
from sae.kernels.fixed_order_sums import of_rows


def nested(
    added: list[SparseCodes],
    batch: TrainingBatch,
    W_dec: Tensor,
    b_dec: Tensor,
    *,
    detached: bool = False,
) -> list[Reconstruction]:
    """Reconstructions of a batch by no code, by added[0], by added[0] and added[1], and so on.

    Args: detached: no level but the last has a gradient in levels before it; the first has one in
    b_dec.
    """
    joined = SparseCodes.concatenate(added)  # a level's rows below another's
    decoded = kernels.decode(joined.row_ptr, joined.index, joined.value, W_dec)
    steps = rearrange(decoded, "(level row) d_out -> level row d_out", level=len(added))
    if not batch.by_squares:
        y_hats = list(accumulate(steps, initial=b_dec.expand(len(batch), -1)))
        if detached:
            for level in range(2, len(steps)):
                y_hats[level] = y_hats[level - 1].detach() + steps[level - 1]
        return [Reconstruction.of(y_hat, batch) for y_hat in y_hats]
    squared, errors = _Squares.apply(steps, b_dec, batch.target, detached)  # type: ignore[misc]
    return [
        Reconstruction(loss=batch.of_squares(level), batch=batch, error=error)
        for level, error in zip(squared, errors, strict=True)
    ]


class _Squares(Function):
    """||e_l||^2 [levels + 1, batch] and e_l [levels + 1, batch, d_out], the latter for good."""

    @staticmethod
    def forward(
        ctx: Any, steps: Tensor, b_dec: Tensor, target: Tensor, detached: bool
    ) -> tuple[Tensor, Tensor]:
        errors = steps.new_empty(len(steps) + 1, *target.shape)
        torch.sub(b_dec, target, out=errors[0])
        for level, step in enumerate(steps):
            torch.add(errors[level], step, out=errors[level + 1])
        ctx.mark_non_differentiable(errors)
        ctx.set_materialize_grads(False)
        ctx.detached = detached
        ctx.save_for_backward(errors)
        return torch.linalg.vector_norm(errors, dim=-1).square(), errors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if gradients[0] is None:
            return None, None, None, None
        (errors,) = ctx.saved_tensors
        weight = 2 * gradients[0]
        d_steps = torch.empty_like(errors[1:])
        torch.mul(errors[-1], weight[-1, :, None], out=d_steps[-1])
        for level in range(len(errors) - 2, 0, -1):
            later = d_steps[-1] if ctx.detached else d_steps[level]
            torch.addcmul(later, errors[level], weight[level, :, None], out=d_steps[level - 1])
        if ctx.detached:  # levels that b_dec hears nothing of
            weight[2:-1] = 0
        d_b_dec = of_rows(
            rearrange(weight, "level row -> (level row)"),
            rearrange(errors, "level row d_out -> (level row) d_out"),
        )
        return d_steps, d_b_dec, None, None
