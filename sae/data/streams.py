"""Streams: what a trainer reads from a harvest, one site's rows or several sites' put together.

A stream is endless, and its state is JSON-able and resumes exactly. All read whole tokens through
one loader, so equal seeds give the same tokens in the same order whatever is made of them.

    OneSite        x of one site
    Pairs          x of one site, the target of another (transcoders)
    Concatenated   x of several sites side by side (crosscoders)
    ConcatenatedPairs  the same, and as many other sites as the target (cross-layer transcoders)
    AllLayers      each token gives a row a site (multi-layer SAEs, Lawson et al. 2024)
    DrawnLayer     each token gives the row of one site drawn uniformly (Group-SAE, Ghilardi et al.
                   2024), so an SAE of a group sees as many rows as an SAE of one layer
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from activations import ActivationStore
from activations.loading.epoch_order import Order
from activations.loading.outliers import OutlierFilter
from sae.data.row_labels import Labels
from sae.data.stream_base import HeldOut, RawBatch, RowTransform, Stream, Tokens
from saescope.errors import InputError

__all__ = [
    "AllLayers",
    "Concatenated",
    "ConcatenatedPairs",
    "DrawnLayer",
    "HeldOut",
    "OneSite",
    "Pairs",
    "RawBatch",
    "RowTransform",
    "Stream",
    "make_stream",
]

MixLayers = Literal["all", "drawn"]


class OneSite(Stream):
    """The rows of one site.

    >>> stream = OneSite(store, ["blocks.9.hook_resid_post"], batch_size=2048)  # doctest: +SKIP
    >>> next(iter(stream)).x.shape  # doctest: +SKIP
    torch.Size([2048, 576])
    """

    KIND = "one_site"

    def _rows(self, tokens: Tokens) -> tuple[RawBatch, Tensor | None]:
        return RawBatch(tokens.by_site[0], row_token=tokens.row_token), tokens.keep_everywhere


class Pairs(Stream):
    """x of the first site and the target of the second, of the same tokens.

    A token that is an outlier at either is left out.
    """

    KIND = "pairs"

    @property
    def d_out(self) -> int:
        """Width of the target."""
        return self._loader.widths[1]

    def _rows(self, tokens: Tokens) -> tuple[RawBatch, Tensor | None]:
        x, target = tokens.by_site
        return RawBatch(x, target, row_token=tokens.row_token), tokens.keep_everywhere


class Concatenated(Stream):
    """x is all the sites of a token side by side, in order.

    A token that is an outlier at any site is left out.
    """

    KIND = "concatenated"

    @property
    def d_in(self) -> int:
        """Width of x: the sum of the sites'."""
        return self._loader.d_in

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each site."""
        return self._loader.widths

    def _rows(self, tokens: Tokens) -> tuple[RawBatch, Tensor | None]:
        x = torch.cat(tuple(tokens.by_site), dim=-1)
        return RawBatch(x, row_token=tokens.row_token), tokens.keep_everywhere


class ConcatenatedPairs(Concatenated):
    """x is the first half of the sites side by side, the target the second half.

    A token that is an outlier at any site is left out.
    """

    KIND = "concatenated_pairs"

    @property
    def d_in(self) -> int:
        """Width of x: the sum of the first half of the sites'."""
        return sum(self.widths[: len(self.widths) // 2])

    @property
    def d_out(self) -> int:
        """Width of the target."""
        return sum(self.widths[len(self.widths) // 2 :])

    def _rows(self, tokens: Tokens) -> tuple[RawBatch, Tensor | None]:
        whole, keep = super()._rows(tokens)
        x, target = whole.x.split([self.d_in, self.d_out], dim=-1)
        return RawBatch(x, target, row_token=tokens.row_token), keep


class AllLayers(Stream):
    """Each token gives one row a site (Lawson et al. 2024).

    batch_size counts rows, so batch_size / sites tokens make a batch; rows of a token stand
    together. A row that is an outlier is left out, the token's other rows stay.

    Raises InputError if batch_size is no multiple of the number of sites, or widths differ.
    """

    KIND = "all_layers"

    def __init__(self, store: ActivationStore, sites: Sequence[str], **options: Any) -> None:
        super().__init__(store, sites, **options)
        if len(set(self._loader.widths)) > 1:
            raise InputError(
                "layers of one SAE must have one width", where="sites", given=self._loader.widths
            )

    def _tokens_of(self, rows: int) -> int:
        count = max(1, len(self.sites))
        if rows % count:
            raise InputError(
                "every token gives one row a site, so the batch must be a multiple of the number "
                "of sites",
                where="batch_size",
                given=rows,
                allowed=f"{max(1, rows // count) * count} or {(rows // count + 1) * count}",
            )
        return rows // count

    def _rows(self, tokens: Tokens) -> tuple[RawBatch, Tensor | None]:
        return _interleaved(tokens)


class DrawnLayer(AllLayers):
    """Each token gives the row of one site, drawn uniformly (Ghilardi et al. 2024).

    The draw depends on the seed and the batch's number alone. Held-out tokens give the rows of all
    sites. Raises InputError if widths differ.
    """

    KIND = "drawn_layer"

    def _tokens_of(self, rows: int) -> int:
        return rows

    def _rows(self, tokens: Tokens) -> tuple[RawBatch, Tensor | None]:
        if tokens.number is None:
            return _interleaved(tokens)
        # the spawn key keeps this apart from the loader's own draws of the same seed
        source = np.random.SeedSequence((self._seed, tokens.number), spawn_key=(1,))
        drawn = np.random.default_rng(source).integers(len(self.sites), size=len(tokens.row_token))
        group = torch.from_numpy(drawn)
        x = torch.empty_like(tokens.by_site[0])
        keep = None if tokens.keep is None else torch.empty(len(group), dtype=torch.bool)
        for number, rows in enumerate(tokens.by_site):
            chosen = group == number
            x[chosen] = rows[chosen]
            if keep is not None and tokens.keep is not None:
                keep[chosen] = tokens.keep[number][chosen]
        return RawBatch(x, group=group, row_token=tokens.row_token), keep


def _interleaved(tokens: Tokens) -> tuple[RawBatch, Tensor | None]:
    """All sites of the first token, then all of the second: any slice of a batch has all layers."""
    count = len(tokens.by_site)
    batch = RawBatch(
        rearrange(list(tokens.by_site), "site token d_in -> (token site) d_in"),
        group=repeat(torch.arange(count), "site -> (token site)", token=len(tokens.row_token)),
        row_token=repeat(tokens.row_token, "token -> (token site)", site=count),
    )
    if tokens.keep is None:
        return batch, None
    return batch, rearrange(list(tokens.keep), "site token -> (token site)")


def make_stream(
    store: ActivationStore,
    sites: str | Sequence[str],
    *,
    batch_size: int,
    seed: int = 0,
    target_site: str | None = None,
    target_sites: Sequence[str] = (),
    mix_layers: MixLayers | None = None,
    crosscoder: bool = False,
    outlier_multiple: float | None = None,
    labels: Labels | None = None,
    transform: RowTransform | None = None,
    mix_chunks: int = 4,
    order: Order | None = None,
    device: torch.device | str = "cpu",
) -> Stream:
    """The stream that an SAE of these sites is trained on; see the classes for what each gives.

    Args: target_sites, of a cross-layer transcoder, are as many as the sites, and read with
    crosscoder; outlier_multiple leaves out rows whose norm exceeds so many times their site's
    median.

    Raises InputError if the sites and options do not go together, or as the classes do.

    >>> make_stream(store, layers, mix_layers="all", batch_size=4096)  # doctest: +SKIP
    >>> make_stream(store, mlp_in, target_site=mlp_out, batch_size=4096)  # doctest: +SKIP
    """
    names = (sites,) if isinstance(sites, str) else tuple(sites)
    if target_sites:
        if target_site is not None or not crosscoder or len(target_sites) != len(names):
            raise InputError(
                "as many as the sites, which are read side by side",
                where="target_sites",
                given=tuple(target_sites),
                allowed=f"{len(names)} sites, with crosscoder and without target_site",
            )
        kind, read = ConcatenatedPairs, (*names, *target_sites)
    else:
        kind = _kind(names, target_site, mix_layers, crosscoder)
        read = (*names, target_site) if target_site is not None else names
    outliers = None
    if outlier_multiple is not None:
        outliers = OutlierFilter.fit(store, read, outlier_multiple)
    return kind(
        store,
        read,
        batch_size=batch_size,
        seed=seed,
        mix_chunks=mix_chunks,
        labels=labels,
        outliers=outliers,
        transform=transform,
        order=order,
        device=device,
    )


def _kind(
    sites: tuple[str, ...], target_site: str | None, mix_layers: MixLayers | None, crosscoder: bool
) -> type[Stream]:
    if (target_site is not None) + (mix_layers is not None) + crosscoder > 1:
        raise InputError(
            "choose one of target_site, mix_layers and crosscoder",
            where="sites",
            given={"target_site": target_site, "mix_layers": mix_layers, "crosscoder": crosscoder},
        )
    if mix_layers is not None:
        kinds: dict[str, type[Stream]] = {"all": AllLayers, "drawn": DrawnLayer}
        if mix_layers not in kinds:
            raise InputError(
                "no such way to mix layers",
                where="mix_layers",
                given=mix_layers,
                allowed=tuple(kinds),
            )
        return kinds[mix_layers]
    if crosscoder:
        return Concatenated
    if len(sites) != 1:
        raise InputError(
            "several sites need mix_layers (all, drawn) or crosscoder, else give one",
            where="sites",
            given=sites,
        )
    return OneSite if target_site is None else Pairs
