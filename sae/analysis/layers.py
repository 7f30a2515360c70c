"""How alike the layers of a model are: angles between their centred residual streams.

Distance (Group-SAE, Ghilardi et al. 2024) and cosine (MLSAE, Lawson et al. 2024) of two layers are
means over tokens, at kept positions only:
    d_ij = E arccos(cos(x_i - mu_i, x_j - mu_j)) / pi
    c_i  = E cos(x_i - mu_i, x_i+1 - mu_i+1)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from jaxtyping import Float64
from numpy.typing import NDArray
from torch import Tensor

from activations import ActivationStore
from activations.loading.unshuffled import aligned_rows
from activations.sites.names import layer_of
from saescope.errors import InputError, check_choice, check_range

Centre = Literal["mean", "ema"]
_PIECE = 512


class AffineTransform(Protocol):
    """An affine change of a site's rows, such as a tuned lens: it takes means to means."""

    def apply(self, site: str, x: Tensor) -> Tensor:
        """Rows [n, d] of a site, changed, in the same precision."""
        ...


@dataclass(frozen=True)
class LayerDistances:
    """Mean angular distances between sites."""

    sites: tuple[str, ...]
    matrix: NDArray[np.float64]
    """[site, site], 0 for one direction, 0.5 for right angles, 1 for opposite directions"""
    tokens: int
    """tokens averaged over"""
    centre: Centre
    """how each site was centred"""


def residual_sites(store: ActivationStore, *, include_last: bool = False) -> tuple[str, ...]:
    """The harvest's residual streams behind each block, without the model's last (as the paper).

    >>> residual_sites(store)  # doctest: +SKIP
    ('blocks.0.hook_resid_post', ..., 'blocks.28.hook_resid_post')
    """
    last = int(store.manifest["model"].get("n_layers", 0)) - 1
    found = [site for site in store.sites if site.endswith(".hook_resid_post")]
    return tuple(site for site in found if include_last or layer_of(site) != last)


@torch.no_grad()
def layer_distances(
    store: ActivationStore,
    sites: Sequence[str] | None = None,
    *,
    split: str = "train",
    rows: int | None = 65_536,
    centre: Centre = "mean",
    rate: float = 0.05,
    lens: AffineTransform | None = None,
) -> LayerDistances:
    """Mean angular distance of each pair of sites over kept positions, in float64.

    Args:
        sites: by default all of `residual_sites`, which leaves out the model's last layer.
        rows: tokens to average over, taken from all over the split; None: all.
        centre: "mean" subtracts the site's mean over the harvest's training rows; "ema" a running
            mean that moves by `rate` to that of each piece of 512 tokens (as the authors do).
        lens: applied to rows and means first.

    Raises InputError for fewer than two sites, an unknown site or centre, sites of different
    widths, or no rows.

    >>> distances = layer_distances(store)  # doctest: +SKIP
    >>> distances.matrix.shape  # doctest: +SKIP
    (29, 29)
    """
    names = tuple(sites) if sites is not None else residual_sites(store)
    total = torch.zeros(len(names), len(names), dtype=torch.float64)
    tokens = 0
    pieces = centred_rows(store, names, split=split, rows=rows, centre=centre, rate=rate, lens=lens)
    for x in pieces:
        unit, used = _directions(x)
        cosine = torch.einsum("tid,tjd->tij", unit, unit).clamp_(-1, 1)
        total += cosine.arccos_().sum(0)
        tokens += used
    if tokens == 0:
        raise InputError("no rows to measure", where="layer_distances", given=split)
    matrix = (total / (tokens * torch.pi)).numpy()
    # a row's product with itself is 1 only up to rounding, whose angle is 1e-8
    np.fill_diagonal(matrix, 0.0)
    return LayerDistances(names, matrix, tokens, centre)


@torch.no_grad()
def adjacent_cosine(
    store: ActivationStore,
    sites: Sequence[str],
    *,
    split: str = "train",
    rows: int | None = 65_536,
    lens: AffineTransform | None = None,
) -> Float64[Tensor, " pairs"]:
    """Mean cosine of each site's centred rows with the next site's (Lawson et al. 2024).

    The mean of each site over the harvest's training rows is subtracted first. Float64 [sites - 1].
    Arguments and errors as of `layer_distances`.

    >>> adjacent_cosine(store, residual_sites(store))  # doctest: +SKIP
    """
    total, tokens = torch.zeros(max(0, len(sites) - 1), dtype=torch.float64), 0
    for x in centred_rows(store, sites, split=split, rows=rows, lens=lens):
        unit, used = _directions(x)
        total += (unit[:, :-1] * unit[:, 1:]).sum(-1).sum(0)
        tokens += used
    if tokens == 0:
        raise InputError("no rows to measure", where="adjacent_cosine", given=split)
    return total / tokens


def centred_rows(
    store: ActivationStore,
    sites: Sequence[str],
    *,
    split: str,
    rows: int | None,
    centre: Centre = "mean",
    rate: float = 0.05,
    lens: AffineTransform | None = None,
) -> Iterator[Float64[Tensor, "tokens site d"]]:
    """Pieces of at most 512 tokens at all sites, each site centred; see `layer_distances`."""
    check_choice("no such centre", "centre", centre, get_args(Centre))
    check_range("rate", rate, above=0, high=1)
    widths = {store.d_in(site) for site in sites}
    if len(sites) < 2 or len(widths) > 1:
        raise InputError(
            "needs two sites or more, of one width",
            where="sites",
            given=tuple(sites),
            allowed=store.sites,
        )

    def seen(site: str, x: Tensor) -> Tensor:
        return x.double() if lens is None else lens.apply(site, x.double())

    means = [torch.from_numpy(store.statistics(site).mean) for site in sites]
    mean = torch.stack([seen(site, m) for site, m in zip(sites, means, strict=True)])
    running: Tensor | None = None
    pieces = aligned_rows(store, sites, split=split, limit=rows, piece=_PIECE, spread=True)
    for by_site, _ in pieces:
        x = torch.stack([seen(site, x) for site, x in zip(sites, by_site, strict=True)], dim=1)
        if centre == "ema":
            fresh = x.mean(0)
            running = fresh if running is None else running + rate * (fresh - running)
            mean = running
        yield x - mean


def _directions(x: Tensor) -> tuple[Tensor, int]:
    """Unit rows of the tokens that have a direction at every site, and how many they are."""
    norm = x.norm(dim=-1, keepdim=True)
    directed = (norm > 0).flatten(1).all(1)
    return x[directed] / norm[directed], int(directed.sum())
