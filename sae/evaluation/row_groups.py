"""Reconstruction of some rows alone: at each position, of each document, of rare tokens.

The FVU of a group of rows is their squared error over their squared deviation from the mean of all
rows; its L0 is the mean number of features active on them. Groups are

* positions in their sequence, in octaves: 1, 2 to 3, 4 to 7, ...;
* tokens by how common they are among the harvest's own tokens, in decades of their share;
* documents, of which only the spread is told, each counted once whatever its length.

An average hides what these show: an SAE may be good at the commonest tokens alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sae.distributed import ROWS
from sae.evaluation import metric_family
from sae.evaluation.intervals import half_width
from sae.evaluation.rows import Counted, EncodedRows, RowSums, Setting
from saescope.metrics import Metric

RARE = 1e-4
"""share of the harvest's tokens below which a token is rare"""
EARLY = 8
"""positions below this are early"""
_DECADES = 6
"""decades of token shares: the first takes all below 1e-6 and the last those from 1e-1 on"""
_DOCUMENTS = 1 << 32
"""more than there are documents: a group's number times this, and the document's, are one key"""
_QUANTILES = (0.1, 0.5, 0.9)


def _row(name: str, label: str, which: str, *, interval: bool, undefined: str) -> Metric:
    return Metric(
        name=name,
        label=label,
        better="lower",
        help=f"FVU {which}: squared error over squared deviation from the mean of all rows.",
        interval=interval,
        undefined=undefined,
    )


FVU_RARE = _row(
    "fvu_rare_tokens",
    "FVU rare tokens",
    "at tokens that are less than 1 in 10,000 of the harvest's",
    interval=True,
    undefined="no rare tokens",
)
FVU_EARLY = _row(
    "fvu_early",
    "FVU early positions",
    "at positions 1 to 7 of their sequence",
    interval=True,
    undefined="no early positions",
)
FVU_DOCUMENTS = _row(
    "fvu_document_p90",
    "FVU worst documents",
    "of the document that nine in ten are not worse than (the 90th percentile)",
    interval=False,
    undefined="documents are not known",
)


def octave(position: Tensor) -> Tensor:
    """Group of each position: 0 for 0, 1 for 1, 2 for 2 and 3, 3 for 4 to 7, ...

    >>> octave(torch.tensor([0, 1, 2, 3, 4, 7, 8])).tolist()
    [0, 1, 2, 2, 3, 3, 4]
    """
    return torch.frexp(position.double()).exponent.long()


def decade(share: Tensor) -> Tensor:
    """Group of each token's share: 0 below 1e-6, 1 below 1e-5, ..., 6 from 0.1 on.

    >>> decade(torch.tensor([1e-7, 1e-6, 5e-4, 0.1, 1.0], dtype=torch.float64)).tolist()
    [0, 1, 3, 6, 6]
    """
    edges = torch.tensor([10.0**-n for n in range(_DECADES, 0, -1)], dtype=torch.float64)
    return torch.bucketize(share, edges.to(share.device), right=True)


class Groups:
    """Sums over rows by group and document; what it keeps grows with those, not with rows."""

    def __init__(self) -> None:
        self.key = torch.zeros(0, dtype=torch.int64)
        self.sums = torch.zeros(0, 4, dtype=torch.float64)

    def add(self, group: Tensor, document: Tensor | None, columns: Tensor) -> None:
        """Add rows' columns float64 [rows, 4] to groups int64 [rows] of documents int64 [rows]."""
        key = group * _DOCUMENTS if document is None else group * _DOCUMENTS + document
        self._merge(torch.cat([self.key, key.cpu()]), torch.cat([self.sums, columns.cpu()]))

    def _merge(self, key: Tensor, sums: Tensor) -> None:
        self.key, inverse = key.unique(return_inverse=True)
        self.sums = sums.new_zeros(len(self.key), 4).index_add(0, inverse, sums)

    def of_all_ranks(self) -> None:
        """Take in what other ranks have added."""
        self._merge(ROWS.gather(self.key), ROWS.gather(self.sums))

    def table(self) -> dict[int, dict[str, Any]]:
        """Of each group its rows, L0, FVU and half of FVU's 95% interval."""
        group = self.key // _DOCUMENTS
        return {
            int(number): _summary(self.sums[group == number]) for number in group.unique().tolist()
        }

    def some(self, wanted: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The same of several groups taken together, those of which `wanted` is true."""
        key = (self.key % _DOCUMENTS)[wanted(self.key // _DOCUMENTS)]
        sums = self.sums[wanted(self.key // _DOCUMENTS)]
        found, inverse = key.unique(return_inverse=True)
        return _summary(sums.new_zeros(len(found), 4).index_add(0, inverse, sums))


def _summary(sums: Tensor) -> dict[str, Any]:
    """Of sums over each document [documents, 4]."""
    rows, error, deviation, active = sums.sum(0).tolist()
    defined = deviation > 0
    return {
        "rows": int(rows),
        "l0": active / rows if rows else None,
        "fvu": error / deviation if defined else None,
        "fvu_interval": half_width(sums[:, 1], sums[:, 2]) if defined else None,
    }


@metric_family("row_groups", needs="activations", metrics=(FVU_RARE, FVU_EARLY, FVU_DOCUMENTS))
class RowGroups(RowSums):
    """Sums by position, by how common the token is, and by document."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.positions, self.tokens, self.documents = Groups(), Groups(), Groups()

    def add(self, rows: EncodedRows) -> None:
        """Add some rows, to the groupings that are known of them."""
        given = rows.given
        columns = torch.stack(
            [
                torch.ones_like(rows.target[:, 0]),
                (rows.target - rows.x_hat).square().sum(1),
                (rows.target - self.setting.mean).square().sum(1),
                rows.codes.l0().double(),
            ],
            dim=1,
        )
        for groups, group in (
            (self.positions, None if given.position is None else octave(given.position)),
            (self.tokens, None if given.token_share is None else decade(given.token_share)),
            (self.documents, None if given.document is None else torch.zeros_like(given.document)),
        ):
            if group is not None:
                groups.add(group, given.document, columns)

    def values(self, counted: Counted) -> dict[str, Any]:
        """The metrics, and "by_position", "by_token_share" and "by_document" as tables."""
        for groups in (self.positions, self.tokens, self.documents):
            groups.of_all_ranks()
        early = self.positions.some(lambda group: group <= octave(torch.tensor(EARLY - 1)))
        rare = self.tokens.some(lambda group: group <= decade(torch.tensor(RARE / 2)))
        documents = self._spread()
        return {
            "fvu_rare_tokens": rare["fvu"],
            "fvu_rare_tokens_interval": rare["fvu_interval"],
            "fvu_early": early["fvu"],
            "fvu_early_interval": early["fvu_interval"],
            "fvu_document_p90": documents["fvu"][-1] if documents else None,
            "by_position": [
                {"from": 1 << group >> 1, "below": 1 << group, **row}
                for group, row in self.positions.table().items()
            ],
            "by_token_share": [
                {
                    "from": 10.0 ** (group - _DECADES - 1) if group else 0.0,
                    "below": 10.0 ** (group - _DECADES) if group < _DECADES else 1.0,
                    **row,
                }
                for group, row in self.tokens.table().items()
            ],
            "by_document": documents,
        }

    def _spread(self) -> dict[str, Any]:
        """Quantiles of FVU and L0 over the documents in which activations differ from the mean."""
        rows, error, deviation, active = self.documents.sums.unbind(1)
        varied = deviation > 0
        if not varied.any():
            return {}
        at = torch.tensor(_QUANTILES, dtype=torch.float64)
        return {
            "quantiles": list(_QUANTILES),
            "fvu": (error / deviation)[varied].quantile(at).tolist(),
            "l0": (active / rows)[varied].quantile(at).tolist(),
        }
