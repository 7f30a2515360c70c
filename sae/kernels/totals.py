"""Sums over all of a tensor whose bits do not depend on the number of threads."""

import torch
from torch import Tensor

_FOLD = 1024
"""terms that are summed at a time; torch does not split so few among threads"""


def total(values: Tensor) -> Tensor:
    """The sum of all values [...], in an order that only their number decides. Differentiable.

    >>> total(torch.ones(3, 5))
    tensor(15.)
    """
    values = values.reshape(-1)
    while len(values) > _FOLD:
        values = torch.nn.functional.pad(values, (0, -len(values) % _FOLD)).view(-1, _FOLD).sum(1)
    return values.sum()


def of_rows(weight: Tensor, rows: Tensor) -> Tensor:
    """The sum of weight [n] times rows [n, d], [d]; as `total`, and unlike a matrix product."""
    return (weight[:, None] * rows).sum(0)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, where what is summed over is long (features, say).

    Libraries may split such sums among threads. Where torch is asked for deterministic algorithms
    it is done by one thread, on the CPU.
    """
    if left.device.type != "cpu" or not torch.are_deterministic_algorithms_enabled():
        return left @ right
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return left @ right
    finally:
        torch.set_num_threads(threads)
