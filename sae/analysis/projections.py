"""Shorter embeddings that are dense: the first m coordinates after a linear map.

What sparse codes of k active features stand beside: principal components, random directions
(Johnson and Lindenstrauss), and directions that are learned so that every prefix keeps the cosines
of the whole (the unsupervised Matryoshka-Adaptor of Yoon et al. 2024, section 3.1, as a linear map;
embeddings stay frozen).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from saescope.errors import InputError
from saescope.integers import as_index

_STEPS, _BATCH, _LR = 300, 256, 1e-3


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A linear map, of whose coordinates the first ones can be kept."""

    mean: Float[Tensor, " d_in"]
    directions: Float[Tensor, "d_in width"]

    def first(self, x: Float[Tensor, "row d_in"], m: int) -> Float[Tensor, "row m"]:
        """The first m coordinates. Raises InputError for more than there are."""
        m = as_index(m, where="projection.first", low=1, high=self.directions.shape[1])
        return (x - self.mean) @ self.directions[:, :m]


def principal(x: Float[Tensor, "row d_in"], width: int) -> Projection:
    """The leading principal components of rows, the one of most variance first."""
    width = _fitting(x, width)
    mean = x.mean(0)
    centred = (x - mean).double()
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors  # of rising variance
    return Projection(mean=mean, directions=axes.flip(1)[:, :width].to(x.dtype).contiguous())


def random_directions(x: Float[Tensor, "row d_in"], width: int, *, seed: int) -> Projection:
    """Gaussian directions, drawn by a seed, of rows less their mean."""
    draw = torch.Generator().manual_seed(seed)
    return Projection(
        mean=x.mean(0),
        directions=torch.randn(x.shape[1], width, generator=draw) / x.shape[1] ** 0.5,
    )


def matryoshka(x: Float[Tensor, "row d_in"], widths: Sequence[int], *, seed: int) -> Projection:
    """Directions, the best of which come first: each prefix is to keep the cosines of whole rows.

    They start at the principal components; what falls is the mean over the prefixes of the squared
    difference of cosines between the rows of a batch. Cosines are of rows less their mean, which
    many embeddings share.
    """
    if not widths or any(low >= high for low, high in pairwise((0, *widths))):
        raise InputError("widths must rise", where="matryoshka.widths", given=tuple(widths))
    start = principal(x, widths[-1])
    directions = start.directions.clone().requires_grad_()
    optimiser = torch.optim.Adam([directions], lr=_LR)
    draw = torch.Generator().manual_seed(seed)
    centred = x - start.mean
    whole = functional.normalize(centred, dim=1)
    for step in range(_STEPS):
        optimiser.param_groups[0]["lr"] = _LR * (1 - step / _STEPS)
        chosen = torch.randint(len(x), (min(_BATCH, len(x)),), generator=draw)
        wanted, moved = whole[chosen] @ whole[chosen].T, centred[chosen] @ directions
        loss = torch.stack([(_cosines(moved[:, :m]) - wanted).square().mean() for m in widths])
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
    return Projection(mean=start.mean, directions=directions.detach())


def _cosines(rows: Tensor) -> Tensor:
    unit = functional.normalize(rows, dim=1)
    return unit @ unit.T


def _fitting(x: Tensor, width: int) -> int:
    return as_index(width, where="projection.width", low=1, high=min(x.shape))
