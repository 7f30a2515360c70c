"""Which pre-activations of a batch are kept, when rows or features compete with each other.

The matrix of pre-activations [batch, d_sae] is never held: what passes a bar that somewhat too many
pass is encoded, and the choice among that is exact. Of equal values the first are kept, by row and
then by feature, so what comes out does not depend on how good the guess of the bar was.
"""

from collections.abc import Iterator

import torch
from einops import reduce
from torch import Tensor
from torch.nn import functional

from sae.distributed import ALL, ROWS, Axis
from sae.kernels import global_topk
from sae.kernels.backend import Backend
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError

_SAMPLE_ROWS = 64
_CHECKED_ROWS = 8
"""rows that show whether a guess is absurd"""
_MANY = 8
"""times as many entries as wanted are too many"""
_SAMPLE_ELEMENTS = 2**22
"""pre-activations in a sample, at most"""
_MARGIN = 1.5
"""how many more than wanted a bar from a sample aims at"""
_BELOW = 0.9
"""the fraction of the last batch's bar that this one's begins at"""
_BELOW_EACH = 0.5
"""the same for the bar of a single feature, which wanders more"""
_BLOCK_ELEMENTS = 2**22
"""pre-activations of a few features held at a time"""
_GROUP = 16
"""rows a group in `top_of_columns`"""


def top_of_batch(
    backend: Backend,
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    n: int,
    *,
    weight: Tensor | None = None,
    hint: float = 0.0,
    excluded: tuple[Tensor, Tensor] | None = None,
) -> SparseCodes:
    """The n largest positive entries of x W^T + b over the whole batch, in rising order.

    Exactly n if there are as many above zero, ties included; otherwise all above zero. Of ranks
    that share the batch or the dictionary each gets its own of those n. Memory: a few times n
    entries, as far as a sample of rows can tell.

    Args: weight [d_sae], positive, is what entries are multiplied by to be compared; hint: the
    last chosen in a batch like this one, if there was one; excluded: entries (row_ptr, index) that
    are left out, none twice.
    """
    if n < 1:
        raise InputError("nothing to select", where="top_of_batch", given=n, allowed="at least 1")
    # as many are there without those excluded
    wanted = n if excluded is None else n + ALL.total(len(excluded[1]))
    codes, failed = SparseCodes.none(x, len(W)), torch.inf
    for bar in _bars(x, W, b, wanted, weight, hint):
        if bar < failed:
            found = backend.above(x, W, b, _each(bar, W, weight))
            codes, failed = _cut(SparseCodes(*found, len(W)), wanted, weight), bar
        if ALL.total(len(codes.value)) >= wanted:
            break
    codes = codes if excluded is None else _without(codes, *excluded)
    if ALL.size == 1:
        return _cut(codes, n, weight)
    return codes.select(global_topk.largest(_score(codes, weight), n))


def _bars(
    x: Tensor, W: Tensor, b: Tensor | None, n: int, weight: Tensor | None, hint: float
) -> Iterator[float]:
    """Guesses of a bar that somewhat more than n entries pass; the last is 0."""
    if hint > 0 and _is_sparse(x, W, b, _each(_BELOW * hint, W, weight), n, ALL):
        yield _BELOW * hint
    sample, fraction = _sample(x, W, b, _SAMPLE_ROWS, ALL)
    score = sample[sample > 0] if weight is None else (sample * weight)[sample > 0]
    rank, found = _MARGIN * n * fraction, ALL.total(len(score))
    while rank < found:
        best = score.topk(min(int(rank) + 1, len(score)), sorted=False).values
        yield float(ALL.gather(best).topk(int(rank) + 1, sorted=False).values.min())
        rank *= 4
    yield 0.0


def _sample(x: Tensor, W: Tensor, b: Tensor | None, rows: int, axis: Axis) -> tuple[Tensor, float]:
    """Pre-activations of a few rows from all over the batch, and which fraction of all it is."""
    rows = min(len(x), rows, max(1, _SAMPLE_ELEMENTS // len(W)))
    spread = torch.arange(rows, device=x.device) * len(x) // max(1, rows)
    fraction = axis.total(rows * len(W)) / axis.total(max(1, len(x) * len(W)))
    return functional.linear(x[spread], W, b).float(), fraction


def _is_sparse(x: Tensor, W: Tensor, b: Tensor | None, bars: Tensor, n: int, axis: Axis) -> bool:
    """Whether not very many more than n entries seem to pass the bars [d_sae]."""
    sample, fraction = _sample(x, W, b, _CHECKED_ROWS, axis)
    return axis.total(int((sample > bars).sum())) <= _MANY * (n * fraction + 1)


def _each(bar: float, W: Tensor, weight: Tensor | None) -> Tensor:
    """A bar on weighted pre-activations as one on those of each feature, [d_sae]."""
    bars = torch.full((len(W),), bar, dtype=_exact(W), device=W.device)
    # rounded down: `_cut` compares exactly
    return bars if weight is None else bars / weight * (1 - 4 * torch.finfo(bars.dtype).eps)


def _exact(W: Tensor) -> torch.dtype:
    return torch.promote_types(W.dtype, torch.float32)


def _score(codes: SparseCodes, weight: Tensor | None) -> Tensor:
    return codes.value if weight is None else codes.value * weight[codes.index]


def _cut(codes: SparseCodes, n: int, weight: Tensor | None) -> SparseCodes:
    """The n entries of largest score; of equals the first."""
    score = _score(codes, weight)
    if len(score) <= n:
        return codes
    last = score.topk(n, sorted=False).values.min()
    kept = score > last
    equal = (score == last).nonzero()[:, 0]
    kept[equal[: n - int(kept.sum())]] = True
    return codes.select(kept)


def _without(codes: SparseCodes, row_ptr: Tensor, index: Tensor) -> SparseCodes:
    """Codes, in rising order, without the given entries."""
    excluded = SparseCodes(row_ptr, index, index, codes.d_sae).flat()
    flat = codes.flat()
    at = torch.searchsorted(flat, excluded)
    at = at[flat[at.clamp_max(len(flat) - 1)] == excluded] if len(flat) else at[:0]
    return codes.select(torch.ones_like(flat, dtype=torch.bool).index_fill_(0, at, False))


# ---- features that choose rows ----------------------------------------------------------------


def top_of_features(
    backend: Backend, x: Tensor, W: Tensor, b: Tensor | None, quota: Tensor, hint: Tensor
) -> SparseCodes:
    """The quota[j] largest positive entries of each column of x W^T + b, in rising order.

    Fewer where fewer are positive; of equals the first rows; of ranks that share the batch each
    gets its own. Features whose bar turns out too high are encoded again, dense and a few at a
    time.

    Args: quota int64 [d_sae]; hint [d_sae]: where each feature's last choice was, 0 if not known.
    """
    quota = quota.clamp_max(ROWS.total(len(x)))
    own = quota.clamp_max(len(x))
    bars = torch.where((quota > 0) & (hint > 0), _BELOW_EACH * hint, torch.inf).to(_exact(W))
    codes = SparseCodes.none(x, len(W))
    if _is_sparse(x, W, b, bars, int(quota.sum()), ROWS):
        codes = SparseCodes(*backend.above(x, W, b, bars), len(W))
    short = ROWS.sum(codes.counts()) < quota
    codes = codes.select(~short[codes.index])
    kept = _first_of_columns(codes.index, codes.value, quota)
    flat, value = [codes.flat()[kept]], [codes.value[kept]]
    again, size = short.nonzero()[:, 0], max(1, _BLOCK_ELEMENTS // max(1, len(x)))
    for few in again.split(size) if len(again) else ():
        pre = functional.linear(x, W[few], None if b is None else b[few])
        pre.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        row_ptr, column = top_of_columns(pre, own[few])
        found = SparseCodes(row_ptr, column, column, len(few))
        value.append(pre.view(-1)[found.flat()].to(x.dtype))
        flat.append(found.rows() * len(W) + few[column])
    codes = SparseCodes.from_flat(torch.cat(flat), torch.cat(value), len(x), len(W))
    if ROWS.size == 1:
        return codes
    return codes.select(global_topk.largest_of_columns(codes.value, codes.index, quota))


def top_of_columns(values: Tensor, quota: Tensor) -> tuple[Tensor, Tensor]:
    """The quota[j] largest positive entries of each column of [batch, d_sae]: (row_ptr, index).

    Fewer where fewer are positive; of equals the first rows. Exact: a column's rows are dealt into
    groups, and its m largest group maxima are m entries, so the m-th of them is a bar that at least
    m entries reach. Only what reaches it is sorted.

    >>> top_of_columns(torch.tensor([[5.0, 1.0], [3.0, -4.0]]), torch.tensor([1, 2]))
    (tensor([0, 2, 2]), tensor([0, 1]))
    """
    batch, width = values.shape
    flat = (values >= _column_bars(values, quota)).view(-1).nonzero()[:, 0]
    flat = flat[_first_of_columns(flat % width, values.reshape(-1)[flat], quota)]
    codes = SparseCodes.from_flat(flat, flat, batch, width)
    return codes.row_ptr, codes.index


def _first_of_columns(column: Tensor, value: Tensor, quota: Tensor) -> Tensor:
    """Positions of each column's quota[j] largest values; of equals the first."""
    order = value.argsort(descending=True, stable=True)
    order = order[column[order].argsort(stable=True)]
    counts = torch.bincount(column, minlength=len(quota))
    ordered = column[order]
    rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[ordered]
    return order[rank < quota[ordered]]


def _column_bars(values: Tensor, quota: Tensor) -> Tensor:
    """For each column a positive value [d_sae] that its quota of largest positives all reach."""
    groups = len(values) // _GROUP
    bars = torch.full_like(values[0], torch.inf)
    few = ((quota > 0) & (quota <= groups)).nonzero()[:, 0]
    if len(few):
        largest = reduce(
            values[: groups * _GROUP],
            "(member group) feature -> group feature",
            "max",
            member=_GROUP,
        )
        ranked = largest.T[few].contiguous().sort(dim=1, descending=True).values
        bars[few] = ranked.gather(1, quota[few, None] - 1)[:, 0]
    many = (quota > groups).nonzero()[:, 0]
    if len(many):
        most = int(quota[many].max())
        ranked = values[:, many].T.contiguous().topk(most, dim=1).values
        bars[many] = ranked.gather(1, quota[many, None] - 1)[:, 0]
    return bars.clamp_min(torch.finfo(values.dtype).tiny)
