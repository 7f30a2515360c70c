"""Sparse operations, chosen per call.

Two backends have the same signatures: `reference` (dense, the truth) and `bags` (embedding-bag
operators). SAESCOPE_KERNELS=reference|bags overrides the choice.
"""

import os
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

from sae.codes import SparseCodes, csr_of
from sae.kernels import bags, reference
from saescope.errors import InputError

BACKENDS: dict[str, ModuleType] = {"reference": reference, "bags": bags}
_OVERRIDE = "SAESCOPE_KERNELS"
_CHUNK_ELEMENTS = 2**23
"""pre-activations held at a time by `encode_above`"""


def backend() -> str:
    """Name of the backend in use; InputError if the override names none."""
    chosen = os.environ.get(_OVERRIDE) or "bags"
    if chosen not in BACKENDS:
        raise InputError("no such kernels", where=_OVERRIDE, given=chosen, allowed=BACKENDS)
    return chosen


def encode_topk(x: Tensor, W_enc_T: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each row, rectified: (index, value), both [batch, k].

    x [batch, d_in], W_enc_T [d_sae, d_in], b_enc [d_sae]. Differentiable in all three.
    """
    return BACKENDS[backend()].encode_topk(x, W_enc_T, b_enc, k)


@torch.no_grad()
def preactivations(x: Tensor, W_enc_T: Tensor, b_enc: Tensor | None) -> Tensor:
    """x W_enc + b_enc, [batch, d_sae]; to select on, so without gradient."""
    return functional.linear(x, W_enc_T, b_enc)


def encode_selected(
    x: Tensor,
    W_enc_T: Tensor,
    b_enc: Tensor | None,
    row_ptr: Tensor,
    index: Tensor,
    pre: Tensor | None = None,
) -> Tensor:
    """Pre-activations of chosen entries, [entries]. Differentiable in x, W_enc_T and b_enc.

    row_ptr int64 [batch + 1], index int64 [entries]; pre [batch, d_sae] (`preactivations`) spares
    their recomputation.
    """
    if pre is None:
        pre = preactivations(x, W_enc_T, b_enc)
    return BACKENDS[backend()].encode_selected(x, W_enc_T, b_enc, row_ptr, index, pre)


def encode_above(
    x: Tensor, W_enc_T: Tensor, b_enc: Tensor | None, threshold: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Pre-activations above a threshold: (row_ptr, index, value), ragged, by chunks of rows.

    threshold: a number or [d_sae]. Differentiable in x, W_enc_T and b_enc.
    """
    parts = []
    for chunk in x.split(max(1, _CHUNK_ELEMENTS // W_enc_T.shape[0])):
        pre = preactivations(chunk, W_enc_T, b_enc)
        row_ptr, index = csr_of(pre > threshold)
        value = encode_selected(chunk, W_enc_T, b_enc, row_ptr, index, pre)
        parts.append(SparseCodes(row_ptr, index, value, W_enc_T.shape[0]))
    codes = SparseCodes.concatenate(parts)
    return codes.row_ptr, codes.index, codes.value


def decode(row_ptr: Tensor, index: Tensor, value: Tensor, W_dec: Tensor) -> Tensor:
    """Sum of value times decoder row over each row's entries: [batch, d_in].

    row_ptr int64 [batch + 1], index int64 [entries], value [entries], W_dec [d_sae, d_in].
    An entry (row, feature) occurs once. Differentiable in value and W_dec.
    """
    return BACKENDS[backend()].decode(row_ptr, index, value, W_dec)
