"""Gradient buffers, reused: on a CPU, new memory of that size is mapped page by page.

That costs as much as filling it. The optimiser's caller gives gradients back before the next
backward pass makes new ones.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

_unused: dict[torch.Size, list[Tensor]] = {}


def give(tensors: Iterable[Tensor]) -> None:
    """Hand over tensors that nothing will read again; buffers that were not reused are freed.

    Only matrices of float32 on the CPU are kept.
    """
    _unused.clear()
    for tensor in tensors:
        fits = tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.ndim == 2
        if fits and tensor.layout == torch.strided and tensor.is_contiguous():
            _unused.setdefault(tensor.shape, []).append(tensor)


def take(rows: int, width: int) -> Tensor:
    """A float32 matrix [rows, width] on the CPU, of any content."""
    kept = _unused.get(torch.Size((rows, width)))
    return kept.pop() if kept else torch.empty(rows, width)
