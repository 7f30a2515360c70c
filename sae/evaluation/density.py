"""How often features fire: L0, and the shares of features that never do, or very often.

L0 is the mean number of features active on a row (Gao et al. 2024, section 2.1). A feature's
density is the part of the rows it fires on. Counts are int64: a float of 16 bits counts to 256.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sae.distributed import FEATURES, ROWS
from sae.evaluation import metric_family
from sae.evaluation.intervals import ratio
from sae.evaluation.rows import Counted, EncodedRows, RowSums, Setting
from saescope.metrics import Metric, metric

DENSE = 0.1
"""density above which a feature is dense"""
_DECADES = range(-8, 1)
_PER_DECADE = 4
DENSE_FRACTION = Metric(
    name="dense_fraction",
    label="fires on over 10%",
    unit="of features",
    form=".2%",
    better="neither",
    help="Share of the features that fire on more than a tenth of the held-out activations.",
    source="Frequency over 10% of SAEBench (Karvonen et al. 2025)",
)


@metric_family(
    "density",
    needs="activations",
    metrics=(metric("l0"), metric("dead_fraction"), DENSE_FRACTION),
    section="reconstruction",
)
class Density(RowSums):
    """Counts of the rows that each feature fires on, and the L0 of each row for its interval."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.fired = torch.zeros(setting.d_sae, dtype=torch.int64, device=setting.mean.device)
        self.l0 = [setting.mean.new_zeros(0)]

    def add(self, rows: EncodedRows) -> None:
        self.fired += torch.bincount(rows.codes.index, minlength=len(self.fired))
        self.l0.append(rows.codes.l0().double())

    def values(self, counted: Counted) -> dict[str, Any]:
        """ "l0" with its interval, what is said of all densities, "density" float64 [d_sae]."""
        l0 = FEATURES.sum(ROWS.gather(torch.cat(self.l0)))
        fired = FEATURES.gather(ROWS.sum(self.fired))
        density = fired.double() / counted.rows
        return {
            "l0": float(fired.sum()) / counted.rows,
            "l0_interval": ratio(l0, torch.ones_like(l0), counted.document)[1],
            **_of_all(density),
            "density": density,
        }

    @classmethod
    def pool(cls, sites: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """L0 and density are means over layers; dead is what fires at none of them."""
        density = torch.stack([one["density"] for one in sites.values()]).mean(0)
        return {**super().pool(sites), **_of_all(density), "density": density}


def _of_all(density: Tensor) -> dict[str, Any]:
    return {
        "dead_fraction": float((density == 0).double().mean()),
        "dense_fraction": float((density > DENSE).double().mean()),
        "density_histogram": density_histogram(density),
    }


def density_histogram(density: Tensor) -> dict[str, list[float]]:
    """How many features have a density in each quarter of a decade, from 1e-8 to 1.

    "log10_edges" [bins + 1] and "features" [bins]; bins are closed on the right. Features that
    never fire are in none, and those of a lower density are in the first.

    >>> found = density_histogram(torch.tensor([0.0, 1e-9, 0.01, 0.011, 1.0]))
    >>> sum(found["features"]), found["features"][0], found["features"][-1]
    (4, 1, 1)
    """
    bins = _PER_DECADE * (len(_DECADES) - 1)
    edges = torch.linspace(_DECADES[0], _DECADES[-1], bins + 1, dtype=torch.float64)
    number = torch.bucketize(density[density > 0].double().log10().cpu(), edges) - 1
    features = number.clamp(0, bins - 1).bincount(minlength=bins)
    return {"log10_edges": edges.tolist(), "features": features.tolist()}
