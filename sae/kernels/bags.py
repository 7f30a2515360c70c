"""Sparse kernels from torch's embedding-bag operators: no compiler, any device.

A code is a bag of decoder rows with weights. Each backward pass touches only the entries that
fired: the cost is batch * k * d_in, where a dense one pays batch * d_sae * d_in. Codes that are not
sparse (penalised architectures, early in training) are multiplied as dense matrices. An entry
(row, feature) occurs once in a code.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

_SUM = 0
"""the operators' number for mode="sum\""""
_GROUP = 16
"""entries a group in `topk_by_groups`"""
_DENSE = 1 / 32
"""codes fuller than this are multiplied as dense matrices: a bag's entry costs about as much as 32
elements of a matrix product"""
_CHUNK_ELEMENTS = 2**22
"""Pre-activations held at a time: [rows, d_sae] never exists for a whole batch."""


def _topk_by_chunks(x: Tensor, W_enc_T: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    index = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    value = torch.empty(len(x), k, dtype=x.dtype, device=x.device)
    rows = max(1, _CHUNK_ELEMENTS // W_enc_T.shape[0])
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        pre = functional.linear(x[part], W_enc_T, b_enc)
        value[part], index[part] = topk_by_groups(pre, k)
    return index, value


def topk_by_groups(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row (value, index), unsorted; exact, and faster than `topk` alone.

    Deal a row into groups. An entry among the k largest is in one of the k groups with the largest
    maxima: otherwise k other groups would each hold a larger one. So only those are searched.
    """
    rows, width = pre.shape
    groups = width // _GROUP
    if width % _GROUP or groups < 4 * k:
        return pre.topk(k, dim=-1, sorted=False)
    dealt = pre.view(rows, _GROUP, groups)
    chosen = dealt.amax(1).topk(k, dim=-1, sorted=False).indices
    candidates = dealt.gather(2, chosen[:, None].expand(rows, _GROUP, k)).view(rows, -1)
    value, at = candidates.topk(k, dim=-1, sorted=False)
    return value, at // k * groups + chosen.gather(1, at % k)


class _EncodeTopK(Function):
    """Dense forward by chunks, sparse backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc_T: Tensor, b_enc: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        index, value = _topk_by_chunks(x, W_enc_T, b_enc, k)
        value.relu_()
        ctx.mark_non_differentiable(index)
        ctx.save_for_backward(x, W_enc_T, index, value)
        return index, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, W_enc_T, index, value = ctx.saved_tensors
        d_pre = torch.where(value > 0, gradients[1], 0.0)
        flat = index.reshape(-1)
        batch, k = index.shape
        row_ptr = torch.arange(0, batch * k + 1, k, device=x.device)
        d_x = d_W = d_b = None
        if ctx.needs_input_grad[0]:
            d_x = _bag_sum(row_ptr, flat, d_pre.reshape(-1), W_enc_T)
        if ctx.needs_input_grad[1]:
            d_W = weight_gradient(row_ptr, flat, d_pre.reshape(-1), x, W_enc_T.shape[0])
        if ctx.needs_input_grad[2]:
            d_b = torch.zeros(W_enc_T.shape[0], dtype=x.dtype, device=x.device)
            d_b.index_add_(0, flat, d_pre.reshape(-1))
        return d_x, d_W, d_b, None


def encode_topk(x: Tensor, W_enc_T: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each row, rectified: (index, value), both [batch, k]."""
    index, value = _EncodeTopK.apply(x, W_enc_T, b_enc, k)  # type: ignore[misc]
    return index, value


class _EncodeSelected(Function):
    """Pre-activations at chosen entries; the backward pass touches those alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc_T: Tensor,
        b_enc: Tensor | None,
        row_ptr: Tensor,
        index: Tensor,
        pre: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc_T, row_ptr, index)
        return pre.reshape(-1)[_bag_of_entry(row_ptr) * pre.shape[1] + index].to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, W_enc_T, row_ptr, index = ctx.saved_tensors
        d_value = gradients[0].contiguous()
        d_sae = W_enc_T.shape[0]
        d_x = d_W = d_b = None
        if ctx.needs_input_grad[2]:
            d_b = torch.zeros(d_sae, dtype=x.dtype, device=x.device).index_add_(0, index, d_value)
        if _dense(len(index), len(x), d_sae):
            d_pre = _scatter(row_ptr, index, d_value, d_sae)
            d_x = d_pre @ W_enc_T if ctx.needs_input_grad[0] else None
            d_W = d_pre.T @ x if ctx.needs_input_grad[1] else None
        else:
            if ctx.needs_input_grad[0]:
                d_x = _bag_sum(row_ptr, index, d_value, W_enc_T)
            if ctx.needs_input_grad[1]:
                d_W = weight_gradient(row_ptr, index, d_value, x, d_sae)
        return d_x, d_W, d_b, None, None, None


def encode_selected(
    x: Tensor, W_enc_T: Tensor, b_enc: Tensor | None, row_ptr: Tensor, index: Tensor, pre: Tensor
) -> Tensor:
    """Pre-activations of the given entries, [entries]; pre [batch, d_sae] holds them already."""
    return _EncodeSelected.apply(x, W_enc_T, b_enc, row_ptr, index, pre)  # type: ignore[return-value]


class _Decode(Function):
    """A weighted sum of rows; each gradient touches only the entries there are."""

    @staticmethod
    def forward(ctx: Any, row_ptr: Tensor, index: Tensor, value: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(row_ptr, index, value, W_dec)
        if _dense(len(index), len(row_ptr) - 1, len(W_dec)):
            # autocast would return bfloat16 here, and nowhere else
            return (_scatter(row_ptr, index, value, len(W_dec)) @ W_dec).to(value.dtype)
        return _bag_sum(row_ptr, index, value, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        row_ptr, index, value, W_dec = ctx.saved_tensors
        d_x_hat = gradients[0].contiguous()
        d_value = d_W = None
        d_sae = len(W_dec)
        if _dense(len(index), len(row_ptr) - 1, d_sae):
            if ctx.needs_input_grad[2]:
                d_codes = d_x_hat @ W_dec.T
                d_value = d_codes.view(-1)[_bag_of_entry(row_ptr) * d_sae + index]
            if ctx.needs_input_grad[3]:
                d_W = _scatter(row_ptr, index, value, d_sae).T @ d_x_hat
            return None, None, d_value, d_W
        if ctx.needs_input_grad[2]:
            bag = _bag_of_entry(row_ptr)
            d_value = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                d_x_hat, W_dec, index, row_ptr[:-1].contiguous(), bag, _SUM, -1
            )
        if ctx.needs_input_grad[3]:
            d_W = weight_gradient(row_ptr, index, value, d_x_hat, W_dec.shape[0])
        return None, None, d_value, d_W


def decode(row_ptr: Tensor, index: Tensor, value: Tensor, W_dec: Tensor) -> Tensor:
    """Sum of value times decoder row over each row's entries: [batch, d_in]."""
    return _Decode.apply(row_ptr, index, value, W_dec)  # type: ignore[return-value]


def weight_gradient(
    row_ptr: Tensor, index: Tensor, value: Tensor, rows: Tensor, d_sae: int
) -> Tensor:
    """For each feature the sum of value times its token's row: [d_sae, d_in].

    The gradient of W_dec (rows: dL/dx_hat) and of W_enc (rows: the encoder's input) alike.
    """
    order = torch.argsort(index, stable=True)
    feature_ptr = torch.zeros(d_sae + 1, dtype=torch.int64, device=index.device)
    torch.cumsum(torch.bincount(index, minlength=d_sae), 0, out=feature_ptr[1:])
    # transposed codes: bag = feature, entries = tokens; faster than the operator's own backward
    return _bag_sum(feature_ptr, _bag_of_entry(row_ptr)[order], value[order], rows)


def _dense(entries: int, batch: int, d_sae: int) -> bool:
    return entries > _DENSE * batch * d_sae


def _scatter(row_ptr: Tensor, index: Tensor, value: Tensor, d_sae: int) -> Tensor:
    batch = len(row_ptr) - 1
    dense = value.new_zeros(batch * d_sae)
    dense[_bag_of_entry(row_ptr) * d_sae + index] = value
    return dense.view(batch, d_sae)


def _bag_sum(row_ptr: Tensor, index: Tensor, value: Tensor, rows: Tensor) -> Tensor:
    return functional.embedding_bag(
        index, rows, row_ptr, mode="sum", per_sample_weights=value, include_last_offset=True
    )


def _bag_of_entry(row_ptr: Tensor) -> Tensor:
    return torch.repeat_interleave(
        torch.arange(len(row_ptr) - 1, device=row_ptr.device), row_ptr.diff()
    )
