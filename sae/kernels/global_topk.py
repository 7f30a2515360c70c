"""Global top-k over ranks: exact, and without gradient.

Every rank first selects its own largest, as many as there could be if the other ranks had none;
their values are gathered, and each rank keeps those that are among the largest of all. Of equal
values the lower rank's are kept, and on a rank those that come first, so that exactly as many are
kept as in one process.
"""

import torch
from torch import Tensor

from sae.distributed import ALL, FEATURES, ROWS
from sae.kernels.codes import SparseCodes


@torch.no_grad()
def largest(values: Tensor, n: int) -> Tensor:
    """Which of values [candidates] are among the n largest of all ranks', bool [candidates]."""
    whole = ALL.gather(values)
    if len(whole) <= n:
        return torch.ones_like(values, dtype=torch.bool)
    if n <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    bar = whole.topk(n, sorted=False).values.min()
    left = n - (whole > bar).sum()
    equal = values == bar
    before = ALL.before(int(equal.sum()))
    return (values > bar) | (equal & (equal.cumsum(0) + before <= left))


def strongest(index: Tensor, value: Tensor, k: int, d_sae: int) -> SparseCodes:
    """Codes of the k entries of largest magnitude in each row of (index, value) [batch, own].

    Where ranks share the dictionary, own entries are of its part here, and k those of all.

    >>> index, value = torch.tensor([[5, 1, 7]]), torch.tensor([[0.1, 3.0, -0.2]])
    >>> strongest(index, value, 1, 8).index.tolist()
    [1]
    """
    size = value.detach().abs()
    if FEATURES.size == 1:
        if size.shape[1] > k:
            kept = size.topk(k, dim=1, sorted=False).indices
            index, value = index.gather(1, kept), value.gather(1, kept)
        return SparseCodes.from_fixed(index, value, d_sae)
    kept = largest_of_rows(size, k) & (size > 0)
    row_ptr = torch.zeros(len(size) + 1, dtype=torch.int64, device=size.device)
    torch.cumsum(kept.sum(1), 0, out=row_ptr[1:])
    return SparseCodes(row_ptr, index[kept], value[kept], d_sae)


@torch.no_grad()
def largest_of_rows(values: Tensor, k: int) -> Tensor:
    """Which of values [batch, own] are among the k largest of their row over all ranks' features.

    Ranks may have different numbers of candidates; of equals the first are kept. bool [batch, own].
    """
    whole = FEATURES.gather(values.T.contiguous())  # [candidates of all ranks, batch]
    if len(whole) <= k:
        return torch.ones_like(values, dtype=torch.bool)
    bar = whole.topk(k, dim=0, sorted=False).values.amin(0)
    left = k - (whole > bar).sum(0)
    before = (whole[: FEATURES.before(values.shape[1])] == bar).sum(0)
    equal = values == bar[:, None]
    tied = equal & (equal.cumsum(1) + before[:, None] <= left[:, None])
    return (values > bar[:, None]) | tied


@torch.no_grad()
def largest_of_columns(values: Tensor, column: Tensor, quota: Tensor) -> Tensor:
    """Which of values [candidates], of features `column`, are among their feature's quota largest.

    quota int64 [d_sae]; over the rows of all ranks. bool [candidates].
    """
    whole, columns = ROWS.gather(values), ROWS.gather(column)
    order = whole.argsort(descending=True, stable=True)
    order = order[columns[order].argsort(stable=True)]
    counts = torch.bincount(columns, minlength=len(quota))
    ordered = columns[order]
    rank = torch.arange(len(whole), device=whole.device) - (counts.cumsum(0) - counts)[ordered]
    kept = torch.zeros_like(whole, dtype=torch.bool)
    kept[order[rank < quota[ordered]]] = True
    first = ROWS.before(len(values))
    return kept[first : first + len(values)]
