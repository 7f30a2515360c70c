"""The truth that every fast kernel is tested against: plain dense torch, differentiated by
autograd.

Shapes: x [batch, d_in], W_enc_T and W_dec [d_sae, d_in] (one feature a row), b_enc [d_sae].
"""

import torch
from torch import Tensor


def encode_topk(x: Tensor, W_enc_T: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each row, rectified: (index, value), both [batch, k]."""
    pre = x @ W_enc_T.T + b_enc
    value, index = pre.topk(k, dim=-1, sorted=False)
    return index, torch.relu(value)


def encode_selected(
    x: Tensor, W_enc_T: Tensor, b_enc: Tensor | None, row_ptr: Tensor, index: Tensor, pre: Tensor
) -> Tensor:
    """Pre-activations of the given entries, [entries]."""
    del pre  # computed again, so that autograd sees it
    rows = torch.repeat_interleave(
        torch.arange(len(row_ptr) - 1, device=index.device), row_ptr.diff()
    )
    dense = x @ W_enc_T.T
    return (dense if b_enc is None else dense + b_enc)[rows, index]


def decode(row_ptr: Tensor, index: Tensor, value: Tensor, W_dec: Tensor) -> Tensor:
    """Sum of value times decoder row over each row's entries: [batch, d_in]."""
    batch = len(row_ptr) - 1
    rows = torch.repeat_interleave(torch.arange(batch, device=index.device), row_ptr.diff())
    dense = value.new_zeros(batch, W_dec.shape[0])
    return dense.index_put((rows, index), value, accumulate=True) @ W_dec
