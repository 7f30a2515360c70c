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

import torch
from torch import Tensor

from sae.architectures.crosscoder import Crosscoder
from sae.data.placement import released
from saescope.errors import InputError, check_range


@dataclass(frozen=True, kw_only=True)
class ModelDiff:
    """What each feature of a crosscoder is to models A and B; all tensors are [d_sae]."""

    counts: Tensor
    """rows on which it fires"""
    norm_difference: Tensor
    """(|d_B| - |d_A|) / max(|d_A|, |d_B|) / 2 + 1/2, of its decoder's parts: 0 is written to A
    alone, 1/2 to both alike, 1 to B alone"""
    error_ratio: Tensor
    """how much of it is in A's reconstruction error, over how much is in B's without it: near 1 if
    A has it although the crosscoder does not write it (complete shrinkage). NaN if it never fires.
    """
    reconstruction_ratio: Tensor
    """how much of it is in A's reconstruction, over how much in B's: near 1 if other features write
    it to A (latent decoupling). NaN if it never fires."""

    def exclusive_to_b(
        self,
        *,
        least_norm_difference: float = 0.9,
        most_error: float = 0.2,
        most_reconstruction: float = 0.5,
    ) -> Tensor:
        """Numbers of the features that only B has: A is not written to, and has little of it."""
        for name, value in (
            ("least_norm_difference", least_norm_difference),
            ("most_error", most_error),
            ("most_reconstruction", most_reconstruction),
        ):
            check_range(name, value, low=0, high=1)
        # comparisons with NaN are false: a feature that never fires is in no list
        chosen = self.norm_difference >= least_norm_difference
        chosen &= self.error_ratio.abs() <= most_error
        chosen &= self.reconstruction_ratio.abs() <= most_reconstruction
        return chosen.nonzero()[:, 0]


@torch.inference_mode()
def diff_models(sae: Crosscoder, rows: Iterable[Tensor]) -> ModelDiff:
    """Latent scaling of every feature, from rows [n, d_a + d_b] of both models side by side.

    The scale at which f_j d_j, feature j's share of B's reconstruction, fits activations y best is
    beta = sum_i f_ij (d_j . y_i) / sum_i f_ij^2 |d_j|^2, in closed form. It is taken for both
    models' errors (B's without feature j) and for both reconstructions; the ratios of A's to B's
    are `error_ratio` and `reconstruction_ratio`. For what only A has, swap the models.

    Raises InputError unless the crosscoder is of two sites of equal width, and there are rows.
    """
    widths = sae.widths
    if len(widths) != 2 or widths[0] != widths[1]:
        raise InputError(
            "needs a crosscoder over two models' activations of one width",
            where="site_widths",
            given=widths,
        )
    placed = released(sae)
    d = widths[0]
    decoder = placed.W_dec.detach().double()
    of_a, of_b = decoder[:, :d], decoder[:, d:]
    sums = decoder.new_zeros(4, sae.d_sae)
    square, counts = decoder.new_zeros(sae.d_sae), torch.zeros(sae.d_sae, dtype=torch.int64)
    for x in rows:
        codes = placed.encode_sparse(x).compact()
        counts += codes.counts()
        reconstruction = placed.decode(codes).double()
        error = x.double() - reconstruction
        row, value = codes.rows(), codes.value.double()
        direction = of_b[codes.index]
        for total, y in zip(
            sums,
            (error[:, :d], error[:, d:], reconstruction[:, :d], reconstruction[:, d:]),
            strict=True,
        ):
            total.index_add_(0, codes.index, value * (direction * y[row]).sum(1))
        square.index_add_(0, codes.index, value.square() * direction.square().sum(1))
    if not counts.any():
        raise InputError("no feature fires on any row", where="rows")
    norm_a, norm_b = of_a.norm(dim=1), of_b.norm(dim=1)
    larger = torch.maximum(norm_a, norm_b)
    # beta's denominator is the same for A and B; B's error without a feature has the feature itself
    return ModelDiff(
        counts=counts,
        norm_difference=((norm_b - norm_a) / larger / 2 + 0.5),
        error_ratio=sums[0] / (sums[1] + square),
        reconstruction_ratio=sums[2] / sums[3],
    )
