"""Sums over all of a tensor whose bits do not depend on the number of threads."""

import torch
from torch import Tensor

_FOLD = 1024
"""terms that are summed at a time; torch does not split so few among threads"""
_ROWS = 512
"""rows that are summed at a time"""


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
    n = torch.arange(len(rows), device=rows.device)
    # by bags of rows, since a bag is summed by one thread
    sums = torch.nn.functional.embedding_bag(
        n, rows, n[::_ROWS], mode="sum", per_sample_weights=weight
    )
    return sums.sum(0)


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
