"""Reconstruction on activations: FVU, cosine, shrinkage.

FVU = sum ||t - x_hat||^2 / sum ||t - mu||^2 with t what is to be reconstructed (x itself, or for a
transcoder the activation of its output site) and mu the mean of t over all rows evaluated: the
identity gives 0, predicting the mean gives 1 (Gao et al. 2024, section 2.1).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sae.core.normaliser import ROUNDING
from sae.distributed import ROWS
from sae.evaluation import metric_family
from sae.evaluation.density import Density
from sae.evaluation.intervals import by_cluster, half_width, ratio
from sae.evaluation.rows import (
    Counted,
    EncodedRows,
    Reconstructor,
    Rows,
    RowSums,
    Setting,
    pass_over,
)
from saescope.errors import InputError
from saescope.metrics import metric


class FvuSums:
    """Squared error and squared deviation from `mean` of each row, for FVU and its interval.

    Two float64 a row: what the interval needs. `columns` are the sites of a target of several.
    """

    def __init__(self, mean: Tensor, columns: Mapping[str, slice] | None = None) -> None:
        self.mean, self.columns = mean, columns or {}
        self.by_column = mean.new_zeros(2, *mean.shape)
        self.errors, self.deviations = [mean.new_zeros(0)], [mean.new_zeros(0)]

    def add(self, target: Tensor, x_hat: Tensor) -> None:
        """Add rows float64 [rows, d_out] and their reconstructions."""
        error, deviation = (target - x_hat).square(), (target - self.mean).square()
        self.errors.append(error.sum(1))
        self.deviations.append(deviation.sum(1))
        if self.columns:
            self.by_column += torch.stack([error.sum(0), deviation.sum(0)])

    def of_all_ranks(self) -> None:
        """Take in the rows that other ranks have added."""
        self.errors, self.deviations = (
            [ROWS.gather(torch.cat(each))] for each in (self.errors, self.deviations)
        )
        self.by_column = ROWS.sum(self.by_column)

    def fvu(
        self, document: Tensor | None = None, *, least: float = 0.0, where: str = "evaluation"
    ) -> tuple[float, float | None]:
        """FVU, and half of its 95% interval with documents int64 [rows] as the unit, or rows.

        Raises InputError if the rows' variance is not above `least`: FVU is undefined then.
        """
        error, deviation = torch.cat(self.errors), torch.cat(self.deviations)
        total = float(deviation.sum())
        if not total > least:
            raise InputError(
                "all rows are equal, but for rounding, so FVU is undefined", where=where
            )
        fvu = float(error.sum()) / total
        if document is not None:
            error, deviation = by_cluster(error, document), by_cluster(deviation, document)
        return fvu, half_width(error, deviation)

    def by_site(self) -> dict[str, float]:
        """FVU of each site alone; InputError if a site's rows are all equal."""
        return {site: self._of_site(site) for site in self.columns}

    def _of_site(self, site: str) -> float:
        error, deviation = self.by_column[:, self.columns[site]].sum(1).tolist()
        if deviation <= 0:
            raise InputError("all rows are equal, so FVU is undefined", where=site)
        return error / deviation


@metric_family(
    "reconstruction",
    needs="activations",
    metrics=(metric("fvu"), metric("cosine"), metric("norm_ratio")),
)
class Fidelity(RowSums):
    """FVU, the mean cosine of t and x_hat, and sum ||x_hat|| / sum ||t||, below 1 for shrinkage.

    The cosine is over rows where neither norm is zero, and 0 if there are none.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.squares = FvuSums(setting.mean, setting.columns)
        self.rows = [setting.mean.new_zeros(0, 4)]

    def add(self, rows: EncodedRows) -> None:
        target, x_hat = rows.target, rows.x_hat
        self.squares.add(target, x_hat)
        norm_in, norm_out = target.norm(dim=1), x_hat.norm(dim=1)
        directed = (norm_in > 0) & (norm_out > 0)
        product = (target * x_hat).sum(1) / (norm_in * norm_out).clamp_min(1e-300)
        cosine = torch.where(directed, product, 0.0)
        self.rows.append(torch.stack([cosine, directed.double(), norm_in, norm_out], dim=1))

    def values(self, counted: Counted) -> dict[str, Any]:
        """FVU, cosine and norm ratio with their intervals, and "fvu_by_site"."""
        self.squares.of_all_ranks()
        cosine, directed, norm_in, norm_out = ROWS.gather(torch.cat(self.rows)).unbind(1)
        # (sum ||t||)^2 / rows is at most sum ||t||^2
        least = ROUNDING * float(norm_in.sum()) ** 2 / counted.rows
        fvu, interval = self.squares.fvu(counted.document, least=least)
        mean_cosine, cosine_interval = ratio(cosine, directed, counted.document)
        norm_ratio, norm_interval = ratio(norm_out, norm_in, counted.document)
        return {
            "fvu": fvu,
            "fvu_interval": interval,
            "cosine": mean_cosine or 0.0,
            "cosine_interval": cosine_interval,
            "norm_ratio": norm_ratio or 0.0,
            "norm_ratio_interval": norm_interval,
            "fvu_by_site": self.squares.by_site(),
        }

    @classmethod
    def pool(cls, sites: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Means over layers, and each layer's FVU."""
        by_site = {site: one["fvu"] for site, one in sites.items()}
        return {**super().pool(sites), "fvu_by_site": by_site}


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
    dense_fraction: float
    """features that fire on more than a tenth of the rows, over d_sae"""
    density_histogram: dict[str, list[float]]
    """how many features have which density (`sae.evaluation.density.density_histogram`)"""
    density: Tensor
    """float64 [d_sae], part of the rows each feature fires on"""
    documents: int | None = None
    """number of documents; None where they are not known, and rows count as independent"""
    l0_interval: float | None = None
    """half width of its 95% interval, as those below"""
    cosine_interval: float | None = None
    norm_ratio_interval: float | None = None
    fvu_by_site: dict[str, float] = field(default_factory=dict)
    """FVU of each site, where there are several: of a crosscoder's columns, of a layer's rows"""


def measure_reconstruction(
    sae: Reconstructor,
    rows: Callable[[], Iterable[Rows]],
    *,
    columns: Mapping[str, slice] | None = None,
) -> Reconstruction:
    """Measure reconstruction and density on activations, given as fresh iterators (read twice).

    Args:
        rows: pieces x [rows, d_in]; or pairs of it and the target [rows, d_out], of a transcoder;
            or these with each row's document, whose rows are not independent of each other.
        columns: where each site stands in the target, for a crosscoder's FVU at each.

    Raises InputError if there are no rows, if they are all equal, or if some are not finite.
    """
    counted, sums = pass_over(sae, rows, (Fidelity, Density), columns)
    values = [one.values(counted) for one in sums]
    return Reconstruction(rows=counted.rows, documents=counted.documents, **values[0], **values[1])


def pool(layers: Mapping[str, Reconstruction]) -> Reconstruction:
    """One SAE at several layers: means over layers; dead is what fires at none of them."""
    each = list(layers.values())
    values = {site: vars(one) for site, one in layers.items()}
    return Reconstruction(
        **{
            **Fidelity.pool(values),
            **Density.pool(values),
            "rows": sum(one.rows for one in each),
            "documents": each[0].documents,
        }
    )
