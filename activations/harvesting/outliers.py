"""Positions whose norm is far above the others': attention sinks at delimiters, for one."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from activations.corpora.packing import PackingCounts, Sequences
from activations.harvesting.corpus_reader import Text
from activations.models.base import RawModel
from activations.models.language import Model
from saescope.errors import InputError

if TYPE_CHECKING:
    from activations.harvesting.pipeline import HarvestConfig

Limits = Mapping[str, float]
"""Of each site the largest norm that is kept."""
_POSITIONS = 16384
"""over which a median is taken"""


def median_norms(
    groups: Iterable[Sequences], model: Model, sites: Sequence[str], batch_sequences: int
) -> dict[str, float]:
    """Median norm at each site over the positions of some sequences that may be kept.

    Raises InputError for a site whose median norm is 0, or without any such position.
    """
    norms: dict[str, list[Tensor]] = {site: [] for site in sites}
    for group in groups:
        for batch in torch.from_numpy(group.tokens).split(batch_sequences):
            keep = model.keep_mask(batch)
            for site, x in model.capture(batch, sites).items():
                norms[site].append(x.float().norm(dim=-1).cpu()[keep])
    medians = {site: float(torch.cat(found).median()) for site, found in norms.items()}
    for site, median in medians.items():
        if not median > 0:
            raise InputError("the median norm is not above 0", where=site, given=median)
    return medians


def within(
    found: Mapping[str, Float[Tensor, "batch pos d_in"]], limits: Limits
) -> Bool[Tensor, "batch pos"]:
    """Which positions have a norm up to the limit at every site."""
    norms = {site: x.float().norm(dim=-1).cpu() for site, x in found.items()}
    return torch.stack([norm <= limits[site] for site, norm in norms.items()]).all(dim=0)


def norm_limits(manifest: Mapping[str, Any]) -> Limits | None:
    """The limits of a harvest that leaves out outliers."""
    found = manifest.get("outliers")
    return found and {site: found["multiple"] * m for site, m in found["median"].items()}


def outlier_facts(
    config: "HarvestConfig", model: Model | RawModel, sites: Sequence[str]
) -> dict[str, Any]:
    """What the manifest says of outliers: median norms over the first training sequences."""
    if config.outliers is None:
        return {}
    assert isinstance(model, Model), "checked with the configuration"
    wanted = -(-_POSITIONS // config.context)
    found = Text.of(config).packed(
        "train", model, per_group=wanted, counts=PackingCounts(), limit=wanted
    )
    medians = median_norms(found, model, sites, config.batch_sequences)
    return {"outliers": {"multiple": config.outliers, "median": medians}}
