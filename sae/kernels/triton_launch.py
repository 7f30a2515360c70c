"""Starting Triton programs."""

from typing import Any

import torch
from torch import Tensor


def launch(program: Any, grid: tuple[int, ...], on: Tensor, *given: object, **options: Any) -> None:
    """Run a program over a grid, on the device that a tensor is on.

    given: what the program is given, contiguous tensors and numbers. options: its constants, and
    `num_warps` (32 threads each) for one of the grid.
    """
    with torch.cuda.device_of(on):  # Triton would take the current device
        program[grid](*given, **options)


def blocks(size: int, width: int) -> int:
    """Blocks of `width` that cover `size`.

    >>> blocks(5, 2)
    3
    """
    return -(-size // width)


def power_of_2(size: int) -> int:
    """The smallest power of 2 that is not less.

    >>> [power_of_2(size) for size in (0, 1, 2, 5)]
    [1, 1, 2, 8]
    """
    return 1 << max(0, size - 1).bit_length()
