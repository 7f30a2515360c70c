"""The map of decoder directions: its layout, and how a store keeps it."""

from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch
from scipy.spatial import KDTree

from sae.analysis.similarity import cosines_with_others
from sae.indexing.layout import NEAREST, _repulsion, lay_out
from saescope.errors import ArtefactError, InputError
from store import FeatureStore, StoreWriter
from tests.older_stores import as_store_schema
from tests.tiny_store import D_SAE, make_tiny_store

CLUSTERS, OF_EACH = 12, 25
N = CLUSTERS * OF_EACH


@pytest.fixture(scope="module")
def planted() -> tuple[torch.Tensor, np.ndarray]:
    """Directions [300, 24] in twelve groups, feature f in group f % 12; nearest ones [300, 15]."""
    chance = torch.Generator().manual_seed(0)
    middles = torch.randn(CLUSTERS, 24, generator=chance)
    directions = middles.repeat(OF_EACH, 1) + 0.4 * torch.randn(N, 24, generator=chance)
    ((_, cosine),) = cosines_with_others(directions, N)
    return directions, cosine.topk(NEAREST).indices.numpy()


def near_points(y: np.ndarray, k: int = 10) -> np.ndarray:
    _, near = KDTree(y).query(y, k + 1)
    return np.asarray(near)[:, 1:]


def test_planted_groups_are_groups_on_the_map(planted: tuple[torch.Tensor, np.ndarray]) -> None:
    y = lay_out(*planted)
    assert y.shape == (N, 2)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-4)
    random = np.random.default_rng(0).normal(size=y.shape)
    group = np.arange(N) % CLUSTERS
    same = [(group[near_points(points)] == group[:, None]).mean() for points in (y, random)]
    assert same[0] > 0.99
    assert same[1] < 0.2
    kept = [
        np.mean(
            [len(np.intersect1d(a, b)) for a, b in zip(near_points(p), planted[1], strict=True)]
        )
        for p in (y, random)
    ]
    assert kept[0] > 15 * kept[1]
    assert lay_out(*planted).tobytes() == y.tobytes()


def test_the_repulsion_on_a_grid_is_that_of_all_pairs() -> None:
    y = np.random.default_rng(1).normal(size=(400, 2)) * (12, 5)
    away = y[:, None] - y
    q = 1 / (1 + (away**2).sum(2))
    np.fill_diagonal(q, 0)
    exact = (q[..., None] ** 2 * away).sum(1) / q.sum()
    error = np.linalg.norm(_repulsion(y) - exact) / np.linalg.norm(exact)
    assert error < 0.15


@pytest.mark.parametrize(("n", "d"), [(1, 4), (2, 4), (20, 3), (60, 1)])
def test_few_or_flat_directions_have_a_map(n: int, d: int) -> None:
    directions = torch.randn(n, d, generator=torch.Generator().manual_seed(2))
    ((_, cosine),) = cosines_with_others(directions, n)
    y = lay_out(directions, cosine.topk(min(NEAREST, n - 1)).indices.numpy())
    assert y.shape == (n, 2)
    assert np.isfinite(y).all()
    if n == 20:  # main components of unit vectors: as far apart as an independent way has them
        unit = (directions / directions.norm(dim=1, keepdim=True)).double().numpy()
        spread = np.linalg.svd(unit - unit.mean(0), compute_uv=False)[:2]
        np.testing.assert_allclose(np.linalg.norm(y, axis=0), spread, rtol=1e-4)


def test_a_store_keeps_the_map_and_says_how_near_neighbours_are(tmp_path: Path) -> None:
    with FeatureStore.open(make_tiny_store(tmp_path)) as store:
        found = store.feature_map()
        assert found is not None
        assert found.x.tolist() == [f % 8 for f in range(D_SAE)]
        assert found.y.tolist() == [-(f // 8) for f in range(D_SAE)]
        assert found.nearest == 3
        assert found.by_chance == pytest.approx(3 / 63)
        # f + 1 is beside f in 7 of 8 columns; f + 2 and f + 3 are two and three columns away
        assert found.kept is not None
        assert found.kept < 0.5


def test_what_share_of_neighbours_is_kept(tmp_path: Path) -> None:
    """Points on a line, neighbours f + 1 and f - 1: all kept; neighbours far away: none."""
    for name, step, wanted in (("near", 1, 1.0), ("far", 4, 0.0)):
        with StoreWriter(tmp_path / f"{name}.duckdb", meta={}, d_sae=9, context=4) as writer:
            writer.add_vocabulary(["a"])
            ones = np.ones((1, 4), np.int32)
            writer.add_sequences(0, 0 * ones, -ones, ones > 0, [0])
            feature, rank = np.repeat(np.arange(9), 2), np.tile([0, 1], 9)
            writer.add_neighbours(
                feature, rank, (feature + np.tile([step, -step], 9)) % 9, 0.5 * rank
            )
            angle = 2 * np.pi * np.arange(9) / 9
            writer.add_map(np.cos(angle), np.sin(angle))
            with pytest.raises(InputError, match="map: was already given"):
                writer.add_map(angle, angle)
            writer.finish()
        with FeatureStore.open(tmp_path / f"{name}.duckdb") as store:
            found = store.feature_map()
            assert found is not None
            assert found.kept == wanted


@pytest.mark.parametrize("wrong", [np.zeros(5), np.full(9, np.nan)])
def test_a_wrong_map_is_refused(tmp_path: Path, wrong: np.ndarray) -> None:
    with (
        pytest.raises(InputError, match=r"map\.y: has to have a finite number a feature"),
        StoreWriter(tmp_path / "x.duckdb", meta={}, d_sae=9, context=4) as writer,
    ):
        writer.add_map(np.zeros(9), wrong)


def test_a_store_without_a_map_and_damaged_ones(tmp_path: Path) -> None:
    path = make_tiny_store(tmp_path)
    with duckdb.connect(str(path)) as con:
        con.execute("DELETE FROM map_point WHERE feature = 5")
    with FeatureStore.open(path) as store, pytest.raises(ArtefactError, match="map_point"):
        store.feature_map()
    with duckdb.connect(str(path)) as con:
        con.execute("DELETE FROM map_point")
    with FeatureStore.open(path) as store:
        assert store.feature_map() is None
    as_store_schema(path, 3)
    with FeatureStore.open(path) as store:
        assert store.feature_map() is None
