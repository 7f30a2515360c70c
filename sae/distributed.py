"""Several processes that train one SAE: what each has, and sums over all of them.

Ranks share the rows of a batch (each has the whole dictionary), or the features of the dictionary
(each sees the whole batch). One rule makes both exact: every rank computes the whole loss, the same
number, from sums over what each has, and its backward pass differentiates its own share alone. So
`sum` and `gather` need no communication in the backward pass, and added up over ranks that share
rows, the gradients are those of one process that has everything.

In a single process every function here returns what it is given.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

Split = Literal["rows", "features"]
"""what is shared out among ranks"""
_DRAWN = 4096
"""rows of numbers drawn at a time"""


class Axis:
    """The ranks that something is shared out among; this one is `rank` of `size`.

    >>> ROWS.size, ROWS.sum(torch.ones(2)).tolist(), ROWS.share(7)
    (1, [1.0, 1.0], slice(0, 7, None))
    """

    def __init__(self) -> None:
        self.rank, self.size = 0, 1

    def share(self, total: int) -> slice:
        """The positions that are this rank's, of `total` in order; shares differ by one at most."""
        return slice(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks; its gradient is each rank's own."""
        return value if self.size == 1 else _Sum.apply(value)  # type: ignore[return-value]

    def total(self, number: int) -> int:
        """The sum of whole numbers over ranks."""
        return number if self.size == 1 else int(_reduced(torch.tensor(number), dist.ReduceOp.SUM))

    def before(self, number: int) -> int:
        """The sum of whole numbers over the ranks below this one."""
        if self.size == 1:
            return 0
        return sum(_sizes(number, self.rank)[: self.rank])

    def mean(self, rows: Tensor) -> Tensor:
        """The mean [...] over all ranks' rows [rows, ...]; gradients as for `sum`."""
        return self.sum(rows.sum(0)) / self.total(len(rows))

    def max(self, value: Tensor) -> Tensor:
        """The largest over ranks, element by element; no gradient."""
        return value if self.size == 1 else _reduced(value, dist.ReduceOp.MAX)

    def min(self, value: Tensor) -> Tensor:
        """The smallest over ranks, element by element; no gradient."""
        return value if self.size == 1 else _reduced(value, dist.ReduceOp.MIN)

    def spread(self, value: Tensor) -> Tensor:
        """What all ranks hold alike and each uses for its share: its gradient is summed over ranks.

        Collective in the backward pass, so every rank has to go through it.
        """
        return value if self.size == 1 else _Spread.apply(value)  # type: ignore[return-value]

    def gather(self, value: Tensor) -> Tensor:
        """All ranks' values [n of the rank, ...] one after another; the gradient is this rank's.

        Ranks may have different n.
        """
        return value if self.size == 1 else _Gather.apply(value, self.rank)  # type: ignore[return-value]


ROWS, FEATURES, ALL = Axis(), Axis(), Axis()
"""ranks with other rows of the batch; with other features; with other pre-activations, so both"""


def rank() -> int:
    """This process's number, 0 if it is the only one."""
    return ALL.rank


def size() -> int:
    """Number of processes."""
    return ALL.size


def arrange(split: Split | None) -> None:
    """Say what the ranks of the running process group share; None takes it back."""
    for axis, active in ((ROWS, "rows"), (FEATURES, "features"), (ALL, split)):
        joined = split is not None and active == split
        axis.rank, axis.size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


@contextmanager
def alone() -> Iterator[None]:
    """Within the context, this process shares nothing with others."""
    axes = (ROWS, FEATURES, ALL)
    before = [(axis.rank, axis.size) for axis in axes]
    arrange(None)
    try:
        yield
    finally:
        for axis, (rank, size) in zip(axes, before, strict=True):
            axis.rank, axis.size = rank, size


@torch.no_grad()
def normal_rows_(own: Tensor, total: int, std: float = 1.0) -> None:
    """Normal numbers for this rank's features [own, ...] of `total`: what one process would draw.

    Every rank draws the numbers of all features, but holds no more than its own.
    """
    if FEATURES.size == 1:
        own.normal_(std=std)
        return
    share, first = FEATURES.share(total), 0
    while first < total:
        # torch draws numbers sixteen at a time, so a piece is a multiple of it; the rest goes last
        rows = _DRAWN if total - first >= 2 * _DRAWN else total - first
        drawn = torch.empty(rows, *own.shape[1:], dtype=own.dtype).normal_(std=std)
        start, stop = max(share.start, first), min(share.stop, first + rows)
        if start < stop:
            own[start - share.start : stop - share.start] = drawn[start - first : stop - first]
        first += rows


def broadcast(value: Any) -> Any:
    """Rank 0's value (anything that can be pickled; between processes of one run only)."""
    if ALL.size == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def everyones(value: Any) -> Sequence[Any]:
    """Every rank's value, in order; a point that all ranks pass together."""
    if ALL.size == 1:
        return [value]
    found: list[Any] = [None] * ALL.size
    dist.all_gather_object(found, value)
    return found


def _reduced(value: Tensor, operation: Any) -> Tensor:
    whole = value.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(whole, operation)
    return whole


def _sizes(number: int, rank: int) -> list[int]:
    """Every rank's number."""
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    sizes[rank] = number
    return _reduced(sizes, dist.ReduceOp.SUM).tolist()


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return _reduced(value, dist.ReduceOp.SUM)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _Spread(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _reduced(gradients[0], dist.ReduceOp.SUM)


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, rank: int) -> Tensor:
        counts = _sizes(len(value), rank)
        ctx.own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        padded = value.new_zeros(max(counts), *value.shape[1:])
        padded[: len(value)] = value.detach()
        found = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(found, padded)
        return torch.cat([each[:n] for each, n in zip(found, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][ctx.own], None
