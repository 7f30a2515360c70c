"""Whether reconstructions are too short: their relative bias, and their length over the row's.

With t what is to be reconstructed and x_hat its reconstruction, over all rows,

    gamma    = sum ||x_hat||^2 / sum <x_hat, t>     (Rajamanoharan et al. 2024, equation 10)
    l2 ratio = mean over rows of ||x_hat|| / ||t||                  (SAEBench, Karvonen et al. 2025)

1 / gamma is the factor that would make the reconstructions best: below 1 they are too short. gamma
is one ratio of sums, not a mean of batches' ratios, which would depend on the size of batches.
"""

from typing import Any

import torch

from sae.distributed import ROWS
from sae.evaluation import metric_family
from sae.evaluation.intervals import by_cluster, half_width
from sae.evaluation.rows import Counted, EncodedRows, RowSums, Setting
from saescope.metrics import Metric

RECONSTRUCTION_BIAS = Metric(
    name="reconstruction_bias",
    label="reconstruction bias",
    better="neither",
    help="Mean square of the reconstructions over their mean product with the activations. 1 is "
    "without bias; below 1 the reconstructions are too short, by that factor.",
    source="Rajamanoharan et al. 2024 (Gated SAEs), equation 10",
    interval=True,
    undefined="reconstructions have no part along the activations",
)
L2_RATIO = Metric(
    name="l2_ratio",
    label="L2 ratio",
    better="neither",
    help="Mean over rows of the reconstruction's length over the activation's; below 1 is "
    "shrinkage. Every row counts alike, where in the norm ratio long ones count more.",
    source="SAEBench (Karvonen et al. 2025)",
    interval=True,
    undefined="all activations are 0",
)


@metric_family(
    "shrinkage",
    needs="activations",
    metrics=(RECONSTRUCTION_BIAS, L2_RATIO),
    section="reconstruction",
)
class Shrinkage(RowSums):
    """Squares, products and ratios of each row: four float64 a row, for the intervals."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.rows = [setting.mean.new_zeros(0, 4)]

    def add(self, rows: EncodedRows) -> None:
        """Add some rows; those that are 0 have no ratio."""
        norm = rows.target.norm(dim=1)
        directed = norm > 0
        ratio = torch.where(directed, rows.x_hat.norm(dim=1) / norm.clamp_min(1e-300), 0.0)
        columns = (
            rows.x_hat.square().sum(1),
            (rows.x_hat * rows.target).sum(1),
            ratio,
            directed.double(),
        )
        self.rows.append(torch.stack(columns, dim=1))

    def values(self, counted: Counted) -> dict[str, Any]:
        """Both metrics with their intervals; None where the denominator is not positive."""
        square, product, ratio, directed = ROWS.gather(torch.cat(self.rows)).unbind(1)
        found: dict[str, Any] = {}
        for name, above, below in (
            ("reconstruction_bias", square, product),
            ("l2_ratio", ratio, directed),
        ):
            if counted.document is not None:
                above, below = (by_cluster(each, counted.document) for each in (above, below))
            defined = float(below.sum()) > 0
            found[name] = float(above.sum() / below.sum()) if defined else None
            found[f"{name}_interval"] = half_width(above, below) if defined else None
        return found
