"""Checks that an SAE's numbers are usable: finite weights, possible scales; run at each load."""

import math

import torch
from torch import Tensor

from sae.core.base import SparseAutoencoder
from sae.core.normaliser import Normaliser
from saescope.errors import ArtefactError

_UNBOUNDED = "threshold"
"""what has this in its name may be infinite: a feature that always fires (the logarithm of a
threshold of 0), or one that never does"""


def check_sound(sae: SparseAutoencoder, *, where: str) -> None:
    """Raise ArtefactError, naming the tensor, for weights, scales or variances that cannot be.

    Weights are finite numbers, but for thresholds, which are no NaN; a normaliser's mean is finite,
    its scale and variance are finite and above 0.
    """
    for name, value in sae.state_dict().items():
        what = _wrong(value, infinite=_UNBOUNDED in name)
        if what is not None:
            raise ArtefactError(f"{name} has {what}", where=where, allowed="numbers")
    for name, each in sae.normalisers.items():
        _check_normaliser(each, f"of {name}" if name else "", where)


def _wrong(value: Tensor, *, infinite: bool) -> str | None:
    if not value.is_floating_point() or not value.numel():
        return None
    # one pass, no copy: a NaN goes through to both ends, an infinity to one
    low, high = (float(end) for end in torch.aminmax(value.detach()))
    if not math.isnan(low) and (infinite or (math.isfinite(low) and math.isfinite(high))):
        return None
    kind = "NaN" if math.isnan(low) else "infinite"
    bad = (~value.isfinite() if kind == "infinite" else value.isnan()).sum()
    return f"{int(bad):,} values of {value.numel():,} that are {kind}"


def _check_normaliser(each: Normaliser, whose: str, where: str) -> None:
    name = f"the normaliser {whose}".strip()
    if not bool(each.mean.isfinite().all()):
        raise ArtefactError(f"{name} has a mean that is not finite", where=where)
    if not bool((each.scale.isfinite() & (each.scale > 0)).all()):
        smallest = float(each.scale.min())
        raise ArtefactError(
            f"{name} has an impossible scale", where=where, given=smallest, allowed="above 0"
        )
    variance = each.variance
    number = isinstance(variance, int | float) and not isinstance(variance, bool)
    if not number or not math.isfinite(variance) or not variance > 0:
        raise ArtefactError(
            f"{name} has an impossible variance", where=where, given=variance, allowed="above 0"
        )
