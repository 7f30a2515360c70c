"""What a backend of sparse kernels provides: forward operations alone, no gradients.

Shapes: x, rows [batch, d]; W [d_sae, d], one feature a row, contiguous; b [d_sae]. Codes are CSR:
row r holds entries row_ptr[r] to row_ptr[r + 1] (int64 [batch + 1]), each a feature (index, int64
[entries]) and a value ([entries]). An entry (row, feature) occurs once. Gradients are made of these
operations in one place, `sae.kernels.autograd`, for every backend.
"""

from typing import Protocol

from torch import Tensor


class Backend(Protocol):
    """A module of the package with these functions."""

    NAME: str
    """as SAESCOPE_KERNELS and manifests have it"""
    DENSE: float
    """codes fuller than this fraction of [batch, d_sae] are multiplied as dense matrices instead"""

    def topk(
        self, x: Tensor, W: Tensor, b: Tensor | None, k: int, *, signed: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The k largest of x W^T + b in each row: (index int64, value), both [batch, k], unsorted.

        Not rectified. signed: largest in magnitude, with their signs.
        """
        ...

    def above(
        self, x: Tensor, W: Tensor, b: Tensor | None, threshold: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Entries of x W^T + b above threshold [d_sae]: (row_ptr, index, value), in rows rising."""
        ...

    def decode(self, row_ptr: Tensor, index: Tensor, value: Tensor, W: Tensor) -> Tensor:
        """Sum of value W[index] over each row's entries: [batch, d]."""
        ...

    def entry_dots(self, row_ptr: Tensor, index: Tensor, rows: Tensor, W: Tensor) -> Tensor:
        """The dot product of an entry's row and its feature's row of W: [entries]."""
        ...

    def decode_error(
        self, row_ptr: Tensor, index: Tensor, value: Tensor, W: Tensor, b: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """decode + b - target [batch, d], its squared norms [batch], its `entry_dots` [entries]."""
        ...

    def weight_gradient(
        self, row_ptr: Tensor, index: Tensor, value: Tensor, rows: Tensor, d_sae: int
    ) -> Tensor:
        """For each feature the sum of value times its entry's row: [d_sae, d]."""
        ...

    def feature_sums(self, index: Tensor, value: Tensor, d_sae: int) -> Tensor:
        """For each feature the sum of its values: [d_sae]."""
        ...
