"""Sparse operations, chosen per call.

Two backends have the same signatures: `reference` (dense, the truth) and `bags` (embedding-bag
operators). SAESCOPE_KERNELS=reference|bags overrides the choice.
"""

import os
from types import ModuleType

from torch import Tensor

from sae.kernels import bags, reference
from saescope.errors import InputError

BACKENDS: dict[str, ModuleType] = {"reference": reference, "bags": bags}
_OVERRIDE = "SAESCOPE_KERNELS"


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


def decode(row_ptr: Tensor, index: Tensor, value: Tensor, W_dec: Tensor) -> Tensor:
    """Sum of value times decoder row over each row's entries: [batch, d_in].

    row_ptr int64 [batch + 1], index int64 [entries], value [entries], W_dec [d_sae, d_in].
    Differentiable in value and W_dec.
    """
    return BACKENDS[backend()].decode(row_ptr, index, value, W_dec)
