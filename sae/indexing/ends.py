"""The two ends of a signed SAE's features, each as a feature of its own.

AbsTopK (arXiv 2510.00404) keeps the features of largest magnitude, so a feature has two
meanings, one for each sign. A feature store holds activations above zero: of an SAE with d_sae
signed features it has 2 * d_sae, n for the positive end of feature n, and d_sae + n for its
negative end, with the magnitude as its activation and the opposite decoder direction.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.core.base import SparseAutoencoder
from sae.kernels.codes import SparseCodes
from sae.steering.text_features import TextFeatures


class BothEnds:
    """A signed SAE with its 2 * d_sae ends as features, as an index reads it."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        self._sae = sae
        self.d_sae = 2 * sae.d_sae

    @property
    def W_dec(self) -> Tensor:
        """What each end writes, [2 * d_sae, d_out]."""
        return torch.cat([self._sae.W_dec, -self._sae.W_dec])

    def decoder_directions(self) -> Tensor:
        """As `SparseAutoencoder.decoder_directions`, of each end."""
        directions = self._sae.decoder_directions()
        return torch.cat([directions, -directions])

    def feature_columns(self) -> dict[str, Tensor]:
        """As `SparseAutoencoder.feature_columns`: both ends have those of their feature."""
        return {name: torch.cat([x, x]) for name, x in self._sae.feature_columns().items()}

    def encode_sparse(self, x: Tensor) -> SparseCodes:
        """Codes of x [batch, d_in], of the ends: all above zero."""
        codes = self._sae.encode_sparse(x).compact()
        index = codes.index + self._sae.d_sae * (codes.value < 0)
        return SparseCodes(codes.row_ptr, index, codes.value.abs(), self.d_sae)


Indexed = SparseAutoencoder | BothEnds


def indexed(sae: SparseAutoencoder) -> Indexed:
    """An SAE as an index reads it: one whose activations are signed with both ends as features."""
    return BothEnds(sae) if sae.signed else sae


def by_ends(found: TextFeatures, d_sae: int) -> TextFeatures:
    """A text's features with the number of the end that fires; d_sae is that of the SAE."""
    negative = found.activation < 0
    fields: dict[str, Any] = {
        **vars(found),
        "feature": found.feature + d_sae * negative.astype(np.int32),
        "activation": np.abs(found.activation),
    }
    return TextFeatures(**fields)


def of_both_ends(found: TextFeatures, d_sae: int) -> TextFeatures:
    """The inverse of `by_ends`: features of the SAE, with activations of either sign."""
    negative = found.feature >= d_sae
    fields: dict[str, Any] = {
        **vars(found),
        "feature": found.feature - d_sae * negative.astype(np.int32),
        "activation": np.where(negative, -found.activation, found.activation),
    }
    return TextFeatures(**fields)


def feature_and_sign(number: int, d_sae: int | None) -> tuple[int, int]:
    """The feature and the sign of an end; d_sae is that of the signed SAE, None of another.

    >>> feature_and_sign(12, 8), feature_and_sign(3, 8), feature_and_sign(12, None)
    ((4, -1), (3, 1), (12, 1))
    """
    if d_sae is None or number < d_sae:
        return number, 1
    return number - d_sae, -1
