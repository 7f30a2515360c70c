"""Positions whose norm is far above the median, such as attention sinks at delimiters."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from activations.corpora.sequences import PackingCounts, Sequences
from activations.harvesting.config import HarvestConfig
from activations.harvesting.corpus_reader import CorpusReader
from activations.loading.outliers import OutlierFilter
from activations.models.base import HarvestModel

_POSITIONS = 16384
"""over which a median is taken"""


def median_norms(
    groups: Iterable[Sequences], model: HarvestModel, sites: Sequence[str], batch_sequences: int
) -> dict[str, float]:
    """Median norm at each site over the positions of some sequences that may be kept."""
    norms: dict[str, list[Tensor]] = {site: [] for site in sites}
    for group in groups:
        for batch in torch.from_numpy(group.tokens).split(batch_sequences):
            keep = model.keep_mask(batch)
            for site, x in model.capture(batch, sites).items():
                norms[site].append(x.float().norm(dim=-1).cpu()[keep])
    return {site: float(torch.cat(found).median()) for site, found in norms.items()}


def within(
    found: Mapping[str, Float[Tensor, "batch pos d_in"]], limits: OutlierFilter
) -> Bool[Tensor, "batch pos"]:
    """Which positions are no outlier at any site."""
    kept = [limits.keep(site, x.float()).cpu() for site, x in found.items()]
    return torch.stack(kept).all(dim=0)


def norm_limits(manifest: Mapping[str, Any]) -> OutlierFilter | None:
    """The limits of a harvest that leaves out outliers, else None."""
    found = manifest.get("outliers")
    return found and OutlierFilter(**found)


def outlier_facts(
    config: HarvestConfig, model: HarvestModel, sites: Sequence[str]
) -> dict[str, Any]:
    """What the manifest says of outliers: median norms over the first training sequences."""
    if config.outliers is None:
        return {}
    wanted = -(-_POSITIONS // config.context)
    found = CorpusReader.of(config).packed(
        "train", model, per_group=wanted, counts=PackingCounts(), limit=wanted
    )
    medians = median_norms(found, model, sites, config.batch_sequences)
    return {"outliers": OutlierFilter(multiple=config.outliers, median=medians).to_dict()}
