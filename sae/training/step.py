"""The end of a training step: projection, clipping, the optimiser, constraints."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sae.core.base import SparseAutoencoder
from sae.kernels import adam as fused
from sae.training import gradient_sums
from sae.training.optimisers import Adam
from saescope.errors import SaescopeError


@torch.no_grad()
def update(
    sae: SparseAutoencoder, optimiser: torch.optim.Optimizer, *, lr: float, clip: float, what: str
) -> float:
    """One optimiser step on the parameters' gradients; the gradient's norm before clipping.

    The gradients are those of the whole batch, summed over micro-batches and processes. Unit rows
    are projected before the norm is taken, so that what the projection removes does not count.

    Args:
        clip: largest norm; 0 for any.
        what: names the step, should its gradient not be finite.

    Raises SaescopeError if the gradient is not finite; no parameter has changed then.
    """
    for group in optimiser.param_groups:
        group["lr"] = lr
    if isinstance(optimiser, Adam):
        norm = _norm(gradient_sums.of_all_features(sae, optimiser.gradient_squares()), what)
        optimiser.step(scale=_scale(norm, clip))
        sae.constrain()
        return norm
    sae.before_step()
    gradients = {each: each.grad for each in sae.parameters() if each.grad is not None}
    squares = {each: fused.gradient_square(each, grad, False) for each, grad in gradients.items()}
    norm = _norm(gradient_sums.of_all_features(sae, squares), what)
    scale = _scale(norm, clip)
    for gradient in gradients.values():
        gradient.mul_(scale)
    optimiser.step()
    sae.after_step()
    return norm


def _norm(squares: Mapping[nn.Parameter, Tensor], what: str) -> float:
    """The whole gradient's norm from each parameter's squared."""
    norm = math.sqrt(float(torch.stack(list(squares.values())).sum()))
    if not math.isfinite(norm):
        raise SaescopeError(
            f"{what}: the gradient is not finite; lower trainer.lr, or check the harvest"
        )
    return norm


def _scale(norm: float, clip: float) -> float:
    """What clipping multiplies the gradient by, as torch.nn.utils.clip_grad_norm_ has it."""
    return min(1.0, clip / (norm + 1e-6)) if clip else 1.0
