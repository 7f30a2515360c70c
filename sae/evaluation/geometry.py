"""How an SAE's directions lie: to each other, to its encoder, and to the activations.

* Decoder rows of features that mix what should be apart point the same way: the largest cosine
  that each has with another (the mean max cosine similarity of a dictionary with itself, Sharkey
  et al. 2022; Lawson et al. 2024), and the mean |cosine| of all pairs. The latter is smallest where
  an SAE's L0 is right (Chanin and Garriga-Alonso 2025, arXiv 2508.16560, section 4).
* The n-th decoder projection (there, first version): of the products of all decoder rows with all
  rows x - b_dec, sorted from the largest, the one at n times the number of rows. There it too is
  smallest near the L0 that the data have; on our planted data it is not, and decoder similarity
  is. n is 3/8 of the features, below the half that it has to stay below.
* The cosine of each feature's encoder and decoder; CKNNA of activations and codes
  (`sae.evaluation.cknna`).

A diagnosis of L0 needs SAEs of several L0 that are otherwise alike: one value alone says nothing.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sae.core.base import SparseAutoencoder
from sae.distributed import ROWS
from sae.evaluation import metric_family
from sae.evaluation.cknna import cknna
from sae.evaluation.rows import Counted, EncodedRows, RowSums, Setting
from saescope.errors import InputError
from saescope.metrics import Metric

NEIGHBOURS = 10
ALIGNED_ROWS, QUICK_ALIGNED_ROWS = 1024, 512
"""first rows that CKNNA is of"""
PROJECTED_ROWS, QUICK_PROJECTED_ROWS = 4096, 1024
"""first rows that are projected on the decoder"""
PART = 0.375
"""n of the n-th decoder projection, over d_sae"""
_BINS = 1 << 16
_BLOCK = 2048
_CHANIN = "Chanin and Garriga-Alonso 2025 (arXiv 2508.16560)"

DECODER_MAX_COSINE = Metric(
    name="decoder_max_cosine",
    label="nearest decoder",
    better="neither",
    help="Mean over features of the largest cosine of its decoder direction with another "
    "feature's. Near 1: features are there twice.",
    source="MMCS of Sharkey et al. 2022, of a dictionary with itself",
    undefined="there is one feature",
)
DECODER_SIMILARITY = Metric(
    name="decoder_similarity",
    label="decoder similarity",
    better="neither",
    help="Mean |cosine| of all pairs of decoder directions. Of SAEs alike but for their L0 it is "
    "smallest where L0 is that of the data.",
    source=_CHANIN,
    undefined="there is one feature",
)
NTH_PROJECTION = Metric(
    name="nth_decoder_projection",
    label="n-th projection",
    better="neither",
    help="Of the products of all decoder directions with all activations, sorted from the largest, "
    "the one at 3/8 of them, over the activations' root mean square. Said to be smallest near the "
    "L0 of the data; on planted data decoder similarity tells it, and this does not.",
    source=f"{_CHANIN}, first version",
)
ENCODER_DECODER = Metric(
    name="encoder_decoder_cosine",
    label="encoder-decoder",
    better="neither",
    help="Mean over features of the cosine of its encoder and decoder direction.",
    source="SAEBench (Karvonen et al. 2025)",
    undefined="encoder and decoder are of different spaces",
)
CKNNA = Metric(
    name="cknna",
    label="CKNNA",
    better="higher",
    help="Whether activations and their codes have the same nearest neighbours, of 10; 1 if they "
    "do.",
    source="Huh et al. 2024, appendix A",
    undefined="fewer than 11 rows, or codes that are all alike",
)


def decoder_cosines(directions: Tensor) -> tuple[float, float] | None:
    """Mean largest cosine with another, and mean |cosine| of all pairs, of rows [d_sae, d].

    None for fewer than two. Nothing of size [d_sae, d_sae] is held.

    >>> largest, mean = decoder_cosines(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]))
    >>> round(largest, 4), round(mean, 4)
    (0.7071, 0.4714)
    """
    count = len(directions)
    if count < 2:
        return None
    unit = functional.normalize(directions.detach().float(), dim=1)
    largest = total = 0.0
    for first in range(0, count, _BLOCK):
        cosine = unit[first : first + _BLOCK] @ unit.T
        itself = torch.arange(len(cosine))
        cosine[itself, itself + first] = 0.0
        total += float(cosine.abs().sum(dtype=torch.float64))
        cosine[itself, itself + first] = -torch.inf
        largest += float(cosine.amax(1).sum(dtype=torch.float64))
    return largest / count, total / (count * (count - 1))


def nth_projection(x: Tensor, directions: Tensor, part: float) -> float:
    """The value that a part of the products of rows [n, d] and directions [d_sae, d] is above.

    From a histogram of 65,536 bins, within which it is interpolated: the products of many rows with
    many directions are never held.
    """
    span = float(x.norm(dim=1).max() * directions.norm(dim=1).max()) or 1.0
    counts = torch.zeros(_BINS, dtype=torch.int64)
    for each in x.float().split(256):
        product = (each @ directions.float().T).clamp(-span, span)
        counts += product.histc(_BINS, -span, span).cpu().long()
    wanted = (1 - part) * float(counts.sum())
    below = counts.cumsum(0).double()
    number = int(torch.searchsorted(below, wanted).clamp_max(_BINS - 1))
    within = (wanted - float(below[number] - counts[number])) / max(1, int(counts[number]))
    return -span + (number + within) * 2 * span / _BINS


@metric_family(
    "geometry",
    needs="activations",
    metrics=(DECODER_MAX_COSINE, DECODER_SIMILARITY, NTH_PROJECTION, ENCODER_DECODER, CKNNA),
    protocol={
        "neighbours": NEIGHBOURS,
        "aligned_rows": ALIGNED_ROWS,
        "projected_rows": PROJECTED_ROWS,
        "part": PART,
    },
    quick={"aligned_rows": QUICK_ALIGNED_ROWS, "projected_rows": QUICK_PROJECTED_ROWS},
    suite="geometry",
)
class Geometry(RowSums):
    """What is said of the weights, and of the first held-out rows."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        if not isinstance(setting.sae, SparseAutoencoder):
            raise InputError("needs an SAE with weights", where="geometry", given=setting.sae)
        self.sae = setting.sae
        self.aligned_rows = QUICK_ALIGNED_ROWS if setting.quick else ALIGNED_ROWS
        self.projected_rows = QUICK_PROJECTED_ROWS if setting.quick else PROJECTED_ROWS
        directions = self.sae.decoder_directions().detach().float()
        self.unit = functional.normalize(directions, dim=1)
        self.centred: list[Tensor] = []
        self.x: list[Tensor] = []
        self.codes: list[Tensor] = []

    def _constant(self) -> Tensor:
        """What is reconstructed where no feature fires, [d_out], in the model's units.

        The mean, where that is another for every row (a scale of the row's own).
        """
        if self.sae.normaliser_out.kind == "standardised":
            return self.setting.mean
        return self.sae.normaliser_out.invert(self.sae.b_dec.detach())

    def add(self, rows: EncodedRows) -> None:
        """Keep the first rows: what is projected, and activations with their codes."""
        left = self.projected_rows // ROWS.size - sum(map(len, self.centred))
        if left > 0:
            self.centred.append((rows.target[:left] - self._constant()).float())
        left = self.aligned_rows // ROWS.size - sum(map(len, self.x))
        if left > 0:
            self.x.append(rows.given.x[:left])
            self.codes.append(rows.codes.dense()[:left])

    def values(self, counted: Counted) -> dict[str, Any]:
        """The metrics by name."""
        del counted
        pair = decoder_cosines(self.unit)
        y = ROWS.gather(torch.cat(self.centred))
        root = float(y.double().square().sum(1).mean().sqrt())
        cosine = self.sae.feature_columns().get("encoder_decoder_cosine")
        x, codes = ROWS.gather(torch.cat(self.x)), ROWS.gather(torch.cat(self.codes))
        centred = x.double() - x.double().mean(0)
        return {
            "decoder_max_cosine": pair and pair[0],
            "decoder_similarity": pair and pair[1],
            "nth_decoder_projection": nth_projection(y, self.unit, PART) / root if root else None,
            "encoder_decoder_cosine": None if cosine is None else float(cosine.detach().mean()),
            "cknna": cknna(centred, codes, neighbours=NEIGHBOURS) if len(x) > NEIGHBOURS else None,
        }
