"""Sparse operations with gradients; which backend runs them is chosen per call.

| backend   | what it is                                    | used for                         |
|-----------|-----------------------------------------------|----------------------------------|
| cpu       | C++, compiled once into the user's cache      | float32 on the CPU               |
| triton    | Triton programs                               | CUDA                             |
| torch     | embedding-bag operators                       | all else, or without a compiler  |
| reference | dense torch, the truth the others are held to | only where asked for             |

SAESCOPE_KERNELS=NAME overrides the choice, and so does `using` (which a run's `kernels` field goes
through). Within `cpu`, a run leaves to torch what torch is faster at on its machine (`fastest`).

Shapes: x [batch, d_in]; W_enc_T [d_sae, d_in] and W_dec [d_sae, d_out], one feature a row; codes as
CSR (row_ptr int64 [batch + 1], index int64 [entries], value [entries]).
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from sae.kernels import autograd, selection
from sae.kernels.fixed_order_sums import total as total
from saescope.errors import InputError

BACKENDS = {
    "reference": "sae.kernels.reference_backend",
    "torch": "sae.kernels.torch_backend",
    "cpu": "sae.kernels.cpp_backend",
    "triton": "sae.kernels.triton_backend",
}
"""where each backend's functions are (`sae.kernels.backend`)"""
_OVERRIDE = "SAESCOPE_KERNELS"
_chosen: list[str] = []
"""innermost last: what `using` asks for"""


@contextmanager
def using(name: str | None) -> Iterator[None]:
    """Within the context, calls go to this backend where it can take them; None or auto: chosen.

    Raises InputError for an unknown name.
    """
    _check(name, "kernels")
    _chosen.append(name or "auto")
    try:
        yield
    finally:
        _chosen.pop()


def backend(like: Tensor | None = None) -> str:
    """Name of the backend that a call with x = `like` goes to (float32 on the CPU if not given).

    The override that was asked for, where it can take such tensors; otherwise the fastest that can.
    """
    device, dtype = _kind(like)
    asked = asked_for()
    if asked == "auto":
        asked = "triton" if device == "cuda" else "cpu"
    return asked if _takes(asked, device, dtype) else "torch"


def asked_for() -> str:
    """The backend that SAESCOPE_KERNELS or `using` asks for, or auto; InputError if unknown."""
    asked = os.environ.get(_OVERRIDE) or (_chosen[-1] if _chosen else "auto")
    _check(asked, _OVERRIDE)
    return asked


def available(like: Tensor | None = None) -> list[str]:
    """Names of the backends that can take tensors such as `like` (float32 on the CPU)."""
    return [name for name in BACKENDS if _takes(name, *_kind(like))]


def module(name: str) -> ModuleType:
    """A backend's module."""
    return importlib.import_module(BACKENDS[name])


def _kind(like: Tensor | None) -> tuple[str, torch.dtype]:
    return ("cpu", torch.float32) if like is None else (like.device.type, like.dtype)


def _takes(name: str, device: str, dtype: torch.dtype) -> bool:
    if name == "triton":
        return module(name).takes(device, dtype)
    if name == "cpu":
        return device == "cpu" and dtype == torch.float32 and module(name).usable()
    return True


def _check(name: str | None, where: str) -> None:
    if name not in (None, "auto", *BACKENDS):
        raise InputError(
            "no such kernels", where=where, given=name, allowed=", ".join(("auto", *BACKENDS))
        )


def _for(like: Tensor) -> ModuleType:
    return module(backend(like))


def subtract_bias(y: Tensor, shift: Tensor) -> Tensor:
    """y [batch, d] - shift [d]; before an encoding the gradient of shift costs next to nothing."""
    return autograd.SubtractBias.apply(y, shift)  # type: ignore[return-value]


def encode_topk(
    x: Tensor, W_enc_T: Tensor, b_enc: Tensor | None, k: int, *, signed: bool = False
) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each row: (index, value), both [batch, k], unsorted.

    Rectified; with `signed` the largest in magnitude, with their signs. Differentiable in x,
    W_enc_T and b_enc.
    """
    chosen = _for(x)

    def select(x: Tensor, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        index, value = chosen.topk(x, W, b, k, signed=signed)
        row_ptr = torch.arange(len(x) + 1, device=x.device) * k
        return row_ptr, index.reshape(-1), value.reshape(-1)

    _, index, value = _encode(x, W_enc_T, b_enc, select, rectify=not signed, chosen=chosen)
    return index.view(len(x), k), value.view(len(x), k)


def encode_above(
    x: Tensor, W_enc_T: Tensor, b_enc: Tensor | None, threshold: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Pre-activations above a threshold: (row_ptr, index, value), ragged.

    threshold: a number or [d_sae]. Differentiable in x, W_enc_T and b_enc.
    """
    chosen = _for(x)
    if isinstance(threshold, Tensor):
        bars = threshold.detach()
    else:
        bars = x.new_full((len(W_enc_T),), threshold)

    def select(x: Tensor, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return chosen.above(x, W, b, bars)

    return _encode(x, W_enc_T, b_enc, select, rectify=False, chosen=chosen)


def encode_top_of_batch(
    x: Tensor,
    W_enc_T: Tensor,
    b_enc: Tensor | None,
    n: int,
    *,
    weight: Tensor | None = None,
    hint: float = 0.0,
    excluded: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The n largest positive pre-activations of the batch: (row_ptr, index, value), ragged.

    Exactly n if as many are positive, otherwise those that are; of equals the first. They are
    compared by weight [d_sae] times value, if given; excluded = (row_ptr, index) are left out.
    A hint, such as the last batch's smallest choice, saves a sample and changes nothing else.
    Differentiable in x, W_enc_T and b_enc. Raises InputError for n < 1.
    """
    chosen = _for(x)

    def select(x: Tensor, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        codes = selection.top_of_batch(
            chosen,  # type: ignore[arg-type]
            x,
            W,
            b,
            n,
            weight=weight,
            hint=hint,
            excluded=excluded,
        )
        return codes.row_ptr, codes.index, codes.value

    return _encode(x, W_enc_T, b_enc, select, rectify=False, chosen=chosen)


def encode_top_of_features(
    x: Tensor, W_enc_T: Tensor, b_enc: Tensor | None, quota: Tensor, hint: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Each feature's quota[j] largest positive pre-activations: (row_ptr, index, value), ragged.

    Fewer where fewer are positive; of equals the first rows. quota is int64 [d_sae]; hint [d_sae]
    is about the smallest each will choose, 0 if not known: the better, the faster. Differentiable
    in x, W_enc_T and b_enc.
    """
    chosen = _for(x)

    def select(x: Tensor, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        codes = selection.top_of_features(chosen, x, W, b, quota, hint)  # type: ignore[arg-type]
        return codes.row_ptr, codes.index, codes.value

    return _encode(x, W_enc_T, b_enc, select, rectify=False, chosen=chosen)


def _encode(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    select: autograd.Selection,
    *,
    rectify: bool,
    chosen: ModuleType,
) -> tuple[Tensor, Tensor, Tensor]:
    shift = autograd.SubtractBias.shift_of(x)
    x = x if shift is None else x.detach()
    return autograd.Encode.apply(x, W, b, shift, select, rectify, chosen)  # type: ignore[return-value]


def encode_selected(
    x: Tensor,
    W_enc_T: Tensor,
    b_enc: Tensor | None,
    row_ptr: Tensor,
    index: Tensor,
    known: Tensor | None = None,
) -> Tensor:
    """Pre-activations of chosen entries, [entries]. Differentiable in x, W_enc_T and b_enc.

    known [entries], where they are there without gradient, spares their recomputation.
    """
    chosen = _for(x)

    def select(x: Tensor, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if known is not None:
            return row_ptr, index, known.clone()
        value = autograd.entry_dots(chosen, row_ptr, index, x, W)  # type: ignore[arg-type]
        return row_ptr, index, value if b is None else value + b[index]

    return _encode(x, W_enc_T, b_enc, select, rectify=False, chosen=chosen)[2]


def decode(row_ptr: Tensor, index: Tensor, value: Tensor, W_dec: Tensor) -> Tensor:
    """Sum of value times decoder row over each row's entries: [batch, d_out].

    An entry (row, feature) occurs once. Differentiable in value and W_dec.
    """
    return autograd.Decode.apply(row_ptr, index, value, W_dec, _for(value))  # type: ignore[return-value]


def decode_error(
    row_ptr: Tensor, index: Tensor, value: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Squared error of each row's reconstruction [batch], and y_hat - target [batch, d_out].

    The former is differentiable in value, W_dec, b_dec and target; the latter has no gradient.
    """
    return autograd.DecodeError.apply(  # type: ignore[return-value]
        row_ptr, index, value, W_dec, b_dec, target, _for(value)
    )
