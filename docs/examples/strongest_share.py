"""How much of a row's activation its strongest feature has: 1 where one feature says it all."""

from typing import Any

import torch

from sae.distributed import ROWS
from sae.evaluation import metric_family
from sae.evaluation.rows import Counted, EncodedRows, RowSums, Setting
from saescope.metrics import Metric

STRONGEST_SHARE = Metric(
    name="strongest_share",
    label="strongest share",
    form=".1%",
    better="neither",
    help="Mean over rows of the strongest activation over the sum of all.",
)


@metric_family("strongest_share", needs="activations", metrics=(STRONGEST_SHARE,))
class StrongestShare(RowSums):
    """Sum over rows of the strongest activation's share."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.total = torch.zeros((), dtype=torch.float64, device=setting.mean.device)

    def add(self, rows: EncodedRows) -> None:
        """Add some rows; one that has no feature counts as 0."""
        activations = rows.codes.dense().double()
        sums = activations.sum(1)
        self.total += (activations.amax(1)[sums > 0] / sums[sums > 0]).sum()

    def values(self, counted: Counted) -> dict[str, Any]:
        """The value, by the name that its row in the table has."""
        return {"strongest_share": float(ROWS.sum(self.total)) / counted.rows}
