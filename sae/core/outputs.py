"""What an SAE's forward pass and its training loss return, and what a loss may know of the run."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sae.core.losses import Reconstruction
from sae.kernels.codes import SparseCodes


class SAEOutput(NamedTuple):
    """What `forward` returns."""

    x_hat: Tensor
    """reconstruction [batch, d_in], in the model's units"""
    codes: SparseCodes
    """feature activations, in the model's units"""


class TrainingOutput(NamedTuple):
    """What an architecture's `training_output` returns for one batch."""

    loss: Tensor
    """scalar to minimise"""
    terms: dict[str, Tensor]
    """named terms of the loss, detached scalars; "fvu" is always one"""
    counts: Tensor
    """int64 [d_sae], rows of the batch each feature fired on"""
    found: Reconstruction
    """how well the batch was reconstructed"""

    @property
    def y_hat(self) -> Tensor:
        """[batch, d_out], the reconstruction at the normaliser's scale; it may have no gradient."""
        return self.found.y_hat

    @property
    def l0(self) -> Tensor:
        """Mean number of features active on a row of the batch."""
        return self.counts.sum() / len(self.y_hat)


@dataclass
class TrainingState:
    """What a loss may know of the run."""

    step: int = 0
    total_steps: int = 1
    dead: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    """bool [d_sae], features that have not fired for `dead_after_tokens`"""
    penalty: float = 1.0
    """factor on the sparsity coefficient, moved by the trainer to reach a target L0"""
    generator: torch.Generator | None = None
    """the run's own randomness; a loss uses no other"""

    def ramp(self, fraction: float) -> float:
        """Linear warm-up from 0 (exclusive) to 1 over a fraction of the run."""
        steps = fraction * self.total_steps
        return min(1.0, (self.step + 1) / steps) if steps else 1.0
