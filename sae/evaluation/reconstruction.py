"""Reconstruction on activations: L0, FVU, cosine, dead features, shrinkage.

FVU = sum ||t - x_hat||^2 / sum ||t - mu||^2 with t what is to be reconstructed (x itself, or for a
transcoder the activation of its output site) and mu the mean of t over all rows evaluated: the
identity gives 0, predicting the mean gives 1. Two passes, float64 sums, so neither batch size nor a
large mean matters.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sae.core.finite import check_rows
from sae.core.normaliser import ROUNDING
from sae.distributed import FEATURES, ROWS
from sae.evaluation.intervals import by_cluster, half_width
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError

_ROWS = 4096


class Reconstructor(Protocol):
    """What can be measured: an SAE, or a stand-in such as the identity."""

    d_sae: int

    def encode_sparse(self, x: Tensor) -> SparseCodes: ...
    def decode(self, codes: SparseCodes, like: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Measured over `rows` activations of so many documents, which are the interval's unit."""

    rows: int
    """number of activation rows"""
    l0: float
    """mean number of non-zero features a row"""
    fvu: float
    """fraction of variance unexplained"""
    fvu_interval: float | None
    """half width of its 95% interval (`sae.evaluation.intervals`); None: too few documents"""
    cosine: float
    """mean cosine of t and x_hat over rows with a non-zero norm of both"""
    norm_ratio: float
    """sum ||x_hat|| / sum ||t||; below 1 is shrinkage"""
    dead_fraction: float
    """features that fire on none of the rows, over d_sae"""
    density: Tensor
    """float64 [d_sae], part of the rows each feature fires on"""
    documents: int | None = None
    """number of documents; None where they are not known, and rows count as independent"""
    fvu_by_site: dict[str, float] = field(default_factory=dict)
    """FVU of each site, where there are several: of a crosscoder's columns, of a layer's rows"""


class Piece(NamedTuple):
    """Rows, and which document each is of."""

    x: Tensor
    """[rows, d_in]"""
    target: Tensor
    """[rows, d_out], what is to be reconstructed; x itself but for transcoders"""
    document: Tensor | None = None
    """int64 [rows]"""

    def rows(self, chosen: slice) -> "Piece":
        """Some of the rows."""
        document = None if self.document is None else self.document[chosen]
        return Piece(self.x[chosen], self.target[chosen], document)


Rows = Tensor | tuple[Tensor, Tensor] | Piece
"""x [rows, d_in], or it and what it is to predict [rows, d_out], or these with their documents"""


@torch.no_grad()
def measure_reconstruction(
    sae: Reconstructor,
    rows: Callable[[], Iterable[Rows]],
    *,
    columns: Mapping[str, slice] | None = None,
) -> Reconstruction:
    """Measure an SAE on activations, given as fresh iterators of them (read twice).

    Args:
        rows: pieces x [rows, d_in]; or pairs of it and the target [rows, d_out], of a transcoder;
            or these with each row's document, whose rows are not independent of each other.
        columns: where each site stands in the target, for a crosscoder's FVU at each.

    Raises InputError if there are no rows, if they are all equal, or if some are not finite.
    """
    count, total = 0, torch.zeros((), dtype=torch.float64)
    for each in rows():
        target = _piece(each).target
        check_rows(target, "measure_reconstruction")
        count += len(target)
        total = total + target.sum(0, dtype=torch.float64)
    if count == 0:
        raise InputError("no activations to evaluate on", where="measure_reconstruction", given=0)
    sums = _Sums(sae.d_sae, total / count, columns or {})
    for each in rows():
        piece = _piece(each)
        for start in range(0, len(piece.x), _ROWS):
            sums.add(sae, piece.rows(slice(start, start + _ROWS)))
    return sums.result()


def pool(layers: Mapping[str, Reconstruction]) -> Reconstruction:
    """One SAE at several layers: means over layers; dead is what fires at none of them.

    The interval is that of layers that err together, as those of the same tokens may.
    """
    each = list(layers.values())

    def mean(name: str) -> float:
        return sum(getattr(one, name) for one in each) / len(each)

    density = torch.stack([one.density for one in each]).mean(0)
    known = all(one.fvu_interval is not None for one in each)
    return Reconstruction(
        rows=sum(one.rows for one in each),
        l0=mean("l0"),
        fvu=mean("fvu"),
        fvu_interval=mean("fvu_interval") if known else None,
        cosine=mean("cosine"),
        norm_ratio=mean("norm_ratio"),
        dead_fraction=float((density == 0).double().mean()),
        density=density,
        documents=each[0].documents,
        fvu_by_site={site: one.fvu for site, one in layers.items()},
    )


def _piece(rows: Rows) -> Piece:
    if isinstance(rows, Piece):
        return rows
    x, target = (rows, rows) if isinstance(rows, Tensor) else rows
    return Piece(x, target)


class _Sums:
    """Float64 sums over rows."""

    def __init__(self, d_sae: int, mean: Tensor, columns: Mapping[str, slice]) -> None:
        self.mean, self.columns = mean, columns
        # squared error and squared deviation of each column
        self.by_column = mean.new_zeros(2, *mean.shape)
        self.fired = torch.zeros(d_sae, dtype=torch.int64, device=mean.device)
        self.rows = 0
        self.errors, self.variances = [mean.new_zeros(0)], [mean.new_zeros(0)]
        self.documents = [self.fired[:0]]
        self.documented = True
        self.cosine = self.in_norm = self.out_norm = 0.0
        self.directed = 0

    def add(self, sae: Reconstructor, piece: Piece) -> None:
        own = ROWS.share(len(piece.x))  # ranks that train together measure together
        x, target = piece.x[own], piece.target[own]
        self.documented &= piece.document is not None
        if not len(x):
            return
        if piece.document is not None:
            self.documents.append(piece.document[own].to(self.fired))
        codes = sae.encode_sparse(x).compact()
        x_hat = sae.decode(codes, like=x).double()
        exact = target.double()
        self.rows += len(x)
        self.fired += torch.bincount(codes.index, minlength=len(self.fired))
        # one float64 of each a row: what the interval needs, 16 bytes a row (24 with documents)
        error, deviation = (exact - x_hat).square(), (exact - self.mean).square()
        self.errors.append(error.sum(1))
        self.variances.append(deviation.sum(1))
        if self.columns:
            self.by_column += torch.stack([error.sum(0), deviation.sum(0)])
        norm_in, norm_out = exact.norm(dim=1), x_hat.norm(dim=1)
        self.in_norm += float(norm_in.sum())
        self.out_norm += float(norm_out.sum())
        directed = (norm_in > 0) & (norm_out > 0)
        cosine = (exact * x_hat).sum(1)[directed] / (norm_in * norm_out)[directed]
        self.cosine += float(cosine.sum())
        self.directed += int(directed.sum())

    def result(self) -> Reconstruction:
        self._of_all_ranks()
        error, variance = torch.cat(self.errors), torch.cat(self.variances)
        total = float(variance.sum())
        # (sum ||t||)^2 / rows is at most sum ||t||^2
        if not total > ROUNDING * self.in_norm**2 / self.rows:
            raise InputError(
                "all activations are equal, but for rounding, so FVU is undefined",
                where="evaluation",
            )
        fvu = float(error.sum()) / total
        documents = None
        if self.documented:
            unit = ROWS.gather(torch.cat(self.documents))
            error, variance = by_cluster(error, unit), by_cluster(variance, unit)
            documents = len(error)
        return Reconstruction(
            rows=self.rows,
            l0=float(self.fired.sum()) / self.rows,
            fvu=fvu,
            fvu_interval=half_width(error, variance),
            cosine=self.cosine / self.directed if self.directed else 0.0,
            norm_ratio=self.out_norm / self.in_norm if self.in_norm else 0.0,
            dead_fraction=float((self.fired == 0).double().mean()),
            density=self.fired.double() / self.rows,
            documents=documents,
            fvu_by_site={name: self._fvu_of(name) for name in self.columns},
        )

    def _of_all_ranks(self) -> None:
        self.errors, self.variances = (
            [ROWS.gather(torch.cat(each))] for each in (self.errors, self.variances)
        )
        self.by_column = ROWS.sum(self.by_column)
        self.fired = FEATURES.gather(ROWS.sum(self.fired))
        names = ("rows", "directed", "cosine", "in_norm", "out_norm")
        own = [float(getattr(self, name)) for name in names]
        sums = ROWS.sum(torch.tensor(own, dtype=torch.float64)).tolist()
        self.rows, self.directed = round(sums[0]), round(sums[1])
        self.cosine, self.in_norm, self.out_norm = sums[2:]

    def _fvu_of(self, site: str) -> float:
        error, deviation = self.by_column[:, self.columns[site]].sum(1).tolist()
        if deviation <= 0:
            raise InputError("all activations are equal, so FVU is undefined", where=site)
        return error / deviation
