"""Gradients' memory, used again: on a CPU fresh memory of that size is handed out page by page.

That costs as much as filling it. Whoever owns gradients gives them back before the next are made.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

_spare: dict[torch.Size, list[Tensor]] = {}


def give(tensors: Iterable[Tensor]) -> None:
    """Hand over tensors that nobody is going to read again; what was there before is let go of.

    Only matrices of float32 on the CPU are kept.
    """
    _spare.clear()
    for tensor in tensors:
        fits = tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.ndim == 2
        if fits and tensor.layout == torch.strided and tensor.is_contiguous():
            _spare.setdefault(tensor.shape, []).append(tensor)


def take(rows: int, width: int) -> Tensor:
    """A float32 matrix [rows, width] on the CPU, of any content."""
    kept = _spare.get(torch.Size((rows, width)))
    return kept.pop() if kept else torch.empty(rows, width)
