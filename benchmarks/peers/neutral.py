"""A TopK dictionary as weights and arithmetic, in plain torch: every library's is evaluated as one.

f = ReLU(TopK((x - b_dec) W_enc + b_enc)),   x_hat = f W_dec + b_dec

All three libraries compute this at inference, once their scale is folded in.
"""

from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae.codes import SparseCodes
from saescope.errors import ArtefactError

TOLERANCE = 1e-5


class NeutralTopK:
    """A TopK dictionary in the model's units.

    W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in]; k features kept a row.
    """

    def __init__(
        self, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, *, k: int
    ) -> None:
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = W_enc, b_enc, W_dec, b_dec
        self.k, self.d_sae = k, len(W_dec)

    @classmethod
    def load(cls, path: Path, k: int) -> Self:
        """From a weights.npz."""
        with np.load(path) as stored:
            names = ("W_enc", "b_enc", "W_dec", "b_dec")
            return cls(*(torch.from_numpy(stored[name].copy()) for name in names), k=k)

    def encode_sparse(self, x: Tensor) -> SparseCodes:
        """Features of x [batch, d_in]."""
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        value, index = pre.topk(self.k, dim=-1, sorted=False)
        return SparseCodes.from_fixed(index, torch.relu(value), self.d_sae)

    def decode(self, codes: SparseCodes, like: Tensor | None = None) -> Tensor:
        """Reconstruction [batch, d_in]."""
        del like
        return codes.dense() @ self.W_dec + self.b_dec


def check_against_library(path: Path, k: int, x: Tensor) -> None:
    """That this arithmetic gives, on x [rows, d_in], what the library's own inference gave.

    Raises ArtefactError if features or reconstructions differ by more than 1e-5 of the largest.
    """
    neutral = NeutralTopK.load(path, k)
    codes = neutral.encode_sparse(x)
    with np.load(path) as stored:
        features = _difference(codes.dense().numpy(), stored["check_features"])
        reconstruction = _relative(neutral.decode(codes).numpy(), stored["check_reconstruction"])
    for what, difference in (("features", features), ("reconstructions", reconstruction)):
        if difference > TOLERANCE:
            raise ArtefactError(
                f"the evaluator's {what} differ from the library's own", where=str(path),
                given=f"{difference:.2g}", allowed=f"up to {TOLERANCE:g} of the largest",
            )  # fmt: skip


def _relative(ours: NDArray, theirs: NDArray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _difference(ours: NDArray, theirs: NDArray) -> float:
    """As `_relative`, but rounding may decide between equal candidates for a row's last place."""
    last = np.where(theirs > 0, theirs, np.inf).min(1, keepdims=True)
    swapped = (ours > 0) != (theirs > 0)
    kept = np.where(swapped, np.maximum(ours, theirs) - last, ours - theirs)
    return float(np.abs(kept).max() / np.abs(theirs).max())
