"""One step of Adam on one parameter, with all that a dictionary needs done to it on the way.

    g' = (g - (g . w) w) s,   m = b1 m + (1 - b1) g',   v = b2 v + (1 - b2) g'^2
    w <- w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps),   w <- w / ||w||

The projection on the first line and the last assignment are of parameters whose rows are held at
unit norm; s is what clipping scales the gradient by. Each row is read from memory once. C++ for
float32 on the CPU, a backend's own where it has one, torch's operators a piece at a time otherwise.
"""

import ctypes
import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim.adam import adam

from sae import kernels
from sae.kernels import cpp_library, operations
from sae.kernels.fixed_order_sums import total

_PIECE = {"cpu": 1 << 20, "cuda": 1 << 25}
"""elements that torch's operators take at a time: on a CPU a few MB, which stay in the cache"""


def gradient_square(param: Tensor, grad: Tensor, unit_rows: bool) -> Tensor:
    """Squared norm of a parameter's gradient, float64 [], on its device.

    unit_rows: param [rows, width] has rows of unit norm, and of each row's gradient counts only
    what is orthogonal to it. Summed in an order that does not depend on the number of threads.
    """
    backend = _backend(param, "gradient_square")
    if backend == "cpu":
        return _square_in_cpp(param.contiguous(), grad.contiguous(), unit_rows)
    own = getattr(kernels.module(backend), "gradient_square", None)
    return (own or _square_in_torch)(param, grad, unit_rows)


def adam_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    scale: float,
    unit_rows: bool,
) -> None:
    """One step, in place on param and its moments; the gradient is left as it is.

    Args:
        step: number of this step, from 1.
        scale: factor on the gradient (clipping).
        unit_rows: rows of param [rows, width] have unit norm, before and after; their gradient is
            taken orthogonally to them. A row of zeros stays what Adam makes of it, at unit norm.
    """
    kept = (param, exp_avg, exp_avg_sq)
    w, m, v = (each.contiguous() for each in kept)
    corrected = {
        "beta1": beta1,
        "beta2": beta2,
        "eps": eps,
        "step_size": lr / (1 - beta1**step),
        "root_correction": (1 - beta2**step) ** -0.5,
        "scale": scale,
    }
    backend = _backend(param, "adam")
    own = getattr(kernels.module(backend), "adam_", None)
    if backend == "cpu":
        _adam_in_cpp(w, grad.contiguous(), m, v, unit_rows, **corrected)
    elif own is not None:
        own(w, grad, m, v, unit_rows, **corrected)
    else:
        _adam_in_torch(
            w,
            grad.contiguous(),
            m,
            v,
            unit_rows,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            step=step,
            scale=scale,
        )
    for stored, changed in zip(kept, (w, m, v), strict=True):
        if stored is not changed:  # was not contiguous
            stored.copy_(changed)


def _backend(param: Tensor, operation: str) -> str:
    found = kernels.backend(param)
    return operations.OTHER if found == "cpu" and operations.by_torch(operation) else found


def _square_in_cpp(param: Tensor, grad: Tensor, unit_rows: bool) -> Tensor:
    unit = cpp_library.pointer(param if unit_rows else None)
    square = _library().saescope_gradient_square(
        cpp_library.pointer(grad), unit, param.numel(), _width(param), torch.get_num_threads()
    )
    return torch.tensor(square, dtype=torch.float64)


def _adam_in_cpp(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    unit_rows: bool,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    step_size: float,
    root_correction: float,
    scale: float,
) -> None:
    _library().saescope_adam(
        *map(cpp_library.pointer, (param, grad, m, v)),
        param.numel(),
        _width(param),
        unit_rows,
        beta1,
        beta2,
        eps,
        step_size,
        root_correction,
        scale,
        torch.get_num_threads(),
    )


def _width(param: Tensor) -> int:
    return param.shape[-1] if param.ndim else 1


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpp_library.library()
    assert library is not None, "the cpu backend was chosen without its library"
    pointers, sizes, threads = [ctypes.c_void_p] * 4, [ctypes.c_int64] * 2, ctypes.c_int
    library.saescope_gradient_square.argtypes = [*pointers[:2], *sizes, threads]
    library.saescope_gradient_square.restype = ctypes.c_double
    library.saescope_adam.argtypes = [
        *pointers,
        *sizes,
        ctypes.c_int,
        *[ctypes.c_double] * 6,
        threads,
    ]
    library.saescope_adam.restype = None
    return library


def _square_in_torch(param: Tensor, grad: Tensor, unit_rows: bool) -> Tensor:
    if grad.ndim < 2:
        return total(grad.double().square())
    norms = []
    for scratch, w, g in _pieces(param, grad):
        left = _projected(w, g, scratch) if unit_rows else g
        norms.append(torch.linalg.vector_norm(left, dim=-1).reshape(-1))
    return total(torch.cat(norms).double().square())


def _adam_in_torch(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    unit_rows: bool,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    scale: float,
) -> None:
    for scratch, w, g, mean, square in _pieces(param, grad, m, v):
        if unit_rows:
            g = _projected(w, g, scratch).mul_(scale)
        elif scale != 1:
            g = torch.mul(g, scale, out=scratch)
        adam(
            [w],
            [g],
            [mean],
            [square],
            [],
            [torch.tensor(step - 1.0, device=w.device)],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=0.0,
            amsgrad=False,
            maximize=False,
            fused=True,
        )
        if unit_rows:
            norm = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
            w.div_(torch.where(norm > torch.finfo(w.dtype).tiny, norm, 1.0))


def _projected(w: Tensor, g: Tensor, out: Tensor) -> Tensor:
    """What is left of each row of g without its part along w's, in `out`."""
    along = torch.mul(g, w, out=out).sum(-1, keepdim=True)
    return torch.addcmul(g, along, w, value=-1, out=out)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Scratch space and tensors of one shape, some rows at a time; without rows all at once."""
    if tensors[0].ndim < 2:
        yield torch.empty_like(tensors[0]), *tensors
        return
    first = tensors[0]
    elements = _PIECE.get(first.device.type, _PIECE["cuda"])
    rows = max(1, elements * len(first) // first.numel())
    scratch = torch.empty_like(first[:rows])
    for pieces in zip(*(each.split(rows) for each in tensors), strict=True):
        yield scratch[: len(pieces[0])], *pieces
