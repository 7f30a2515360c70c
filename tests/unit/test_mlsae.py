"""Layer use of multi-layer SAEs: hand-computed laws, variances and nulls; MMCS."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae.analysis.mlsae import LayerUse, layer_use, max_cosine, token_layers
from sae.data.streams import RawBatch, make_stream
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError
from tests.hand_store import make_hand_store

TOKEN = torch.tensor([5, 9, 5, 9])
GROUP = torch.tensor([0, 0, 1, 1])
DENSE = torch.tensor(
    [
        [1.0, 0.0, 0.0],  # token 5, layer 0
        [4.0, 0.0, 0.0],  # token 9, layer 0
        [3.0, 2.0, 0.0],  # token 5, layer 1
        [0.0, 0.0, 0.0],  # token 9, layer 1
    ]
)


def used(dense: Tensor = DENSE, n_layers: int = 2, seed: int = 0) -> LayerUse:
    use = LayerUse(dense.shape[1], n_layers, seed=seed)
    use.add(SparseCodes.from_dense(dense), GROUP, TOKEN)
    return use


def test_laws_by_hand() -> None:
    use = used()
    assert use.totals.tolist() == [[5, 0, 0], [3, 2, 0]]
    assert use.probability().tolist() == [[5 / 8, 0, 0], [3 / 8, 1, 0]]
    assert use.expected_layer()[:2].tolist() == [3 / 8, 1]
    assert use.layer_variance()[:2].tolist() == [15 / 64, 0]
    assert use.expected_layer()[2].isnan()


def test_token_laws_by_hand_over_active_pairs_only() -> None:
    token, feature, p = token_layers(SparseCodes.from_dense(DENSE), GROUP, TOKEN, 2)
    assert list(zip(token.tolist(), feature.tolist(), strict=True)) == [(5, 0), (5, 1), (9, 0)]
    assert p.tolist() == [[1 / 4, 3 / 4], [0, 1], [1, 0]]


def test_variances_by_hand() -> None:
    found = used().summary()
    assert (found.tokens, found.layers, found.used_features) == (2, 2, 2)
    assert found.layers_per_pair == 4 / 3
    assert found.mean_std == pytest.approx(15**0.5 / 8 / 2)
    assert found.relative_std == pytest.approx(15**0.5 / 8 / 4)
    v = found.variances
    # masses of the pairs are 4, 2 and 4 of 10; their variances 3/16, 0 and 0
    assert v.single_token == pytest.approx(0.4 * 3 / 16)
    # masses of the features are 8 and 2 of 10
    assert v.aggregated == pytest.approx(0.8 * 15 / 64)
    assert v.ratio == pytest.approx(0.4)
    assert v.total == pytest.approx(0.25)  # half the mass at each of two layers
    # as published: three features, two tokens, six pairs of which three are inactive
    assert v.published_single_token == pytest.approx(3 / 16 / 6)
    # feature 0: E L = E L^2 = 3/8 over both tokens; feature 1: 1/2, as it fires on one of them
    assert v.published_aggregated == pytest.approx((15 / 64 + 1 / 4) / 3)
    assert v.published_ratio == pytest.approx((3 / 16 / 2) / (15 / 64 + 1 / 4))


def test_sums_do_not_depend_on_how_tokens_are_batched() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, layers, d_sae = 40, 3, 11
    dense = torch.rand(tokens * layers, d_sae, generator=generator)
    dense *= torch.rand(dense.shape, generator=generator) < 0.3
    token = torch.arange(tokens).repeat_interleave(layers) * 7
    group = torch.arange(layers).repeat(tokens)
    whole, parts = LayerUse(d_sae, layers), LayerUse(d_sae, layers)
    whole.add(SparseCodes.from_dense(dense), group, token)
    for part in torch.randperm(tokens, generator=generator).split(9):
        rows = (part[:, None] * layers + torch.randperm(layers, generator=generator)).flatten()
        parts.add(SparseCodes.from_dense(dense[rows]), group[rows], token[rows])
    a, b = whole.summary(), parts.summary()
    assert vars(a.variances) == pytest.approx(vars(b.variances), rel=1e-12)
    assert (a.layers_per_pair, a.mean_std) == pytest.approx((b.layers_per_pair, b.mean_std))
    # the law of total variance, against the joint law made densely
    p = dense.reshape(tokens, layers, d_sae).permute(1, 0, 2).double()
    p = p / p.sum()
    layer = torch.arange(layers, dtype=torch.float64)[:, None, None]

    def within(axes: tuple[int, ...]) -> float:
        mass = p.sum((0, *axes), keepdim=True)
        mean = (p * layer).sum((0, *axes), keepdim=True) / mass.clamp_min(1e-30)
        return float((p * (layer - mean).square()).sum())

    v = a.variances
    assert v.single_token == pytest.approx(within(()), rel=1e-10)
    assert v.aggregated == pytest.approx(within((1,)), rel=1e-10)
    assert v.total == pytest.approx(within((1, 2)), rel=1e-10)
    assert 0 < v.single_token < v.aggregated < v.total


def planted(kind: str, tokens: int = 600, layers: int = 6) -> LayerUse:
    """One feature a token: at one layer that differs by token, at one fixed, or at all alike."""
    generator = torch.Generator().manual_seed(0)
    a = torch.zeros(tokens, layers, 2)
    if kind == "drifting":
        a[torch.arange(tokens), torch.randint(layers, (tokens,), generator=generator), 0] = 1
    elif kind == "fixed":
        a[:, 2, 0] = 1
        a[:, 4, 1] = 1
    else:
        a[:, :3, 0] = 1
    use = LayerUse(2, layers)
    group = torch.arange(layers).repeat(tokens)
    token = torch.arange(tokens).repeat_interleave(layers)
    use.add(SparseCodes.from_dense(a.reshape(-1, 2)), group, token)
    return use


def test_planted_layer_use_and_its_null() -> None:
    uniform = 35 / 12  # the variance of a fair die
    drifting = planted("drifting").summary()
    assert drifting.layers_per_pair == 1
    assert drifting.variances.single_token == 0
    assert drifting.variances.aggregated == pytest.approx(uniform, rel=0.1)
    assert drifting.variances.ratio == 0
    fixed = planted("fixed").summary()
    assert fixed.variances.ratio is None
    assert fixed.variances.aggregated == 0
    assert fixed.variances.total == 1
    # a feature that keeps to its layer looks like a drifting one once labels are shuffled
    assert fixed.null.aggregated == pytest.approx(uniform, rel=0.1)
    assert fixed.null.ratio == 0
    spread = planted("spread").summary()
    assert spread.variances.single_token == pytest.approx(2 / 3)
    assert spread.variances.ratio == pytest.approx(1)
    # three of six layers by chance: the mean of their variance is 35/12 * 6/5 * 2/3
    assert spread.null.single_token == pytest.approx(35 / 12 * 6 / 5 * 2 / 3, rel=0.1)
    assert spread.null.aggregated == pytest.approx(uniform, rel=0.1)


def test_the_null_moves_whole_tokens_and_is_seeded() -> None:
    a, b, c = (used(seed=seed).summary() for seed in (0, 0, 3))
    assert a == b
    assert a.variances == c.variances
    # one shuffle of a token's labels serves all its features: with two layers, token 5 keeps
    # features 0 and 1 apart as they were or swapped, so its pairs have the same variances
    assert a.null.single_token == a.variances.single_token


def test_layer_use_of_an_sae(tmp_path: Path) -> None:
    sites = [f"blocks.{n}.hook_resid_post" for n in range(3)]
    rows = {site: torch.full((40, 4), float(n + 1)) for n, site in enumerate(sites)}
    store = make_hand_store(tmp_path / "h", rows, rows)

    class Copy:
        d_sae = 4

        def encode_sparse(self, x: Tensor) -> SparseCodes:
            return SparseCodes.from_dense(x)

    stream = make_stream(store, sites, mix_layers="all", batch_size=12)
    use = layer_use(Copy(), stream.held_out(7)(), 3)
    assert use.tokens == 7
    assert torch.equal(use.totals, torch.tensor([7.0, 14, 21]).double()[:, None].expand(3, 4))
    summary = use.summary()
    assert summary.variances.ratio == pytest.approx(1)
    assert json.loads(json.dumps(summary.to_dict()))["null"]["ratio"] == summary.null.ratio
    assert summary.lines()[0] == "4 used features, 3 layers, 7 tokens"
    with pytest.raises(InputError, match="layer and token"):
        layer_use(Copy(), [RawBatch(torch.ones(1, 4))], 3)


def test_max_cosine_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    W_dec = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0], [-1.0, 0.0], [0.0, 0.0]])
    half = 0.5**0.5
    expected = torch.tensor([half, half, half, 0.0, 0.0])
    assert torch.allclose(max_cosine(W_dec), expected)
    monkeypatch.setattr("sae.analysis.mlsae._FEATURES", 2)
    assert torch.allclose(max_cosine(W_dec), expected)
    assert torch.allclose(max_cosine(torch.ones(2, 3)), torch.ones(2))
    with pytest.raises(InputError, match="two features"):
        max_cosine(W_dec[:1])


def test_bad_input() -> None:
    codes = SparseCodes.from_dense(DENSE)
    for group, token, message in (
        (GROUP + 1, TOKEN, "out of range"),
        (GROUP - 1, TOKEN, "out of range"),
        (GROUP, torch.tensor([5, 5, 5, 9]), "two rows of one layer"),
    ):
        with pytest.raises(InputError, match=message):
            LayerUse(3, 2).add(codes, group, token)
    with pytest.raises(InputError, match="negative"):
        LayerUse(3, 2).add(codes.scale(-1.0), GROUP, TOKEN)
    with pytest.raises(InputError, match="no feature was active"):
        used(torch.zeros(4, 3)).summary()
    with pytest.raises(InputError, match="n_layers"):
        LayerUse(3, 0)
