"""The map of a store's decoder directions: where each feature lies, and how far to trust it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from store.database import ADDED, Database


@dataclass(frozen=True)
class FeatureMap:
    """Points of a plane on which features with near decoder directions are near, [d_sae] each."""

    x: NDArray[np.float32]
    y: NDArray[np.float32]
    kept: float | None
    """share of the features' nearest decoder directions that are as near on the map; None where the
    store has no neighbours"""
    by_chance: float | None
    """that share on a map of points at random"""
    nearest: int
    """how many neighbours of each feature that was counted over"""


def read_map(db: Database, schema: int, d_sae: int) -> FeatureMap | None:
    """See `FeatureStore.feature_map`."""
    if schema < ADDED["map_point"]:
        return None
    found = db.columns("SELECT feature, x, y FROM db.map_point ORDER BY feature")
    if not len(found["feature"]):
        return None
    fits = np.array_equal(found["feature"], np.arange(d_sae))
    points = np.stack([found["x"], found["y"]], axis=1)
    db.check_fits(fits and bool(np.isfinite(points).all()), "map_point")
    pairs = db.columns("SELECT feature, other FROM db.neighbour")
    kept, nearest = _neighbours_kept(points, pairs["feature"], pairs["other"])
    chance = nearest / (d_sae - 1) if nearest else None
    return FeatureMap(found["x"], found["y"], kept, chance, nearest)


def _neighbours_kept(
    points: NDArray[np.float32], feature: NDArray[np.int32], other: NDArray[np.int32]
) -> tuple[float | None, int]:
    """The share of pairs (feature, other) [n] that are neighbours among the points, too.

    Returns also the k of the k nearest points that are compared: as many as pairs a feature.
    """
    from scipy.spatial import KDTree

    k = len(feature) // len(points)
    if not k:
        return None, 0
    _, near = KDTree(points).query(points, k + 1)  # one of them is the point itself
    number = np.repeat(np.arange(len(points)), k + 1) * len(points) + near.ravel()
    wanted = feature.astype(np.int64) * len(points) + other
    return float(np.isin(wanted, number).mean()), k
