"""Gradients added up over the ranks of a process group.

Each rank computes the gradient of its share of a batch's rows, or of its share of the features; a
step needs that of the whole batch, and the norm over all features.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sae.core.base import SparseAutoencoder
from sae.distributed import FEATURES, ROWS
from sae.training.optimisers import feature_rows

_FEW = 0.25
"""Below this fraction of the dictionary's rows it is faster to send only those that are not 0
(measured between processes of one machine; over a slow network a larger fraction would pay)."""


def of_all_features(
    sae: SparseAutoencoder, squares: Mapping[nn.Parameter, Tensor]
) -> Mapping[nn.Parameter, Tensor]:
    """Squared norms of parameters' gradients over all features, given those of this rank's."""
    if FEATURES.size == 1:
        return squares
    own = {each for name, each in sae.named_parameters() if name in sae.by_feature}
    return {
        each: FEATURES.sum(square) if each in own else square for each, square in squares.items()
    }


@torch.no_grad()
def add_up_gradients(sae: SparseAutoencoder, counts: Tensor) -> None:
    """Replace each rank's gradients by their sum over the ranks that share the batch's rows.

    Where few features fired, only the rows of gradients that are not 0 on some rank are sent, which
    for a dictionary much wider than batch * k is far less. The sums are the same either way.

    Args: counts int64 [d_sae], how often each feature fired in the whole batch.
    """
    if ROWS.size == 1:
        return
    parameters = list(sae.parameters())
    given = [each.grad is not None for each in parameters]
    used = ROWS.max(torch.tensor(given, dtype=torch.uint8)).tolist()
    touched = _touched(sae) if int((counts > 0).sum()) < _FEW * sae.d_sae else None
    by_feature = {id(each) for each in feature_rows(sae)}
    sent: list[tuple[Any, Tensor, Tensor | None]] = []
    for parameter, wanted in zip(parameters, used, strict=True):
        if not wanted:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradient, rows = parameter.grad, None
        if touched is not None and id(parameter) in by_feature:
            rows = gradient.index_select(0, touched)
        work = dist.all_reduce(gradient if rows is None else rows, async_op=True)
        sent.append((work, gradient, rows))
    for work, gradient, rows in sent:
        work.wait()
        if rows is not None and touched is not None:
            gradient.index_copy_(0, touched, rows)


def _touched(sae: SparseAutoencoder) -> Tensor | None:
    """Features, int64 [n], with a gradient that is not 0 on some rank; None if they are many."""
    flags = torch.zeros(sae.d_sae, dtype=torch.uint8, device=sae.b_dec.device)
    for parameter in feature_rows(sae):
        if parameter.grad is not None:
            # the sum of magnitudes, which nothing but zeros makes 0: not squares, which underflow
            rows = parameter.grad.flatten(1) if parameter.ndim > 1 else parameter.grad[:, None]
            flags |= torch.linalg.vector_norm(rows, 1, dim=1) != 0
    found = ROWS.max(flags).nonzero()[:, 0]
    return found if len(found) < _FEW * sae.d_sae else None
