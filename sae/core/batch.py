"""A batch as a stream gives it, and as a loss takes it: at the normaliser's scale."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from sae.distributed import ALL, FEATURES, ROWS
from sae.kernels.fixed_order_sums import total
from saescope.errors import InputError


@dataclass(frozen=True)
class RawBatch:
    """Rows of activations, float32 in the model's units (or a transform's, where there is one)."""

    x: Tensor
    """[batch, d_in], what is encoded"""
    target: Tensor | None = None
    """[batch, d_out], what is to be reconstructed; None: x itself"""
    group: Tensor | None = None
    """int64 [batch], which of the stream's sites each row is from"""
    labels: Tensor | None = None
    """int64 [batch], class of each row, such as its document; -1 for none"""
    row_token: Tensor | None = None
    """int64 [batch], flat token (sequence * context + position) of each row"""

    def __len__(self) -> int:
        return len(self.x)

    @property
    def tokens(self) -> int:
        """Tokens that the rows are of; layers may give a token several rows, side by side."""
        if self.group is None or self.row_token is None:
            return len(self)
        return len(torch.unique_consecutive(self.row_token))

    def to(self, device: torch.device) -> Self:
        """The same rows on a device."""
        moved = {
            each.name: value.to(device, non_blocking=True)
            for each in fields(RawBatch)
            if (value := getattr(self, each.name)) is not None
        }
        return replace(self, **moved)

    def select(self, rows: Tensor | slice) -> "RawBatch":
        """The rows for which a mask bool [batch] is true, or a slice of them."""
        found = {name: value for name, value in vars(self).items() if value is not None}
        return RawBatch(**{name: value[rows] for name, value in found.items()})


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """What a loss is computed on.

    >>> import torch
    >>> batch = TrainingBatch.of(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), variance=5.0)
    >>> float(batch.reconstruction(torch.zeros(2, 2)))  # (25 / 5 + 0) / 2
    2.5
    """

    y: Tensor
    """[batch, d_in], what is encoded"""
    target: Tensor
    """[batch, d_out], what is to be reconstructed; y itself for an autoencoder"""
    variance: float
    """E||t - E t||^2 of the targets over the training rows: predicting their mean costs 1"""
    group: Tensor | None = None
    """int64 [batch], which of several layers a row is from"""
    group_variance: Tensor | None = None
    """[groups], the variance of each layer's targets"""
    visible: Tensor | None = None
    """bool [d_in], the coordinates the encoder sees; the loss is then on the others"""
    labels: Tensor | None = None
    """int64 [batch], classes of rows; -1 for none"""
    tilt: float = 0.0
    """t of the tilted empirical risk, per unit of FVU; 0 is the plain mean"""
    whole: int | None = None
    """rows of the whole batch, where these are a rank's share of it"""

    @classmethod
    def of(cls, y: Tensor, *, variance: float = 1.0, **more: Any) -> Self:
        """The batch of an autoencoder: the target is y."""
        return cls(y=y, target=y, variance=variance, **more)

    def __len__(self) -> int:
        return len(self.y)

    @property
    def total(self) -> int:
        """Rows of the whole batch, on whatever ranks."""
        return len(self) if self.whole is None else self.whole

    def share(self) -> Self:
        """This rank's rows, where ranks share them.

        Raises InputError for fewer rows than ranks.
        """
        if ROWS.size == 1:
            return self
        if len(self) < ROWS.size:
            raise InputError(
                "outliers left fewer rows than there are processes",
                where="a process's share of a batch",
                given=len(self),
                allowed=f"at least {ROWS.size}; raise trainer.batch_size",
            )
        own = ROWS.share(len(self))
        y = self.y[own]
        target = y if self.target is self.y else self.target[own]
        group = None if self.group is None else self.group[own]
        labels = None if self.labels is None else self.labels[own]
        return replace(self, y=y, target=target, group=group, labels=labels, whole=len(self))

    def mean(self, values: Tensor) -> Tensor:
        """The sum of values, one an entry (row, feature), over the rows of the whole batch.

        A scalar, of all ranks' entries; as of all sums in a loss, its gradient is this rank's.
        """
        return ALL.sum(total(values)) / self.total

    @property
    def by_squares(self) -> bool:
        """The loss is a function of rows' squared errors alone, `of_squares`."""
        plain = type(self).reconstruction is TrainingBatch.reconstruction
        return plain and self.visible is None and FEATURES.size == 1

    def per_row(self, y_hat: Tensor) -> Tensor:
        """||t - y_hat||^2 of each row [batch], over the variance (its layer's, where grouped).

        Where coordinates are hidden, over those alone and their share of the width.
        """
        error = (self.target - y_hat).square()
        if self.visible is None:
            return self._in_units(error.sum(-1))
        hidden = ~self.visible
        return self._in_units((error * hidden).sum(-1), share=float(hidden.sum()) / len(hidden))

    def _in_units(self, squared: Tensor, share: float = 1.0) -> Tensor:
        unit: Tensor | float = self.variance
        if self.group is not None and self.group_variance is not None:
            unit = self.group_variance[self.group]
        return squared / (unit * share)

    def reconstruction(self, y_hat: Tensor) -> Tensor:
        """The loss of y_hat [batch, d_out]: the mean of `per_row` (an FVU), or its tilted mean.

        Tilted: (1/t) log(mean exp(t l)), by a stable logsumexp (Li et al. 2021; for SAEs Muhamed
        et al. 2024, section 3.2). t > 0 leans to the worst rows, t -> 0 is the mean.
        """
        return self._mean(self.per_row(y_hat))

    def of_squares(self, squared: Tensor) -> Tensor:
        """`reconstruction` from ||t - y_hat||^2 of each row [batch]; for a batch `by_squares`."""
        return self._mean(self._in_units(squared))

    def _mean(self, rows: Tensor) -> Tensor:
        if not self.tilt:
            return ROWS.sum(total(rows)) / self.total
        scaled = self.tilt * rows
        largest = ROWS.max(scaled.detach().max())
        whole = ROWS.sum(total((scaled - largest).exp()))
        return (whole.log() + largest - math.log(self.total)) / self.tilt

    def finish(self, output: Any) -> Any:
        """The architecture's output, put right where this batch's loss needs it."""
        return output

    def mask_input(self, centred: Tensor) -> Tensor:
        """The encoder's input [batch, d_in] with hidden coordinates zeroed."""
        if self.visible is None:
            return centred
        if centred.shape[-1] != len(self.visible):
            raise InputError("mask of another width", where="visible", given=len(self.visible))
        return centred * self.visible
