"""Feature hedging: whether a dictionary's features change when it is given more of them.

A dictionary that is too narrow mixes parts of features that it has no room for into those that it
has. Trained on with some features added, its own move by what the added ones take over. With
delta_j the change of feature j's direction and P the projection on the span of those added,

    portion = mean_j ||P delta_j|| / mean_j ||W_dec,j||
    rate    = max(0, (portion - chance) / (1 - chance))

where chance is the portion for as many random directions (Chanin, Dulka and Garriga-Alonso 2025,
"Feature hedging", arXiv 2505.11756, section 4). 0 is no hedging.
"""

import torch
from torch import Tensor

from saescope.errors import InputError

_DRAWS = 50


def hedging_rate(before: Tensor, after: Tensor, *, seed: int = 0) -> float:
    """Hedging of a dictionary [d_sae, d] that became [d_sae + added, d], its own features first.

    Raises InputError if nothing was added, or so much that the added span everything.

    >>> before = torch.eye(3)[:1] + 0.5 * torch.eye(3)[1:2]
    >>> round(hedging_rate(before, torch.eye(3)[:2]), 2) > 0.2
    True
    """
    count, added = len(before), len(after) - len(before)
    if added < 1 or added >= before.shape[1] or after.shape[1] != before.shape[1]:
        raise InputError(
            "needs the same dictionary with features added, fewer than its width",
            where="hedging_rate",
            given=(tuple(before.shape), tuple(after.shape)),
        )
    before, after = before.detach().double(), after.detach().double()
    delta = after[:count] - before
    length = before.norm(dim=1).mean()
    portion = _within(delta, after[count:]) / length
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(added, before.shape[1], generator=generator) for _ in range(_DRAWS)]
    chance = torch.stack([_within(delta, each.double()) for each in drawn]).mean() / length
    return max(0.0, float((portion - chance) / (1 - chance)))


def _within(delta: Tensor, directions: Tensor) -> Tensor:
    """Mean length of the parts of delta [n, d] in the span of directions [m, d]."""
    _, singular, basis = torch.linalg.svd(directions, full_matrices=False)
    spanning = basis[singular > 1e-9 * singular.amax()]
    return (delta @ spanning.T).norm(dim=1).mean()
