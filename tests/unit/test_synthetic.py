"""Synthetic worlds: their tensors, and the distribution of their rows.

Frequencies are compared within five standard errors of the number of rows drawn; with at most some
hundred of them compared, chance fails a test once in ten thousand seeds, and the seeds are fixed.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm, truncnorm
from torch import Tensor
from torch.nn import functional

from sae.kernels import cpp_library
from sae.kernels.codes import SparseCodes
from sae.synthetic import philox
from sae.synthetic.config import WorldConfig, world_config
from sae.synthetic.drawing import Drawing
from sae.synthetic.stream import SyntheticStream
from sae.synthetic.world import World, compensated, frequencies, make_trees, orthogonalised
from saescope.errors import InputError

ROWS = 60_000
with_cpp = pytest.mark.skipif(cpp_library.library() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def world() -> World:
    return World(world_config("tiny"))


@pytest.fixture(scope="module")
def codes(world: World) -> SparseCodes:
    return Drawing(world, seed=3).with_codes(0, ROWS).codes


# ---- random numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_its_authors_numbers(
    counter: tuple[int, ...], key: tuple[int, int], expected: str
) -> None:
    low, high, block, purpose = counter
    row = torch.from_numpy(np.array([high << 32 | low], dtype=np.uint64).view(np.int64))
    found = philox.words(row, block, purpose, key)[0]
    assert " ".join(f"{word:08x}" for word in found.tolist()) == expected


def test_normal_numbers_are_normal() -> None:
    word = philox.words(torch.arange(100_000), 0, 0, (1, 2))
    assert philox.uniform(torch.tensor([0, 2**32 - 1])).tolist() == [2**-33, 1 - 2**-33]
    first, second = philox.normal_pair(word[:, 0], word[:, 1])
    for each in (first, second):
        assert abs(float(each.mean())) < 5 / math.sqrt(1e5)
        assert abs(float(each.square().mean()) - 1) < 5 * math.sqrt(2 / 1e5)
        assert abs(float((each > 2).double().mean()) - norm.sf(2)) < 5 * math.sqrt(0.023 / 1e5)
    assert abs(float((first * second).mean())) < 5 / math.sqrt(1e5)


# ---- what a world is --------------------------------------------------------------------------


def test_frequencies_follow_the_law_between_their_ends() -> None:
    config = WorldConfig(features=4, roots=0, zipf=1.0, smallest_probability=0.1)
    # ranks^-1 are 1, 1/2, 1/3, 1/4; scaled so that the ends are 0.4 and 0.1
    expected = [0.4, 0.2, 0.1 + 0.3 * (1 / 12) / 0.75, 0.1]
    assert frequencies(config).tolist() == pytest.approx(expected)


def test_trees_fill_generation_by_generation() -> None:
    config = WorldConfig(features=13, roots=2, children=3, depth=2)
    trees = make_trees(config)
    # 2 roots, 6 children, of 18 grandchildren only 5 features are left
    assert trees.parent.tolist() == [-1, -1, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert trees.children.tolist() == [3, 3, 3, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    assert trees.first_child.tolist()[:4] == [2, 5, 8, 11]
    assert World(world_config("small", orthogonalisation_steps=0)).trees.parent.ge(0).sum() == 1344


def test_children_are_drawn_more_often_than_they_are_to_fire() -> None:
    trees = make_trees(WorldConfig(features=4, roots=1, children=2, depth=1))
    found = compensated(torch.tensor([0.5, 0.2, 0.1, 0.3]), trees, exclusive=True)
    # 0.2 / 0.5 (1 + 0.1 / 0.5), 0.1 / 0.5 (1 + 0.2 / 0.5); the last stands alone
    assert found.tolist() == pytest.approx([0.5, 0.48, 0.28, 0.3])
    found = compensated(torch.tensor([0.5, 0.2, 0.45, 0.3]), trees, exclusive=True)
    assert found.tolist() == pytest.approx([0.5, 0.4 * 1.9, 1.0, 0.3])
    found = compensated(torch.tensor([0.5, 0.2, 0.1, 0.3]), trees, exclusive=False)
    assert found.tolist() == pytest.approx([0.5, 0.4, 0.2, 0.3])


def test_latent_variables_have_unit_variance(world: World) -> None:
    own = 1 / world.slope.double().square().sum(1).add(1)  # own variance, from slope alone
    common = world.causes.double().square().sum(1)
    assert torch.allclose(own + common, torch.ones_like(own))
    wild = World(world_config("tiny", correlation_scale=2.0, orthogonalisation_steps=0))
    assert float(wild.causes.square().sum(1).max()) <= 0.99 + 1e-6
    assert bool(wild.offset.isfinite().all())


def test_orthogonalisation_follows_the_loss_of_all_pairs() -> None:
    config = world_config("tiny", orthogonalisation_steps=7, orthogonalisation_lr=0.01)
    start = functional.normalize(torch.randn(40, 8, dtype=torch.float64), dim=1)
    made, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, 8):
        made.requires_grad_()
        dots = made @ made.T
        norms = dots.diagonal()
        loss = (dots - torch.diag(norms)).square().sum() + 40 * (norms - 1).square().sum()
        (gradient,) = torch.autograd.grad(loss, made)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient.square()
        change = mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        made = made.detach() - 0.01 * change
    expected = functional.normalize(made, dim=1)
    assert torch.allclose(orthogonalised(start, config), expected, atol=1e-9)


def test_orthogonalised_directions_overlap_less() -> None:
    def overlap(steps: int) -> float:
        made = World(world_config("tiny", orthogonalisation_steps=steps)).directions
        assert torch.allclose(made.norm(dim=1), torch.ones(len(made)))
        return float((made @ made.T).fill_diagonal_(0).square().mean())

    assert overlap(100) < 0.95 * overlap(0)
    assert float(World(world_config("tiny")).bias.norm()) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": 0}, "world.features"),
        ({"roots": 97}, "more trees than features"),
        ({"largest_probability": 1.2}, "world.largest_probability"),
        ({"smallest_probability": 0.9}, "world.smallest_probability"),
        ({"first_mean": 0}, "world.first_mean"),
        ({"seed": -1}, "world.seed"),
    ],
)
def test_a_wrong_setting_is_named(change: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        world_config("tiny", **change)


def test_an_unknown_world_is_refused() -> None:
    with pytest.raises(InputError, match="no such world"):
        world_config("smal")


# ---- the distribution of rows -----------------------------------------------------------------


def close(found: Tensor, expected: Tensor, trials: Tensor | int) -> None:
    """Frequencies are within five standard errors."""
    error = (expected * (1 - expected) / trials).sqrt()
    assert bool(((found - expected).abs() <= 5 * error + 1e-12).all())


def frequency(codes: SparseCodes) -> Tensor:
    return codes.counts().double() / codes.batch


def positive(world: World) -> Tensor:
    """Probability that each feature's amount is above 0, where it fires."""
    return torch.special.ndtr(world.mean.double() / world.deviation.double())


def test_features_without_a_parent_fire_as_often_as_the_law_says(
    world: World, codes: SparseCodes
) -> None:
    alone = world.trees.parent < 0
    expected = world.probability * positive(world)
    close(frequency(codes)[alone], expected[alone], ROWS)


def test_a_child_fires_only_with_its_parent_and_no_sibling(
    world: World, codes: SparseCodes
) -> None:
    fires = codes.dense() > 0
    parent = world.trees.parent
    child = (parent >= 0).nonzero()[:, 0]
    assert bool((fires[:, parent[child]] | ~fires[:, child]).all())
    siblings = torch.zeros(ROWS, len(parent), dtype=torch.int64)
    siblings.index_add_(1, parent[child], fires[:, child].long())
    assert int(siblings.max()) == 1
    assert int((siblings == 1).sum()) > 1000


def test_without_exclusion_siblings_fire_together() -> None:
    config = world_config("tiny", exclusive=False, correlation_rank=0, orthogonalisation_steps=0)
    world = World(config)
    fires = Drawing(world, seed=1).with_codes(0, ROWS).codes.dense() > 0
    a, b = (int(world.trees.first_child[0]) + n for n in (0, 1))
    with_parent = fires[fires[:, 0]]
    drawn = (world.drawn_probability * positive(world))[[a, b]]
    close(with_parent[:, [a, b]].double().mean(0), drawn, len(with_parent))
    both = (with_parent[:, a] & with_parent[:, b]).double().mean()
    close(both, drawn.prod(), len(with_parent))


def test_which_child_fires_under_a_parent() -> None:
    """Given its parent a child is drawn by its probability; of several one stays, each as likely.

    Without correlations the chance of staying is a sum over the siblings drawn beside it.
    """
    world = World(world_config("tiny", correlation_rank=0, orthogonalisation_steps=0))
    codes = Drawing(world, seed=5).with_codes(0, ROWS).codes
    fires, count = codes.dense() > 0, world.config.children
    chance = world.drawn_probability * positive(world)
    for parent in range(world.config.roots):
        first = int(world.trees.first_child[parent])
        drawn = chance[first : first + count].tolist()
        expected = [0.0] * count
        for subset in itertools.product((0, 1), repeat=count):
            if any(subset):
                p = math.prod(q if on else 1 - q for q, on in zip(drawn, subset, strict=True))
                for n in range(count):
                    expected[n] += subset[n] * p / sum(subset)
        under = fires[fires[:, parent], first : first + count].double()
        close(under.mean(0), torch.tensor(expected, dtype=torch.float64), len(under))


def test_pairs_fire_together_as_their_correlation_says() -> None:
    config = world_config("tiny", roots=0, correlation_scale=0.6, orthogonalisation_steps=0)
    world = World(config)
    fires = Drawing(world, seed=2).with_codes(0, ROWS).codes.dense()[:, :6] > 0
    correlation = (world.causes @ world.causes.T).double()
    threshold = norm.isf(world.probability.numpy())
    assert float(correlation[:6, :6].fill_diagonal_(0).abs().max()) > 0.4  # something to see
    for a, b in itertools.combinations(range(6), 2):
        rho = float(correlation[a, b])
        covariance: Any = np.array([[1, rho], [rho, 1]])
        both = multivariate_normal.cdf(-threshold[[a, b]], cov=covariance)
        expected = torch.tensor(both) * positive(world)[[a, b]].prod()
        close((fires[:, a] & fires[:, b]).double().mean(), expected, ROWS)


def test_amounts_are_normal_above_zero(world: World, codes: SparseCodes) -> None:
    dense = codes.dense().double()
    parent = world.trees.parent
    for feature in (0, 1, 4, 5, int(parent.ge(0).nonzero()[-1])):
        value = dense[dense[:, feature] > 0]
        own = value[:, feature]
        if parent[feature] >= 0:  # a child's is multiplied by its parent's over the parent's mean
            above = int(parent[feature])
            own = own / (value[:, above] / float(world.mean[above]))
        mean, deviation = float(world.mean[feature]), float(world.deviation[feature])
        law = truncnorm(-mean / deviation, np.inf, loc=mean, scale=deviation)
        assert len(own) > 300
        assert abs(float(own.mean()) - law.mean()) < 5 * law.std() / math.sqrt(len(own))
        # a standard deviation of n normal numbers is known to 1 / sqrt(2 n) of it
        assert float(own.std()) == pytest.approx(law.std(), rel=5 / math.sqrt(2 * len(own)))


def test_a_row_is_its_amounts_times_their_directions_and_the_bias(world: World) -> None:
    x, codes = Drawing(world, seed=3).with_codes(0, 512)
    assert torch.allclose(x, codes.dense() @ world.directions + world.bias, atol=1e-4)
    assert bool((codes.value > 0).all())
    for start, end in itertools.pairwise(codes.row_ptr.tolist()):
        index = codes.index[start:end]
        assert bool((index.diff() > 0).all())


def slow_rows(world: World, rows: int, seed: int) -> np.ndarray:
    """Amounts [rows, features] drawn densely, step by step as the paper tells it, in NumPy."""
    random, config, trees = np.random.default_rng(seed), world.config, world.trees
    causes = world.causes.double().numpy()
    latent = random.normal(size=(rows, config.correlation_rank)) @ causes.T
    latent += random.normal(size=latent.shape) * np.sqrt(1 - (causes**2).sum(1))
    fires = latent > norm.isf(world.drawn_probability.numpy())
    amount = world.mean.numpy() + world.deviation.numpy() * random.normal(size=latent.shape)
    amount = np.maximum(amount, 0) * fires
    for parent in range(config.features):  # parents come before their children
        first, count = int(trees.first_child[parent]), int(trees.children[parent])
        children = amount[:, first : first + count]
        children *= (amount[:, parent] / float(world.mean[parent]))[:, None]
        score = np.where(children > 0, random.random(children.shape), -1)
        children *= score == score.max(axis=1, keepdims=True) if count else 1
    return amount


def test_rows_are_distributed_as_drawn_densely(world: World, codes: SparseCodes) -> None:
    """Frequencies of every feature and of every pair, mean amounts and their products."""
    mine, other = codes.dense().numpy().astype(np.float64), slow_rows(world, ROWS, seed=0)
    for of in (lambda a: a > 0, lambda a: a):
        a, b = of(mine).astype(np.float64), of(other).astype(np.float64)
        error = np.sqrt((a.var(0) + b.var(0)) / ROWS)
        assert (np.abs(a.mean(0) - b.mean(0)) <= 5 * error).all()
        pair, slow = a.T @ a / ROWS, b.T @ b / ROWS
        square = (a**2).T @ a**2 / ROWS + (b**2).T @ b**2 / ROWS - pair**2 - slow**2
        # some 4,600 pairs, the rarest of which are seen a few times: Poisson's tail is longer
        assert (np.abs(pair - slow) <= 6 * np.sqrt(square / ROWS) + 8 * square.max() / ROWS).all()
    a, b = (mine > 0).sum(1), (other > 0).sum(1)
    assert abs(a.std() - b.std()) < 5 * a.std() / np.sqrt(ROWS)


# ---- the same rows everywhere -----------------------------------------------------------------


@with_cpp
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"exclusive": False, "children": 6},
        {"scale_children": False, "compensate": False},
        {"roots": 0, "correlation_rank": 0},
        {"features": 41, "roots": 5, "depth": 3, "correlation_rank": 17, "d_in": 5},
        {"largest_probability": 1.0},
        {"deviation_mean": 6.0, "features": 300},
    ],
)
def test_cpp_draws_what_torch_draws(change: dict[str, float]) -> None:
    world = World(world_config("tiny", orthogonalisation_steps=0, **change))
    for first, count in ((0, 1500), (2**33 + 5, 27)):
        fast = Drawing(world, seed=7, cpp=True).with_codes(first, count)
        plain = Drawing(world, seed=7, cpp=False).with_codes(first, count)
        assert torch.equal(fast.codes.row_ptr, plain.codes.row_ptr)
        assert torch.equal(fast.codes.index, plain.codes.index)
        assert torch.allclose(fast.codes.value, plain.codes.value, rtol=1e-6)
        assert torch.allclose(fast.x, plain.x, atol=1e-4)
        assert torch.equal(Drawing(world, seed=7, cpp=True).rows(first, count), fast.x)


@with_cpp
def test_rows_with_more_features_than_there_was_room_for() -> None:
    config = world_config("tiny", features=400, roots=0, smallest_probability=0.39)
    world = World(dataclasses.replace(config, orthogonalisation_steps=0))
    fast, plain = (Drawing(world, cpp=cpp).with_codes(0, 20) for cpp in (True, False))
    assert int(fast.codes.l0().min()) > 96
    assert torch.equal(fast.codes.index, plain.codes.index)


@pytest.mark.parametrize("cpp", [pytest.param(True, marks=with_cpp), False])
def test_a_row_does_not_depend_on_what_is_drawn_beside_it(world: World, cpp: bool) -> None:
    drawing = Drawing(world, seed=1, cpp=cpp)
    whole = drawing.rows(0, 100)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(Drawing(world, seed=1, cpp=cpp).rows(0, 100), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat([drawing.rows(n, 10) for n in range(0, 100, 10)]), whole)
    assert not torch.equal(Drawing(world, seed=2, cpp=cpp).rows(0, 100), whole)
    assert not torch.equal(Drawing(world, seed=1, purpose=1, cpp=cpp).rows(0, 100), whole)
    empty = (whole == world.bias).all(1)  # rows on which nothing fires are equal
    assert len(whole[~empty].unique(dim=0)) == 100 - int(empty.sum()) > 50


def test_many_rows_are_drawn_in_bounded_memory(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae.synthetic.drawing._TOPS_AT_ONCE", 1000)
    few = Drawing(world, cpp=False).with_codes(0, 100)
    monkeypatch.undo()
    assert torch.equal(few.codes.index, Drawing(world, cpp=False).with_codes(0, 100).codes.index)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_draws_the_same_rows() -> None:
    world = World(world_config("small"))
    here, there = (Drawing(world, seed=4, device=device) for device in ("cpu", "cuda"))
    mine, other = here.with_codes(0, 4096), there.with_codes(0, 4096)
    assert other.x.device.type == "cuda"
    same = (mine.codes.dense() > 0) == (other.codes.dense().cpu() > 0)
    assert float((~same).any(1).double().mean()) < 1e-3  # rounding, at a threshold
    rows = same.all(1)
    assert torch.allclose(mine.x[rows], other.x.cpu()[rows], atol=1e-4)


# ---- the stream -------------------------------------------------------------------------------


def taken(stream: SyntheticStream, batches: int) -> Tensor:
    return torch.cat([batch.x for batch, _ in zip(stream, range(batches), strict=False)])


@pytest.fixture
def make(world: World) -> Callable[..., SyntheticStream]:
    return lambda **given: SyntheticStream(world, **{"batch_size": 16, "seed": 9, **given})


def test_a_stream_goes_on_where_its_state_was_taken(make: Callable[..., SyntheticStream]) -> None:
    whole = taken(make(), 6)
    first = make()
    assert torch.equal(taken(first, 2), whole[:32])
    # zip asks for one batch more than it keeps
    state = {**first.state_dict(), "row": 32}
    again = make(batch_size=8)
    again.load_state_dict(state)
    assert torch.equal(taken(again, 8), whole[32:])


def test_a_state_counts_the_rows_given(make: Callable[..., SyntheticStream]) -> None:
    stream = make()
    batches = iter(stream)
    assert stream.state_dict()["row"] == 0
    next(batches)
    state = stream.state_dict()
    assert state["row"] == 16
    again = make()
    again.load_state_dict(state)
    assert torch.equal(next(iter(again)).x, next(batches).x)


def test_a_state_of_other_rows_is_refused(make: Callable[..., SyntheticStream]) -> None:
    state = make().state_dict()
    with pytest.raises(InputError, match="seed differs"):
        make(seed=8).load_state_dict(state)
    other = SyntheticStream(World(world_config("tiny", bias=0.1)), batch_size=16, seed=9)
    with pytest.raises(InputError, match="world differs"):
        other.load_state_dict(state)
    with pytest.raises(InputError, match="row"):
        make().load_state_dict({**state, "row": -1})


def test_held_out_and_scored_rows_are_always_the_same_and_others(
    make: Callable[..., SyntheticStream],
) -> None:
    stream = make()
    rows = stream.held_out(5000)
    first, again = (torch.cat([batch.x for batch in rows()]) for _ in range(2))
    assert first.shape == (5000, 32)
    assert torch.equal(first, again)
    scored = torch.cat([drawn.x for drawn in stream.scored(100)])
    assert not torch.equal(scored, first[:100])
    assert not torch.equal(taken(stream, 1), first[:16])
