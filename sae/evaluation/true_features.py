"""Scores of an SAE against the true features of synthetic rows (SynthSAEBench).

Definitions are those of Chanin and Garriga-Alonso 2026 (arXiv 2602.14687), and of SAELens'
`eval_sae_on_synthetic_data`: each latent of the SAE stands for the true feature with which its
decoder row has the largest |cos|, and is judged as a detector of that feature firing. Sums are
float64, and nothing of size [rows, features] exists.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sae.core.finite import check_rows
from sae.evaluation.recovery import best_assignment, cosines
from sae.evaluation.rows import Piece, Reconstructor, encoded
from sae.kernels.codes import SparseCodes
from sae.synthetic.drawing import DrawnRows
from saescope.errors import InputError
from saescope.metrics import Metric, metric

_SOURCE = "Chanin and Garriga-Alonso 2026"
_LEAST_NORM = 1e-6
"""of a row that counts for shrinkage"""

_ROWS = (
    Metric(
        name="f1",
        label="F1",
        better="higher",
        help="Mean over latents of 2 precision recall / (precision + recall); 0 where undefined.",
        source=_SOURCE,
    ),
    Metric(
        name="mcc",
        label="MCC",
        better="higher",
        help="Mean |cos| of decoder rows and true directions, matched one to one at their best.",
        source="Song et al. 2025, arXiv 2505.20254",
    ),
    Metric(
        name="precision",
        label="precision",
        better="higher",
        help="Of the rows a latent fires on, those on which its true feature does; mean.",
        source=_SOURCE,
    ),
    Metric(
        name="recall",
        label="recall",
        better="higher",
        help="Of the rows on which a latent's true feature fires, those it fires on; mean.",
        source=_SOURCE,
    ),
    Metric(
        name="uniqueness",
        label="uniqueness",
        better="higher",
        help="Different true features that latents stand for, over the number of latents.",
        source=_SOURCE,
    ),
    Metric(
        name="shrinkage",
        label="shrinkage",
        better="neither",
        help="Mean over rows of the reconstruction's norm over the row's; below 1 it is too small.",
        source=_SOURCE,
    ),
    Metric(
        name="explained_variance",
        label="variance explained",
        better="higher",
        help="1 - FVU: of the rows' variance, what the reconstruction accounts for.",
        source=_SOURCE,
    ),
    Metric(
        name="dead_latents",
        label="dead",
        unit="latents",
        form=".0f",
        better="lower",
        help="Latents that fire on none of the rows.",
        source=_SOURCE,
    ),
    Metric(
        name="true_l0",
        label="true L0",
        unit="features a row",
        form=".2f",
        better="neither",
        help="True features that fire on a row, on average.",
        source=_SOURCE,
    ),
)
LABELS = {row.name: row for row in (metric("l0"), *_ROWS)}
"""how each score is called and written; no other command measures them"""


@dataclass(frozen=True, kw_only=True)
class TrueFeatureScores:
    """What `score_true_features` found."""

    rows: int
    """rows scored on"""
    true_l0: float
    """mean number of true features that fire on a row"""
    l0: float
    """mean number of latents that fire on a row"""
    dead_latents: int
    """latents that fire on none of the rows"""
    shrinkage: float
    """mean of ||x_hat|| / ||x||, over rows that are not 0"""
    explained_variance: float
    """1 - sum ||x - x_hat||^2 / sum ||x - mean||^2"""
    mcc: float
    """mean |cos| of latents and true features in their best one-to-one matching"""
    uniqueness: float
    """different true features that latents stand for, over the number of latents"""
    precision: float
    """mean over latents; 0 for one that never fires"""
    recall: float
    """mean over latents; 0 for one whose feature never fires"""
    f1: float
    """mean over latents; 0 for one without precision and recall"""
    accuracy: float
    """mean over latents of the part of the rows on which it and its feature agree"""


@torch.no_grad()
def score_true_features(
    sae: Reconstructor, dictionary: Tensor, directions: Tensor, rows: Iterable[DrawnRows]
) -> TrueFeatureScores:
    """Score an SAE on rows whose true features are known.

    Args:
        dictionary: the SAE's decoder rows [d_sae, d_in], of any scale.
        directions: the true directions [features, d_in].
        rows: pieces of rows with their true codes.

    Raises InputError if there are no rows, if all are equal, or if some are not finite.
    """
    cosine = cosines(dictionary, directions).abs()
    matched = best_assignment(cosine)
    served = matched >= 0
    detected = Detection(cosine.argmax(1), len(directions))
    fit = _Fit()
    for x, true in rows:
        check_rows(x, "rows")
        found = encoded(sae, Piece(x, x))
        fit.add(found.target, found.x_hat)
        detected.add(found.codes, true)
    if not fit.rows:
        raise InputError("there are no rows to score on", where="score_true_features")
    return TrueFeatureScores(
        rows=fit.rows,
        true_l0=float(detected.truths.sum()) / fit.rows,
        l0=float(detected.fired.sum()) / fit.rows,
        dead_latents=int((detected.fired == 0).sum()),
        shrinkage=fit.shrinkage(),
        explained_variance=fit.explained_variance(),
        mcc=float(cosine[served, matched[served]].mean()),
        uniqueness=len(detected.stands_for.unique()) / len(dictionary),
        **{name: float(each.mean()) for name, each in detected.by_latent(fit.rows).items()},
    )


class Detection:
    """Counts of when each latent fires and when its true feature does."""

    def __init__(self, stands_for: Tensor, features: int) -> None:
        """Args: stands_for is the true feature of each latent, int64 [d_sae]."""
        self.stands_for = stands_for
        self.fired = torch.zeros_like(stands_for)
        """rows on which each latent fires"""
        self.both = torch.zeros_like(stands_for)
        """rows on which its true feature fires, too"""
        self.truths = stands_for.new_zeros(features)
        """rows on which each true feature fires"""

    def add(self, found: SparseCodes, true: SparseCodes) -> None:
        """Add the latents and the true features of some rows."""
        self.fired += found.counts()
        self.truths += true.counts()
        # ascending: codes are in the order of rows, and of features in a row
        there = true.flat()
        wanted = found.rows() * true.d_sae + self.stands_for[found.index]
        at = torch.searchsorted(there, wanted).clamp_max(max(0, len(there) - 1))
        hit = there[at] == wanted if len(there) else torch.zeros_like(wanted, dtype=torch.bool)
        self.both += torch.bincount(found.index[hit], minlength=len(self.fired))

    def by_latent(self, rows: int) -> dict[str, Tensor]:
        """ "precision", "recall", "f1", "accuracy" of each latent, float64 [d_sae]."""
        both, fired = self.both.double(), self.fired.double()
        true = self.truths[self.stands_for].double()
        precision, recall = _over(both, fired), _over(both, true)
        return {
            "precision": precision,
            "recall": recall,
            "f1": _over(2 * precision * recall, precision + recall),
            "accuracy": 1 - (fired + true - 2 * both) / rows,
        }


def _over(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, 0 where whole is 0."""
    return torch.where(whole > 0, part / whole.clamp_min(1e-300), 0.0)


class _Fit:
    """Sums over rows and their reconstructions."""

    def __init__(self) -> None:
        self.rows = self.not_zero = 0
        self.error = self.square = self.ratio = 0.0
        self.total: Tensor | float = 0.0

    def add(self, x: Tensor, x_hat: Tensor) -> None:
        """Add rows float64 [rows, d_in] and their reconstructions."""
        self.rows += len(x)
        self.total = self.total + x.sum(0)
        self.square += float(x.square().sum())
        self.error += float((x - x_hat).square().sum())
        norm = x.norm(dim=1)
        some = norm > _LEAST_NORM
        self.not_zero += int(some.sum())
        self.ratio += float((x_hat.norm(dim=1)[some] / norm[some]).sum())

    def shrinkage(self) -> float:
        return self.ratio / self.not_zero if self.not_zero else 0.0

    def explained_variance(self) -> float:
        variance = self.square - float((torch.as_tensor(self.total).square() / self.rows).sum())
        if not variance > 1e-12 * self.square:
            raise InputError("all rows are equal", where="score_true_features")
        return 1 - self.error / variance
