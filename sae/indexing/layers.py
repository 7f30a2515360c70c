"""What features do at the layers of an SAE of several: measured, or of a crosscoder its weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from activations import ActivationStore
from activations.loading.unshuffled import aligned_rows
from sae.analysis.layers import adjacent_cosine
from sae.analysis.mlsae import LayerUse
from sae.core.base import SparseAutoencoder
from sae.data.placement import Placement
from sae.indexing.ends import indexed
from sae.kernels.codes import SparseCodes
from saescope.progress import Progress, say
from store import StoreWriter

_PIECE = 512


@dataclass(frozen=True)
class LayerFacts:
    """What features do at each layer [layers, d_sae]."""

    sites: tuple[str, ...]
    tokens: int
    """on which it was measured; 0: of a crosscoder, by its weights"""
    cosine_next: tuple[float | None, ...]
    amount: NDArray[np.float64]
    """sum of activations, at the scale that each layer was trained at; or the decoder's norm"""
    count: NDArray[np.int64] | None
    """tokens on which a feature fires"""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """figures of the whole SAE (sae.analysis.mlsae.LayerUseSummary)"""

    def columns(self) -> pa.Table:
        """Mean, standard deviation and mode of the layer by P(layer | feature), from 0; null for a
        feature that does nothing anywhere."""
        total = self.amount.sum(0)
        silent = total <= 0
        share = self.amount / np.where(silent, 1, total)
        layer = np.arange(len(share))[:, None]
        mean = (share * layer).sum(0)
        std = np.sqrt((share * (layer - mean) ** 2).sum(0))
        peak = share.argmax(0).astype(np.int16)
        return pa.table(
            {
                "layer_mean": pa.array(mean.astype(np.float32), mask=silent),
                "layer_std": pa.array(std.astype(np.float32), mask=silent),
                "layer_peak": pa.array(peak, mask=silent),
            }
        )

    def write(self, writer: StoreWriter) -> None:
        """Add them to a store."""
        writer.add_layers(self.sites, self.tokens, self.cosine_next)
        writer.add_layer_profiles(self.amount, self.count)
        writer.add_features(self.columns())


@torch.no_grad()
def layer_facts(
    whole: SparseAutoencoder, placement: Placement, harvest: ActivationStore, tokens: int
) -> LayerFacts | None:
    """What features do at the layers of an SAE; None for an SAE of one.

    Args:
        whole: the SAE as it was trained; `placement`, what is indexed of it.
        tokens: how many training tokens of the harvest to encode at each layer; 0 for none.
    """
    if whole.concatenates:
        # crosscoders and cross-layer transcoders have it
        norms = getattr(placement.sae, "site_norms")()  # noqa: B009
        amount = norms.detach().double().T.contiguous().numpy()
        unknown = (None,) * len(placement.written)
        return LayerFacts(placement.written, 0, unknown, amount, None)
    sites = tuple(site for site in whole.site_normalisers if site in harvest.sites)
    if len(sites) < 2 or not tokens:
        if whole.site_normalisers:
            say("layer profile: left out, as the harvest has one of the SAE's layers, or none")
        return None
    return _measured(whole, sites, harvest, tokens)


def _measured(
    whole: SparseAutoencoder, sites: tuple[str, ...], harvest: ActivationStore, tokens: int
) -> LayerFacts:
    saes = [indexed(whole.at(site)) for site in sites]
    # activations of folded SAEs are in the model's units, in which later layers are larger
    units = [whole.site_normalisers[site].feature_scale for site in sites]
    use = LayerUse(saes[0].d_sae, len(sites))
    count = torch.zeros(len(sites), saes[0].d_sae, dtype=torch.int64)
    total = min(tokens, harvest.n_rows("train"))
    pieces = aligned_rows(harvest, sites, split="train", limit=total, piece=_PIECE, spread=True)
    with Progress("layer profile", total, "tokens") as progress:
        for rows, row_token in pieces:
            codes = [sae.encode_sparse(x).compact() for sae, x in zip(saes, rows, strict=True)]
            for n, each in enumerate(codes):
                count[n] += each.index.bincount(minlength=each.d_sae)
            group = torch.arange(len(sites)).repeat_interleave(len(row_token))
            use.add(_stacked(codes, units), group, row_token.repeat(len(sites)))
            progress.advance(len(row_token))
    cosine = adjacent_cosine(harvest, sites, rows=tokens).tolist()
    fires = bool(use.totals.any())
    return LayerFacts(
        sites,
        use.tokens,
        (*cosine, None),
        use.totals.numpy(),
        count.numpy(),
        use.summary().to_dict() if fires else {},
    )


def _stacked(codes: list[SparseCodes], units: list[float]) -> SparseCodes:
    """Codes below one another, each times its unit."""
    ends = np.cumsum([0, *(len(each.index) for each in codes)]).tolist()
    begins: list[Tensor] = [
        each.row_ptr[:-1] + end for each, end in zip(codes, ends[:-1], strict=True)
    ]
    last = codes[-1].row_ptr.new_tensor([ends[-1]])
    value = [each.value * unit for each, unit in zip(codes, units, strict=True)]
    index = torch.cat([each.index for each in codes])
    return SparseCodes(torch.cat([*begins, last]), index, torch.cat(value), codes[0].d_sae)
