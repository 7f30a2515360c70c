"""Loss terms and fits that several architectures are composed of."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sae import kernels
from sae.core.batch import TrainingBatch
from sae.distributed import FEATURES, ROWS
from sae.kernels import global_topk
from sae.kernels.codes import SparseCodes

_ROUNDING = 16
"""differences below this many rounding errors of what is subtracted count as 0"""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How well codes reconstruct a batch."""

    loss: Tensor
    """scalar, what the batch makes of the error"""
    batch: TrainingBatch
    """what is reconstructed"""
    decoded: Tensor | None = None
    """y_hat [batch, d_out] at the normaliser's scale, or"""
    error: Tensor | None = None
    """[batch, d_out], y_hat less the target, where it came with the loss; no gradient"""

    @classmethod
    def of(cls, y_hat: Tensor, batch: TrainingBatch) -> Self:
        """From y_hat [batch, d_out], whatever the batch's loss is."""
        return cls(loss=batch.reconstruction(y_hat), batch=batch, decoded=y_hat)

    @property
    def y_hat(self) -> Tensor:
        """The reconstruction [batch, d_out]; without gradient if the loss is of squared errors."""
        if self.error is not None:
            return self.batch.target + self.error
        assert self.decoded is not None
        return self.decoded

    def left_over(self) -> Tensor:
        """The residual, target - y_hat [batch, d_out], without gradient.

        Of a batch with hidden coordinates, of those alone.
        """
        if self.error is not None:
            return -self.error
        residual = (self.batch.target - self.y_hat).detach()
        return residual if self.batch.visible is None else residual * ~self.batch.visible


def reconstruct(
    codes: SparseCodes,
    batch: TrainingBatch,
    W_dec: Tensor,
    b_dec: Tensor,
    silent: SparseCodes | None = None,
) -> Reconstruction:
    """A batch by codes W_dec + b_dec, and in the same pass, if possible, its gradient's dots.

    silent: further entries, whose values are 0 but have a gradient (JumpReLU, near thresholds).
    """
    row_ptr, index, value = codes.row_ptr, codes.index, codes.value
    if not batch.by_squares:
        own = kernels.decode(row_ptr, index, value, W_dec)
        if silent is not None:
            own = own + kernels.decode(silent.row_ptr, silent.index, silent.value, W_dec)
        return Reconstruction.of(FEATURES.sum(own) + b_dec, batch)
    squared, error = kernels.decode_error(row_ptr, index, value, W_dec, b_dec, batch.target)
    if silent is not None:  # what no decoder row has a gradient of, and no reconstruction feels
        slope = 2 * kernels.encode_selected(
            error, W_dec.detach(), None, silent.row_ptr, silent.index
        )
        squared = squared.index_add(0, silent.rows(), slope * silent.value)
    return Reconstruction(loss=batch.of_squares(squared), batch=batch, error=error)


def auxk(
    residual: Tensor,
    centred: Tensor,
    W_enc_T: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    dead: Tensor,
    k_aux: int,
    *,
    signed: bool = False,
    visible: Tensor | None = None,
    refit: bool = False,
    size: Tensor | None = None,
) -> Tensor:
    """AuxK: the k_aux strongest dead features of each row reconstruct the residual.

    ||e - e_hat||^2 / ||e - mean e||^2 over the batch, with e = y - y_hat detached and e_hat
    without bias (Gao et al. 2024, appendix A.2); 0 where there is no dead feature or nothing left.

    Args: residual, centred (y - b_dec) [batch, d_in]; dead bool [d_sae]; signed: strongest in
    magnitude, not rectified; visible bool [d_in]: coordinates that are no part of e, 0 in
    `residual`; refit: encoder rows are counted at unit length over the visible ones, and codes
    divided by what length they have there (a tied dictionary that has to do with those alone);
    size [batch, d_in]: numbers whose rounding e cannot be less than (see `unpredicted`).
    """
    rows = dead.nonzero()[:, 0]
    number = FEATURES.total(len(rows))
    if number == 0 or k_aux == 0:
        return residual.new_zeros(())
    residual = residual.detach()
    encoder, decoder = rows_of(W_enc_T, rows), rows_of(W_dec, rows)
    bias = b_enc.index_select(0, rows)
    if visible is not None:
        if refit:
            seen = encoder * visible
            length = row_norms(seen).clamp_min(torch.finfo(seen.dtype).tiny)[:, None]
            encoder, decoder = seen / length, decoder / length
        decoder = decoder * ~visible
    if number <= k_aux:  # all of them are taken, and dense products on so few rows are cheap
        pre = functional.linear(centred, encoder, bias)
        e_hat = FEATURES.sum((pre if signed else pre.relu()) @ decoder)
        left = kernels.total((residual - e_hat).square())
    else:
        own = min(k_aux, len(rows))
        if own:
            index, value = kernels.encode_topk(centred, encoder, bias, own, signed=signed)
        else:  # the dead features are all on other ranks
            index, value = rows.new_zeros(len(centred), 0), residual.new_zeros(len(centred), 0)
        codes = global_topk.strongest(index, value, k_aux, len(rows))
        left = left_by(codes, residual, decoder)
    return unpredicted(residual, left, size)


def left_by(codes: SparseCodes, residual: Tensor, W_dec: Tensor) -> Tensor:
    """||e - codes W_dec||^2 over a batch e [batch, d_out]."""
    if FEATURES.size > 1:
        e_hat = FEATURES.sum(kernels.decode(codes.row_ptr, codes.index, codes.value, W_dec))
        return kernels.total((residual - e_hat).square())
    none = torch.zeros_like(residual[0])
    squared, _ = kernels.decode_error(
        codes.row_ptr, codes.index, codes.value, W_dec, none, residual
    )
    return kernels.total(squared)


def unpredicted(residual: Tensor, left: Tensor, size: Tensor | None = None) -> Tensor:
    """left / ||e - mean e||^2 over a batch e [batch, d_out]; 0 where e does not vary.

    Sums are over the rows of all ranks. Variation below the rounding error of e, or of numbers as
    large as `size` [batch, d_out] (the targets), counts as none.
    """
    total = kernels.total((residual - ROWS.mean(residual)).square())
    largest = residual.square() if size is None else residual.square() + size.square()
    least = (_ROUNDING * torch.finfo(residual.dtype).eps) ** 2 * kernels.total(largest.detach())
    left, total, least = ROWS.sum(torch.stack([left, total, least]))
    return left / torch.where(total > least, total, torch.inf)  # gradients are 0 there too


def rows_of(W: Tensor, rows: Tensor) -> Tensor:
    """W[rows], rows int64 [n] rising, none twice; its gradient touches no other row.

    Something else has to give W a dense gradient: this one alone would be a sparse tensor.
    """
    return _Rows.apply(W, rows)  # type: ignore[return-value]


class _Rows(Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = W.shape
        return W.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (rows,) = ctx.saved_tensors
        # index_select's own would fill and add a whole [d_sae, d_in] for a few rows
        sparse = torch.sparse_coo_tensor(
            rows[None], gradients[0], ctx.shape, is_coalesced=True, check_invariants=False
        )
        return sparse, None


def row_norms(W: Tensor) -> Tensor:
    """||W_i|| [d_sae] of rows [d_sae, d]; of a row of zeros the gradient is 0."""
    return _RowNorms.apply(W)  # type: ignore[return-value]


class _RowNorms(Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(W, dim=1)
        ctx.save_for_backward(W, norm)
        return norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # type: ignore[override]
        W, norm = ctx.saved_tensors
        # one pass over the matrix, where torch's own takes three
        return W * torch.where(norm > 0, gradients[0] / norm, 0.0)[:, None]


@torch.no_grad()
def geometric_median(points: Tensor, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point [d_in] of least summed distance to points [rows, d_in].

    Weiszfeld's iteration, which stops at a point of the data whether it is the median or not, with
    Vardi and Zhang's step (2000, "The multivariate L1-median", eq. 2.6) away from such a point. It
    comes near a median that is a point of the data only slowly, so the nearest one is tried last.
    """
    guess = points.mean(0)
    for _ in range(iterations):
        distance = (points - guess).norm(dim=1, keepdim=True)
        here = distance[:, 0] <= tolerance * distance.mean()
        if here.any() and not here.all():
            moved = _away_from(points, guess, here)
        else:
            weight = 1 / distance.clamp_min(1e-12)
            moved = (points * weight).sum(0) / weight.sum()
        step, guess = (moved - guess).norm(), moved
        if step <= tolerance * guess.norm():
            break
    distance = (points - guess).norm(dim=1)
    nearest, total = points[distance.argmin()], distance.sum()
    better = (points - nearest).norm(dim=1).sum() < total and bool(total.isfinite())
    return nearest if better else guess


def _away_from(points: Tensor, guess: Tensor, here: Tensor) -> Tensor:
    """Vardi and Zhang's step from a guess at which the points of a mask [rows] are, not all."""
    others = points[~here]
    offset = others - guess
    weight = 1 / offset.norm(dim=1, keepdim=True)
    pull = (offset * weight).sum(0).norm()  # of the others, against 1 of each point here
    fraction = (1 - here.sum() / pull).clamp_min(0) if pull > 0 else 0.0
    return guess + fraction * ((others * weight).sum(0) / weight.sum() - guess)
