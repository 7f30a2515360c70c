"""Model diffing: which features of a crosscoder over two models are of one of them alone.

A crosscoder reads the activations of two models (a base model and its fine-tuned version, say, or
two checkpoints) on the same text side by side. A feature whose decoder is near zero in one model
looks exclusive to the other, but sparsity alone produces such features. Latent scaling tells them
apart: it measures how much of a feature the first model's activations contain after all.

Minder et al. 2025 (arXiv:2504.02922), "Robustly identifying concepts introduced during chat
fine-tuning using crosscoders", section 3.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from sae.architectures.crosscoder import Crosscoder
from sae.data.placement import released
from saescope.errors import InputError, check_range

Class = Literal["only_a", "only_b", "shared", "not_only_a", "not_only_b", "other", "silent"]
"""what a feature is: of one model alone, by its decoder and by latent scaling; written to both
alike; written to one alone although the other has it too (not_only); between these; or never firing
on enough rows to tell"""
CLASSES: tuple[Class, ...] = get_args(Class)
SHARED = 0.1
"""norm_difference of a shared feature is within this of 1/2 (Lindsey et al. 2024)"""


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """From where on a feature counts as of one model alone; the values are the paper's."""

    least_norm_difference: float = 0.9
    """least norm_difference of a feature of B alone (for one of A alone, 1 minus it is the most)"""
    most_error: float = 0.2
    """most that the ratio of the errors may be, in absolute value"""
    most_reconstruction: float = 0.5
    """the same of the reconstructions"""
    least_rows: int = 10
    """rows on which a feature must fire to be told"""

    def __post_init__(self) -> None:
        check_range("least_norm_difference", self.least_norm_difference, above=0.5, high=1)
        for name in ("most_error", "most_reconstruction"):
            check_range(name, getattr(self, name), low=0, high=1)
        check_range("least_rows", self.least_rows, low=1)


@dataclass(frozen=True, kw_only=True)
class ModelDiff:
    """What each feature of a crosscoder is to models A and B; all tensors are [d_sae].

    Ratios are NaN where a feature never fires, or is not written to the model that it is asked of.
    """

    counts: Tensor
    """rows on which it fires"""
    rows: int
    """rows that were looked at"""
    norm_difference: Tensor
    """(|d_B| - |d_A|) / max(|d_A|, |d_B|) / 2 + 1/2, of its decoder's parts: 0 is written to A
    alone, 1/2 to both alike, 1 to B alone"""
    error_ratio: Tensor
    """how much of what it writes to B is in A's reconstruction error, over how much is in B's, both
    taken without it: near 1 if A has it although the crosscoder does not write it (complete
    shrinkage)"""
    reconstruction_ratio: Tensor
    """the same of the reconstructions: near 1 if other features write it to A (latent
    decoupling)"""
    error_ratio_of_a: Tensor
    """`error_ratio` with the models swapped: of what it writes to A, in B over in A"""
    reconstruction_ratio_of_a: Tensor
    """`reconstruction_ratio` with the models swapped"""

    def exclusive_to_b(self, thresholds: Thresholds | None = None) -> Tensor:
        """Numbers of the features that only B has: A is not written to, and has little of it."""
        return self._numbers("only_b", thresholds)

    def exclusive_to_a(self, thresholds: Thresholds | None = None) -> Tensor:
        """Numbers of the features that only A has."""
        return self._numbers("only_a", thresholds)

    def _numbers(self, wanted: Class, thresholds: Thresholds | None) -> Tensor:
        found = self.classes(thresholds)
        return torch.tensor([n for n, each in enumerate(found) if each == wanted]).long()

    def classes(self, thresholds: Thresholds | None = None) -> list[Class]:
        """What each feature is."""
        limits = thresholds or Thresholds()
        norm, found = self.norm_difference, torch.full(self.counts.shape, CLASSES.index("other"))
        # comparisons with NaN are false: what cannot be told is not of one model alone
        in_b = (self.error_ratio_of_a.abs() <= limits.most_error) & (
            self.reconstruction_ratio_of_a.abs() <= limits.most_reconstruction
        )
        in_a = (self.error_ratio.abs() <= limits.most_error) & (
            self.reconstruction_ratio.abs() <= limits.most_reconstruction
        )
        written_to_b = norm >= limits.least_norm_difference
        written_to_a = norm <= 1 - limits.least_norm_difference
        for name, chosen in (
            ("shared", (norm - 0.5).abs() <= SHARED),
            ("only_b", written_to_b & in_a),
            ("not_only_b", written_to_b & ~in_a),
            ("only_a", written_to_a & in_b),
            ("not_only_a", written_to_a & ~in_b),
            ("silent", self.counts < limits.least_rows),
        ):
            found[chosen] = CLASSES.index(name)
        return [CLASSES[number] for number in found.tolist()]


@torch.inference_mode()
def diff_models(sae: Crosscoder, rows: Iterable[Tensor]) -> ModelDiff:
    """Latent scaling of every feature, from rows [n, d_a + d_b] of both models side by side.

    The scale at which f_j d_j, feature j's share of B's reconstruction, fits activations y best is
    beta = sum_i f_ij (d_j . y_i) / sum_i f_ij^2 |d_j|^2, in closed form. It is taken for both
    models' errors without feature j, x - (x_hat - f_j d_j), and for both reconstructions; the
    ratios of A's to B's are `error_ratio` and `reconstruction_ratio`. The same is done with what
    each feature writes to A. All is in the models' own units, and reconstructions are without the
    decoder's bias, which is of no feature: where activations have a large mean it would decide the
    ratio.

    Raises InputError unless the crosscoder is of two sites of equal width, and features fire.
    """
    widths = sae.widths
    if len(widths) != 2 or widths[0] != widths[1]:
        raise InputError(
            "needs a crosscoder over two models' activations of one width",
            where="site_widths",
            given=widths,
        )
    placed = released(sae)
    d, decoder = widths[0], placed.W_dec.detach().double()
    bias = placed.b_dec.detach().double()
    parts = decoder[:, :d], decoder[:, d:]
    sums = decoder.new_zeros(2, 4, sae.d_sae)  # of what is written to A, and to B
    square, counts = decoder.new_zeros(sae.d_sae), torch.zeros(sae.d_sae, dtype=torch.int64)
    looked_at = 0
    for x in rows:
        codes = placed.encode_sparse(x).compact()
        counts += codes.counts()
        looked_at += len(x)
        written = placed.decode(codes).double()
        error, features = x.double() - written, written - bias
        ys = (error[:, :d], error[:, d:], features[:, :d], features[:, d:])
        row, value = codes.rows(), codes.value.double()
        square.index_add_(0, codes.index, value.square())
        for totals, part in zip(sums, parts, strict=True):
            direction = part[codes.index]
            for total, y in zip(totals, ys, strict=True):
                total.index_add_(0, codes.index, value * (direction * y[row]).sum(1))
    if not counts.any():
        raise InputError("no feature fires on any row", where="rows")
    norm_a, norm_b = (part.norm(dim=1) for part in parts)
    larger = torch.maximum(norm_a, norm_b)
    # beta's denominator is the same for A and B; each error without the feature has it in it
    across = square * (parts[0] * parts[1]).sum(1)
    own_a, own_b = square * norm_a.square(), square * norm_b.square()
    of_a, of_b = sums
    return ModelDiff(
        counts=counts,
        rows=looked_at,
        norm_difference=((norm_b - norm_a) / larger / 2 + 0.5),
        error_ratio=(of_b[0] + across) / (of_b[1] + own_b),
        reconstruction_ratio=of_b[2] / of_b[3],
        error_ratio_of_a=(of_a[1] + across) / (of_a[0] + own_a),
        reconstruction_ratio_of_a=of_a[3] / of_a[2],
    )
