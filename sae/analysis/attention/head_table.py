"""A row for each attention head: its features' families, nulls, and intervals over texts."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sae.analysis.attention.families import GROUPS, MIXED, FeatureSources
from sae.analysis.attention.heads import HeadAttribution
from sae.analysis.attention.source_classes import FAMILIES
from saescope.errors import InputError, check_range

NAMES = (*FAMILIES, "mixed")
_TOP = 20
_DRAWS = 400
_LEVEL = (0.025, 0.975)


@dataclass(frozen=True, kw_only=True)
class HeadRow:
    """One head's features."""

    layer: int
    head: int
    features: int
    """how many belong to it, of those that fire often enough"""
    top: list[int]
    """those with the largest share in it, the largest first"""
    shares: dict[str, float]
    """by family, of its features; empty where it has none"""
    intervals: dict[str, tuple[float, float]]
    """95%, over texts"""
    random: dict[str, float]
    """null: of random directions read where its features fire"""
    effective: float | None
    """effective number of families: exp of their entropy"""
    effective_interval: tuple[float, float] | None
    others: tuple[float, float] | None
    """null: from where to where 95% of draws of as many features of all heads are"""


def head_table(
    sources: FeatureSources,
    attribution: HeadAttribution,
    *,
    least: int = 10,
    draws: int = _DRAWS,
    seed: int = 0,
) -> list[HeadRow]:
    """A row for each head of the layer.

    Args:
        sources: what features go by; attribution: which head has most of their decoder.
        least: a feature that fires more seldom belongs to no head.
        draws: of groups of texts, for intervals, and of other heads' features.

    Raises InputError for those of two SAEs or layers.
    """
    check_range("least", least, low=1)
    check_range("draws", draws, low=1)
    if (sources.layer, len(sources.firings)) != (attribution.layer, len(attribution.norm)):
        raise InputError("are of two SAEs", where="head_table")
    draw = np.random.default_rng(seed)
    often = sources.firings >= least
    own, random = (sources.families(random=each) for each in (False, True))
    again = [sources.families(draw.integers(0, GROUPS, GROUPS)) for _ in range(draws)]
    top_head = attribution.top_head.numpy()
    order = attribution.share.numpy()
    rows = []
    for head in range(attribution.norm.shape[1]):
        mine = np.flatnonzero(often & (top_head == head))
        drawn = [counted(found[mine]) for found in again]
        others = [
            effective(counted(own[draw.choice(np.flatnonzero(often), len(mine), replace=False)]))
            for _ in range(draws if len(mine) else 0)
        ]
        ranked = np.argsort(-np.where(often, order[:, head], -1.0), kind="stable")[:_TOP]
        rows.append(
            HeadRow(
                layer=attribution.layer,
                head=head,
                features=len(mine),
                top=[int(each) for each in ranked if often[each]],
                shares=_named(counted(own[mine])),
                intervals=_intervals(drawn) if len(mine) else {},
                random=_named(counted(random[mine])),
                effective=effective(counted(own[mine])) if len(mine) else None,
                effective_interval=_range([effective(each) for each in drawn])
                if len(mine)
                else None,
                others=_range(others) if others else None,
            )
        )
    return rows


def counted(families: NDArray[np.int64]) -> NDArray[np.float64]:
    """The share of each family [families and mixed]; zeros where nothing fires."""
    count = np.bincount(families[families >= 0], minlength=MIXED + 1).astype(np.float64)
    return count / max(count.sum(), 1.0)


def effective(shares: NDArray[np.float64]) -> float:
    """exp of the entropy of shares: how many families of equal size would be as various.

    >>> effective(np.array([1.0, 0, 0, 0, 0])), effective(np.array([0.5, 0.5, 0, 0, 0]))
    (1.0, 2.0)
    """
    there = shares[shares > 0]
    return round(float(np.exp(-(there * np.log(there)).sum())), 12)


def _named(shares: NDArray[np.float64]) -> dict[str, float]:
    return dict(zip(NAMES, shares.tolist(), strict=True)) if shares.any() else {}


def _intervals(drawn: list[NDArray[np.float64]]) -> dict[str, tuple[float, float]]:
    return {name: _range([each[n] for each in drawn]) for n, name in enumerate(NAMES)}


def _range(values: list[float]) -> tuple[float, float]:
    low, high = np.quantile(np.asarray(values), _LEVEL)
    return float(low), float(high)
