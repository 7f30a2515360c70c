"""Crosscoders against numbers worked out by hand, a per-site float64 formula, and folding."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae.architectures.crosscoder import Crosscoder, CrosscoderConfig
from sae.core.base import TrainingState
from sae.core.batch import TrainingBatch
from sae.core.normaliser import Normaliser
from sae.formats.load import load
from saescope.errors import InputError

WIDTHS = [2, 3, 4]
SITES = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.1.mlp.hook_post"]
X = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])


def state(n: int, *dead: int) -> TrainingState:
    return TrainingState(dead=torch.isin(torch.arange(n), torch.tensor(dead)))


def by_hand(**options) -> Crosscoder:
    """Two sites of width 1, d_sae 3."""
    sae = Crosscoder(CrosscoderConfig(d_sae=3, l1_warmup_fraction=0.0, **options), 2)
    sae.metadata = {"sites": ["a", "b"], "site_widths": [1, 1]}
    with torch.no_grad():
        sae.W_enc_T.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
        sae.b_enc.copy_(torch.tensor([0.0, 0.5, 0.0]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, -2.0]]))
        sae.b_dec.copy_(torch.tensor([0.0, 1.0]))
    return sae


def test_relu_by_hand() -> None:
    sae = by_hand(l1_coefficient=0.5)
    # no pre-encoder bias: pre = (2, .5, -2), (0, 1.5, -1), (-1, -.5, 2)
    assert sae.encode(X).tolist() == [[2, 0.5, 0], [0, 1.5, 0], [0, 0, 2]]
    expected = torch.tensor([[3.5, 3.0], [4.5, 7.0], [0.0, -3.0]])
    torch.testing.assert_close(sae(X).x_hat, expected)
    # errors (1.5, 3), (4.5, 6), (1, -2); norms summed over sites: 1, 7, 2 (not the joint 1, 5, 2)
    output = sae.training_output(TrainingBatch.of(X, variance=2.0), state(3))
    fvu = (2.25 + 9 + 20.25 + 36 + 1 + 4) / 3 / 2
    l1 = (2 * 1 + 0.5 * 7 + 1.5 * 7 + 2 * 2) / 3 / (2 * 2.0) ** 0.5
    assert float(output.terms["fvu"]) == pytest.approx(fvu)
    assert float(output.terms["l1"]) == pytest.approx(l1)
    assert float(output.loss.detach()) == pytest.approx(fvu + 0.5 * l1)


def test_topk_chooses_by_what_a_feature_writes() -> None:
    sae = by_hand(activation="topk", k=1)
    # row 0: 2 * 1 < 0.5 * 7, so the weaker activation with the longer decoder row is kept
    torch.testing.assert_close(sae.encode(X), torch.tensor([[0, 0.5, 0], [0, 1.5, 0], [0, 0, 2]]))
    output = sae.training_output(TrainingBatch.of(X), state(3))
    assert output.counts.tolist() == [0, 2, 1]


def test_batchtopk_by_hand() -> None:
    sae = by_hand(activation="batchtopk", k=2 / 3).train()
    # w f: 2, 3.5, 10.5, 4; the budget of 2 takes 10.5 and 4
    output = sae.training_output(TrainingBatch.of(X), state(3))
    assert output.counts.tolist() == [0, 1, 1]
    assert float(sae.threshold) == 4
    sae.calibrate(lambda: iter([X[:1], X[1:]]))
    assert float(sae.threshold) == pytest.approx((4 + 3.5) / 2)
    assert sae.eval().encode(X).count_nonzero(0).tolist() == [0, 1, 1]
    assert sae.batch_level
    assert not by_hand().batch_level


def test_the_threshold_keeps_float32_under_bfloat16() -> None:
    sae = by_hand(activation="batchtopk", k=1)
    sae.threshold.fill_(1.2345678)
    assert float(sae.to(torch.bfloat16).threshold) == pytest.approx(1.2345678, rel=1e-7)
    assert sae.W_dec.dtype == torch.bfloat16


def test_norms_over_sites() -> None:
    sae = by_hand()
    assert sae.site_norms().tolist() == [[1, 0], [3, 4], [0, 2]]
    found = sae.relative_norms()
    torch.testing.assert_close(found, torch.tensor([[1, 0], [3 / 7, 4 / 7], [0, 1]]))
    assert sae.columns == {"a": slice(0, 1), "b": slice(1, 2)}
    with torch.no_grad():
        sae.W_dec[0] = 0
    assert sae.relative_norms()[0].tolist() == [0, 0]
    sae.metadata["site_widths"] = [1, 2]
    with pytest.raises(InputError, match=r"do not add up \(given: \[1, 2\]; allowed: 2 in all"):
        sae.site_norms()
    with pytest.raises(InputError, match="reads all its sites at once"):
        sae.at("a")


def per_site_loss(sae: Crosscoder, data: TrainingBatch, dead: Tensor) -> Tensor:
    """The paper's objective with its sums over sites written out, dense and float64."""
    config = sae.config
    columns = [slice(0, 2), slice(2, 5), slice(5, 9)]
    pre = sae.b_enc + sum(data.y[:, c] @ sae.W_enc_T[:, c].T for c in columns)
    norms = sum(sae.W_dec[:, c].square().sum(1).sqrt() for c in columns)
    assert isinstance(norms, Tensor)
    assert isinstance(pre, Tensor)
    mask = (pre > 0).double()
    scored = (pre * norms).detach()
    if config.activation == "topk":
        chosen = scored.topk(int(config.k), dim=1).indices
        mask = torch.zeros_like(pre).scatter(1, chosen, 1.0)
    if config.activation == "batchtopk":
        chosen = scored.flatten().topk(round(config.k * len(pre))).indices
        mask = torch.zeros_like(pre).flatten().scatter(0, chosen, 1.0).view_as(pre)
    f = torch.relu(pre) * mask
    errors = [data.y[:, c] - f @ sae.W_dec[:, c] - sae.b_dec[c] for c in columns]
    fvu = sum(e.square().sum(1).mean() for e in errors) / data.variance
    if config.activation == "relu":
        penalty = (f * norms).sum(1).mean() / (3 * data.variance) ** 0.5
        return fvu + config.l1_coefficient * penalty
    e = torch.cat(errors, dim=1).detach()
    e_hat = torch.relu(pre[:, dead]) @ sae.W_dec[dead]
    aux = (e - e_hat).square().sum() / (e - e.mean(0)).square().sum()
    return fvu + config.auxk_coefficient * aux


@pytest.mark.parametrize(("activation", "k"), [("relu", 1), ("topk", 5), ("batchtopk", 4.5)])
def test_gradients_equal_the_sums_over_sites(activation: str, k: float) -> None:
    torch.manual_seed(0)
    config = CrosscoderConfig(d_sae=40, activation=activation, k=k, l1_warmup_fraction=0.0)  # type: ignore[arg-type]
    sae = Crosscoder(config, 9).double()
    sae.metadata = {"sites": SITES, "site_widths": WIDTHS}
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    data = TrainingBatch.of(torch.randn(34, 9, dtype=torch.float64), variance=3.0)
    now = state(40, 3, 8, 21)
    loss = sae.training_output(data, now).loss
    loss.backward()
    fast = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad()
    expected = per_site_loss(sae, data, now.dead)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, p in sae.named_parameters():
        torch.testing.assert_close(fast[name], p.grad, msg=name)


def on_sites(kind: str, activation: str = "relu") -> tuple[Crosscoder, Tensor]:
    """Random weights over three sites of very unlike scale and mean."""
    torch.manual_seed(1)
    config = CrosscoderConfig(d_sae=30, activation=activation, k=4)  # type: ignore[arg-type]
    sae = Crosscoder(config, 9).eval()
    sae.metadata = {"sites": SITES, "site_widths": WIDTHS}
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter)
    offset = torch.tensor([3.0] * 2 + [-100.0] * 3 + [0.0] * 4)
    x = torch.randn(100, 9) * torch.tensor([1.0] * 2 + [50.0] * 3 + [7.0] * 4) + offset
    parts = [
        Normaliser.fit(
            kind,  # type: ignore[arg-type]
            mean=site.double().mean(0),
            mean_square=float(site.double().square().sum(1).mean()),
            sample=site,
        )
        for site in x.split(WIDTHS, dim=1)
    ]
    sae.normaliser = Normaliser.side_by_side(parts)
    sae.calibrate(lambda: [sae.normaliser.apply(x)])
    return sae, x


@pytest.mark.parametrize("kind", ["none", "unit_mean_square", "sqrt_d", "centred"])
@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk"])
def test_folding_a_scale_a_site_changes_nothing(activation: str, kind: str) -> None:
    """Neither codes nor reconstructions, and not what is counted by decoder norms."""
    sae, x = on_sites(kind, activation)
    if activation == "batchtopk":
        assert float(sae.encode_sparse(x).l0().double().mean()) == 4
    folded = sae.fold()
    assert folded.normaliser.is_identity
    f = sae.encode(x)
    torch.testing.assert_close(folded.encode(x), f, rtol=1e-5, atol=1e-5 * float(f.detach().max()))
    plain = f @ folded.W_dec + folded.b_dec
    triples = zip(
        *(t.split(WIDTHS, 1) for t in (folded(x).x_hat, sae(x).x_hat, plain)), strict=True
    )
    for ours, expected, by_weights in triples:
        size = float(expected.abs().max().detach())
        torch.testing.assert_close(ours / size, expected / size, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(by_weights / size, expected / size, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(folded.relative_norms(), sae.relative_norms())
    back = folded.unfold(sae.normaliser)
    torch.testing.assert_close(back.encode(x), f, rtol=1e-4, atol=1e-4 * float(f.detach().max()))
    torch.testing.assert_close(back.norm_scale, sae.norm_scale)


def test_saved_and_loaded_is_the_same_to_the_bit(tmp_path: Path) -> None:
    for name, made in {
        "trained": on_sites("centred", "batchtopk")[0],
        "folded": on_sites("sqrt_d", "topk")[0].fold(),
    }.items():
        x = on_sites("centred")[1]
        made.save(tmp_path / name)
        again = load(tmp_path / name)
        assert isinstance(again, Crosscoder)
        assert again.normaliser.scale.shape == made.normaliser.scale.shape
        assert torch.equal(again.encode(x), made.encode(x))
        assert torch.equal(again(x).x_hat, made(x).x_hat)
        assert torch.equal(again.relative_norms(), made.relative_norms())
        assert list(again.columns) == SITES


def test_finds_which_sites_a_feature_is_at() -> None:
    """Planted: 6 features at the first site alone, 6 at both; no second site of its own."""
    generator = torch.Generator().manual_seed(0)

    def directions(n: int, d: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1)

    first, second = directions(12, 12), directions(12, 20)
    second[:6] = 0
    fires = torch.rand(2000, 12, generator=generator) < 0.1
    active = fires * (0.5 + torch.rand(2000, 12, generator=generator))
    x = torch.cat([active @ first, active @ second], dim=1)
    torch.manual_seed(0)
    sae = Crosscoder(CrosscoderConfig(d_sae=24, l1_coefficient=0.1), 32)
    sae.metadata = {"sites": ["a", "b"], "site_widths": [12, 20]}
    variance = float((x - x.mean(0)).square().sum(1).mean())
    data, now = TrainingBatch.of(x, variance=variance), state(24)
    now.total_steps = 300
    sae.start(data)
    optimiser = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for now.step in range(300):
        output = sae.training_output(data, now)
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
    assert float(sae.training_output(data, now).terms["fvu"]) < 0.1
    cosine = torch.nn.functional.normalize(sae.W_dec[:, :12].detach(), dim=1) @ first.T
    own = cosine.argmax(0)
    assert float(cosine.max(0).values.min()) > 0.95
    share = sae.relative_norms()[own, 1]
    assert (share[:6] < 0.1).all()
    assert (share[6:] > 0.35).all()


def test_configuration() -> None:
    assert CrosscoderConfig(activation="topk").with_target_l0(20).k == 20
    assert CrosscoderConfig(activation="batchtopk").with_target_l0(17.5).k == 17.5
    assert CrosscoderConfig().with_target_l0(17.5) == CrosscoderConfig()
    assert by_hand().penalised
    assert not by_hand(activation="topk", k=1).penalised
    with pytest.raises(InputError, match="must be whole"):
        CrosscoderConfig(activation="topk", k=3.5)
    with pytest.raises(InputError, match="no such activation"):
        CrosscoderConfig(activation="gelu")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="writes the sites that it reads"):
        Crosscoder(CrosscoderConfig(d_sae=4), 3, 2)
