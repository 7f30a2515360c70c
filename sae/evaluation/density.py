"""How often features fire: L0, and the share of features that never do.

L0 is the mean number of features active on a row (Gao et al. 2024, section 2.1). A feature's
density is the part of the rows it fires on.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sae.distributed import FEATURES, ROWS
from sae.evaluation import metric_family
from sae.evaluation.rows import Counted, EncodedRows, RowSums, Setting
from saescope.metrics import metric


@metric_family(
    "density",
    needs="activations",
    metrics=(metric("l0"), metric("dead_fraction")),
    section="reconstruction",
)
class Density(RowSums):
    """Counts of the rows that each feature fires on."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.fired = torch.zeros(setting.d_sae, dtype=torch.int64, device=setting.mean.device)

    def add(self, rows: EncodedRows) -> None:
        self.fired += torch.bincount(rows.codes.index, minlength=len(self.fired))

    def values(self, counted: Counted) -> dict[str, Any]:
        """ "l0", "dead_fraction", and "density" float64 [d_sae]."""
        fired = FEATURES.gather(ROWS.sum(self.fired))
        return {
            "l0": float(fired.sum()) / counted.rows,
            "dead_fraction": _dead_fraction(fired),
            "density": fired.double() / counted.rows,
        }

    @classmethod
    def pool(cls, sites: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """L0 and density are means over layers; dead is what fires at none of them."""
        density = torch.stack([one["density"] for one in sites.values()]).mean(0)
        return {
            **super().pool(sites),
            "dead_fraction": _dead_fraction(density),
            "density": density,
        }


def _dead_fraction(fired: Tensor) -> float:
    return float((fired == 0).double().mean())
