"""Layer distances by known angles; clustering, AMAD and cost by hand and by brute force."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from activations import ActivationStore, load_model
from sae.analysis.layer_groups import (
    LayerGroups,
    amad,
    amad_curve,
    choose_groups,
    cluster_layers,
    cost,
    is_contiguous,
)
from sae.analysis.layers import LayerDistances, adjacent_cosine, layer_distances, residual_sites
from saescope.errors import InputError
from tests.hand_store import make_hand_store
from tests.tiny import make_tiny_harvest


def name(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


def planar(directions: list[tuple[int, int]], shift: float = 0.0) -> dict[str, Tensor]:
    """Layer l is (+-1, +-2) times direction l, so its mean is 0; plus a constant of the layer."""
    factor = torch.tensor([1.0, -1.0, 2.0, -2.0]).repeat(10)[:, None]
    return {
        name(layer): factor * torch.tensor([d], dtype=torch.float32) + shift * (layer + 1)
        for layer, d in enumerate(directions)
    }


ANGLES = [(1, 0), (1, 1), (0, 1), (-1, 0)]
DISTANCES = np.array(
    [[0, 1 / 4, 1 / 2, 1], [1 / 4, 0, 1 / 4, 3 / 4], [1 / 2, 1 / 4, 0, 1 / 2], [1, 3 / 4, 1 / 2, 0]]
)


@pytest.mark.parametrize("shift", [0.0, 8.0])
def test_known_angles_whatever_the_mean(tmp_path: Path, shift: float) -> None:
    store = make_hand_store(tmp_path / "h", planar(ANGLES, shift))
    found = layer_distances(store)
    assert found.sites == tuple(map(name, range(4)))
    assert found.tokens == 40
    assert np.allclose(found.matrix, DISTANCES, atol=1e-7)
    cosine = adjacent_cosine(store, found.sites)
    assert np.allclose(cosine, [0.5**0.5, 0.5**0.5, 0.0], atol=1e-12)


def reference(rows: dict[str, Tensor]) -> np.ndarray:
    """Mean angles over pi of centred rows, pair by pair in numpy."""
    x = [(rows[site].double() - rows[site].double().mean(0)).numpy() for site in rows]
    out = np.zeros((len(x), len(x)))
    for i, j in combinations(range(len(x)), 2):
        dot = (x[i] * x[j]).sum(1)
        cosine = dot / np.linalg.norm(x[i], axis=1) / np.linalg.norm(x[j], axis=1)
        out[i, j] = out[j, i] = np.mean(np.arccos(cosine)) / np.pi
    return out


def test_positions_that_are_not_kept_do_not_count(tmp_path: Path, tiny_folder: Path) -> None:
    sites = tuple(map(name, range(3)))
    store = ActivationStore.open(make_tiny_harvest(tmp_path, tiny_folder, sites=sites))
    train = store.split == 0
    tokens = torch.from_numpy(store.tokens[train])
    keep = torch.from_numpy(store.keep[train])
    captured = load_model(str(tiny_folder), dtype="float32").capture(tokens, sites)
    kept, whole = (
        {site: x[mask].to(torch.bfloat16) for site, x in captured.items()}
        for mask in (keep, torch.ones_like(keep))
    )
    found = layer_distances(store, sites, rows=None)
    assert found.tokens == int(keep.sum()) == store.n_rows("train")
    assert np.allclose(found.matrix, reference(kept), atol=1e-4)
    # position 0 points the same way in every layer, so the difference would be seen
    assert not np.allclose(found.matrix, reference(whole), atol=1e-3)
    held_out = layer_distances(store, sites, split="held_out", rows=None)
    assert held_out.tokens == store.n_rows("held_out")
    assert layer_distances(store, sites, rows=700).tokens == 700


def test_the_models_last_layer_is_left_out_unless_asked_for(tmp_path: Path) -> None:
    store = make_hand_store(tmp_path / "h", planar(ANGLES), n_layers=4)
    assert residual_sites(store) == tuple(map(name, range(3)))
    assert residual_sites(store, include_last=True) == tuple(map(name, range(4)))
    assert layer_distances(store).matrix.shape == (3, 3)
    asked = layer_distances(store, residual_sites(store, include_last=True))
    assert np.allclose(asked.matrix, DISTANCES, atol=1e-7)


def test_running_means_follow_the_rule(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = {name(n): torch.randn(2400, 3, generator=generator) + 4 * n for n in range(2)}
    store = make_hand_store(tmp_path / "h", rows, chunk_rows=600)
    angles: list[np.ndarray] = []
    running: list[np.ndarray] | None = None
    for chunk in store.chunks("train"):
        read = [store.read_chunk(name(n), chunk.index)[0].double().numpy() for n in range(2)]
        for part in (slice(0, 512), slice(512, 600)):
            piece = [x[part] for x in read]
            fresh = [x.mean(0) for x in piece]
            running = (
                fresh
                if running is None
                else [0.75 * old + 0.25 * new for old, new in zip(running, fresh, strict=True)]
            )
            a, b = (x - mean for x, mean in zip(piece, running, strict=True))
            cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
            angles.append(np.arccos(cosine) / np.pi)
    found = layer_distances(store, rate=0.25, centre="ema")
    assert found.matrix[0, 1] == pytest.approx(np.concatenate(angles).mean(), rel=1e-10)
    assert found.matrix[0, 1] != pytest.approx(layer_distances(store).matrix[0, 1], rel=1e-6)


def test_planted_blocks_are_found(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = [(0, 1, 2), (3, 4), (5, 6, 7, 8)]
    rows = {}
    for block in blocks:
        base = torch.randn(200, 16, generator=generator)
        for layer in block:
            rows[name(layer)] = base + 0.3 * torch.randn(200, 16, generator=generator) + layer
    store = make_hand_store(tmp_path / "h", rows)
    distances = layer_distances(store)
    assert cluster_layers(distances.matrix, 3) == tuple(blocks)
    chosen = LayerGroups.choose(distances, 0.2)
    assert chosen.chosen == 3
    assert chosen.sites() == [tuple(map(name, block)) for block in blocks]
    curve = amad_curve(distances.matrix)
    # within a block cos is about 1 / 1.09, across blocks 0
    assert curve[3] == pytest.approx(np.arccos(1 / 1.09) / np.pi, abs=0.02)
    assert curve[2] > 0.25


# four layers by hand: 0-1 near, 2-3 next, then both pairs

FOUR = [[0, 1, 4, 9], [1, 0, 3, 8], [4, 3, 0, 2], [9, 8, 2, 0]]


def test_amad_by_hand() -> None:
    assert cluster_layers(FOUR, 4) == ((0,), (1,), (2,), (3,))
    assert cluster_layers(FOUR, 3) == ((0, 1), (2,), (3,))
    assert cluster_layers(FOUR, 2) == ((0, 1), (2, 3))
    assert cluster_layers(FOUR, 1) == ((0, 1, 2, 3),)
    assert amad_curve(FOUR) == {1: 9.0, 2: 1.5, 3: pytest.approx(1 / 3), 4: 0.0}
    assert amad(FOUR, ((0, 2), (1, 3))) == 6.0
    assert choose_groups(FOUR, 1.6) == ((0, 1), (2, 3))
    assert len(choose_groups(FOUR, 1.5)) == 3  # below, not at
    assert len(choose_groups(FOUR, 1e-9)) == 4
    assert len(choose_groups(FOUR, 10)) == 1


def test_linkage_is_complete() -> None:
    """A chain of steps 1, 1.1, 1.2: single linkage would join its neighbours one after another."""
    place = np.array([0, 1, 2.1, 3.3])
    chain = np.abs(place[:, None] - place)
    assert cluster_layers(chain, 2) == ((0, 1), (2, 3))


def brute_force(matrix: np.ndarray, count: int) -> set[tuple[int, ...]]:
    """Complete linkage by its definition, on sets."""
    groups = [frozenset([n]) for n in range(len(matrix))]
    while len(groups) > count:
        a, b = min(
            combinations(groups, 2),
            key=lambda pair: max(matrix[i, j] for i in pair[0] for j in pair[1]),
        )
        groups = [group for group in groups if group not in (a, b)] + [a | b]
    return {tuple(sorted(group)) for group in groups}


@pytest.mark.parametrize("seed", range(5))
def test_clustering_against_its_definition(seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(9, 3))
    matrix = np.linalg.norm(x[:, None] - x, axis=-1)
    for count in range(1, 10):
        assert set(cluster_layers(matrix, count)) == brute_force(matrix, count)


def test_contiguity_and_cost() -> None:
    assert is_contiguous(((0, 1, 2), (3,), (4, 5)))
    assert not is_contiguous(((0, 1, 3), (2,)))
    # activations 100 s, an SAE 20 s: three groups of nine layers cost 160 s against 280 s
    found = cost(activation=100.0, training=20.0, groups=3, layers=9)
    assert (found.grouped, found.per_layer, found.speedup) == (160.0, 280.0, 1.75)
    # the number of SAEs alone would claim 3
    assert found.speedup < 9 / 3


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    distances = LayerDistances(tuple(map(name, range(4, 8))), np.array(FOUR) / 10, 1234, "ema")
    chosen = LayerGroups.choose(distances, 0.2, activation=100.0, training=20.0)
    chosen.save(tmp_path / "groups.json")
    written = json.loads((tmp_path / "groups.json").read_text())
    assert written == chosen.to_dict()
    assert (written["chosen"], written["tokens"], written["centre"]) == (2, 1234, "ema")
    assert written["distances"] == (np.array(FOUR) / 10).tolist()
    row = written["table"][1]
    assert (row["groups"], row["contiguous"]) == ([[0, 1], [2, 3]], True)
    assert row["amad"] == pytest.approx(0.15)
    assert row["cost"] == {"grouped": 140.0, "per_layer": 180.0}
    lines = chosen.lines()
    assert capsys.readouterr().out.splitlines() == lines
    assert lines[2] == "  G   2  AMAD 0.1500  cost 140 of 180 (1.29x)  {4-5} {6-7}  <- chosen"
    scattered = np.array([[0, 3, 1], [3, 0, 3], [1, 3, 0]]) / 4
    other = LayerGroups.choose(
        LayerDistances(tuple(map(name, range(3))), scattered, 1, "mean"), 0.5
    )
    assert other.lines()[2] == "  G   2  AMAD 0.1250  {0,2} {1}  (not contiguous)  <- chosen"
    assert other.to_dict()["table"][0]["cost"] is None


def test_bad_input(tmp_path: Path) -> None:
    train = planar(ANGLES) | {"blocks.5.attn.hook_z": torch.randn(40, 3)}
    store = make_hand_store(tmp_path / "h", train)
    wrong: Any = "median"
    for call, message in (
        (lambda: layer_distances(store, [name(0)]), "two sites"),
        (lambda: layer_distances(store, [name(0), "blocks.5.attn.hook_z"]), "one width"),
        (lambda: layer_distances(store, [name(0), name(7)]), "no such site"),
        (lambda: layer_distances(store, centre=wrong), "no such centre"),
        (lambda: layer_distances(store, centre="ema", rate=0.0), "rate"),
        (lambda: layer_distances(store, split="held_out"), "no rows"),
        (lambda: adjacent_cosine(store, residual_sites(store), split="held_out"), "no rows"),
        (lambda: cluster_layers(FOUR, 5), "groups"),
        (lambda: cluster_layers([[0, 1]], 1), "square"),
        (lambda: cluster_layers([[0, 1], [2, 0]], 1), "symmetric"),
        (lambda: cluster_layers([[1.0]], 1), "symmetric"),
        (lambda: cluster_layers([[0, np.nan], [np.nan, 0]], 1), "square matrix"),
        (lambda: choose_groups(FOUR, 0), "threshold"),
        (lambda: cost(activation=1, training=0, groups=1, layers=2), "training"),
        (lambda: cost(activation=1, training=1, groups=3, layers=2), "groups"),
    ):
        with pytest.raises(InputError, match=message):
            call()
