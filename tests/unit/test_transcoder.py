"""Transcoders against numbers worked out by hand, dense float64 formulae, and their own folding."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.architectures.skip_transcoder import SkipTranscoder, SkipTranscoderConfig
from sae.architectures.transcoder import Transcoder, TranscoderConfig
from sae.core.base import TrainingState
from sae.core.batch import TrainingBatch
from sae.core.normaliser import Normaliser
from sae.formats.load import load
from saescope.errors import InputError

X = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
T = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 5.0], [1.0, 0.0, 1.0]])


def batch(y: Tensor, target: Tensor, variance: float = 1.0) -> TrainingBatch:
    return TrainingBatch(y=y, target=target, variance=variance)


def state(n: int, *dead: int) -> TrainingState:
    return TrainingState(dead=torch.isin(torch.arange(n), torch.tensor(dead)))


def by_hand(**options) -> Transcoder:
    """d_in 2, d_sae 3, d_out 3."""
    sae = Transcoder(TranscoderConfig(d_sae=3, **options), 2, 3)
    return set_by_hand(sae)


def set_by_hand(sae):
    with torch.no_grad():
        sae.W_enc_T.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
        sae.b_enc.copy_(torch.tensor([0.0, 0.5, 0.0]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.0, 3.0, 4.0]]))
        sae.b_dec.copy_(torch.tensor([0.0, 1.0, 0.0]))
    return sae


def test_topk_by_hand() -> None:
    sae = by_hand(k=1)
    # b_dec is in the output's space and is not subtracted: pre = (2,.5,-2), (0,1.5,-1), (-1,-.5,2)
    assert sae.encode(X).tolist() == [[2, 0, 0], [0, 1.5, 0], [0, 0, 2]]
    expected = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [0.0, 7.0, 8.0]])
    torch.testing.assert_close(sae(X).x_hat, expected)
    # errors (0,0,0), (0,-1,2), (1,-7,-7): squares 0, 5, 99
    output = sae.training_output(batch(X, T, variance=2.0), state(3))
    assert float(output.loss.detach()) == pytest.approx(104 / 3 / 2)
    assert output.counts.tolist() == [1, 1, 1]


def test_relu_by_hand() -> None:
    sae = by_hand(activation="relu", l1_coefficient=0.5, l1_warmup_fraction=0.0)
    assert sae.encode(X).tolist() == [[2, 0.5, 0], [0, 1.5, 0], [0, 0, 2]]
    output = sae.training_output(batch(X, T, variance=4.0), state(3))
    # the first row's error is (0,0,-1) now; decoder norms 1, 2, 5: f . norm = 3, 3, 10
    assert float(output.terms["fvu"]) == pytest.approx((1 + 5 + 99) / 3 / 4)
    assert float(output.terms["l1"]) == pytest.approx((3 + 3 + 10) / 3 / 2)
    assert float(output.loss.detach()) == pytest.approx(105 / 12 + 0.5 * 16 / 6)


def test_jumprelu_by_hand() -> None:
    """The input is at another scale than the target: bandwidth is of the one, tanh of the other."""
    sae = by_hand(activation="jumprelu", l0_coefficient=0.5, l0_warmup_fraction=0.0, tanh_scale=1.0)
    with torch.no_grad():
        sae.threshold.copy_(torch.tensor([0.0, 1.0, 2.0]))
    assert sae.encode(X).tolist() == [[2, 0, 0], [0, 1.5, 0], [0, 0, 0]]  # 2 is not above 2
    sae.normaliser = Normaliser.identity(2, variance=2.0 * 0.25**2)  # bandwidth 2 x 0.25
    output = sae.training_output(batch(X, T, variance=12.0), state(3))
    # errors (0,0,0), (0,1,-2), (-1,1,-1): squares 0, 5, 3; f . norm = 2 and 3, over sqrt(12 / 3)
    assert float(output.terms["fvu"]) == pytest.approx(8 / 3 / 12)
    penalty = (math.tanh(2 / 2) + math.tanh(3 / 2)) / 3 / 2
    assert float(output.terms["sparsity"]) == pytest.approx(penalty)
    assert float(output.loss.detach()) == pytest.approx(8 / 36 + 0.5 * penalty)
    assert output.counts.tolist() == [1, 1, 0]
    output.loss.backward()
    # z - theta is within 0.25 for feature 2 alone, on the last row, where its z is theta = 2
    assert sae.threshold.grad is not None
    assert sae.threshold.grad[:2].tolist() == [0, 0]
    error = -T[2] + torch.tensor([0.0, 1.0, 0.0])
    slope = -(2 / 0.5) * (2 * error @ sae.W_dec[2] / 3 / 12 + 0.5 * (5 / 2) / 3 / 2)
    assert float(sae.threshold.grad[2]) == pytest.approx(float(slope.detach()))


def test_thresholds_keep_float32_under_bfloat16() -> None:
    sae = by_hand(activation="jumprelu")
    with torch.no_grad():
        sae.threshold.fill_(1.2345678)
    assert sae.to(torch.bfloat16).threshold[0].item() == pytest.approx(1.2345678, rel=1e-7)
    assert sae.W_dec.dtype == torch.bfloat16


def test_skip_by_hand() -> None:
    sae = set_by_hand(SkipTranscoder(SkipTranscoderConfig(d_sae=3, k=1), 2, 3))
    with torch.no_grad():
        sae.W_skip.copy_(torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]]))
    expected = torch.tensor([[4.0, 1.0, -2.0], [0.0, 3.0, 3.0], [-1.0, 5.0, 9.0]])
    torch.testing.assert_close(sae(X).x_hat, expected)
    torch.testing.assert_close(sae.decode(sae.encode(X), like=X), expected)
    with pytest.raises(InputError, match="the skip path needs the activations"):
        sae.decode(sae.encode(X))


def dense_loss(sae: Transcoder, data: TrainingBatch, dead: Tensor) -> Tensor:
    """The objectives, dense and float64, written without the kernels."""
    pre = data.y @ sae.W_enc_T.T + sae.b_enc
    config = sae.config
    if config.activation == "jumprelu":
        return dense_jumprelu_loss(sae, data, pre, dead)
    mask = (pre > 0).double()
    if config.activation == "topk":
        mask = torch.zeros_like(pre).scatter(1, pre.topk(config.k, dim=1).indices, 1.0)
    f = torch.relu(pre) * mask
    y_hat = f @ sae.W_dec + sae.b_dec
    if isinstance(sae, SkipTranscoder):
        y_hat = y_hat + data.y @ sae.W_skip
    fvu = (data.target - y_hat).square().sum(1).mean() / data.variance
    if config.activation == "relu":
        norms = sae.W_dec.square().sum(1).sqrt()
        return fvu + config.l1_coefficient * (f * norms).sum(1).mean() / data.variance**0.5
    e = (data.target - y_hat).detach()
    e_hat = torch.relu(pre[:, dead]) @ sae.W_dec[dead]
    aux = (e - e_hat).square().sum() / (e - e.mean(0)).square().sum()
    return fvu + config.auxk_coefficient * aux


def dense_jumprelu_loss(sae, data: TrainingBatch, z: Tensor, dead: Tensor) -> Tensor:
    """Straight-through slopes as tangents in theta, added where theta is the threshold itself."""
    config, theta = sae.config, sae.threshold
    s_in, s_out = (sae.normaliser.variance / sae.d_in) ** 0.5, (data.variance / sae.d_out) ** 0.5
    eps = config.bandwidth * s_in
    above = (z > theta).double().detach()
    kernel = ((z - theta).abs() < eps / 2).double().detach()
    moved = theta - theta.detach()
    f = z * above - theta.detach() / eps * kernel * moved
    active = above - kernel / eps * moved
    y_hat = f @ sae.W_dec + sae.b_dec
    if isinstance(sae, SkipTranscoder):
        y_hat = y_hat + data.y @ sae.W_skip
    fvu = (data.target - y_hat).square().sum(1).mean() / data.variance
    norms = sae.W_dec.square().sum(1).sqrt()
    if config.penalty == "tanh":
        active = torch.tanh(config.tanh_scale * f * norms / s_out)
    penalty = active.sum(1).mean() / sae.d_in
    short = (torch.relu(theta - z) * norms)[:, dead].sum(1).mean() / s_out / sae.d_in
    return fvu + config.l0_coefficient * penalty + config.pre_act_coefficient * short


@pytest.mark.parametrize("cls", [Transcoder, SkipTranscoder])
@pytest.mark.parametrize("penalty", ["tanh", "step"])
def test_jumprelu_gradients_equal_the_dense_float64_objective(cls, penalty: str) -> None:
    torch.manual_seed(0)
    config = cls.Config(
        d_sae=40,
        activation="jumprelu",
        penalty=penalty,
        l0_warmup_fraction=0.0,
        pre_act_coefficient=0.1,
    )
    sae = cls(config, 7, 4).double()
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    sae.normaliser = Normaliser.identity(7, variance=1.7)
    torch.nn.init.uniform_(sae.threshold, 0.1, 0.8)
    y = torch.randn(33, 7, dtype=torch.float64)
    data = batch(y, torch.randn(33, 4, dtype=torch.float64), variance=3.0)
    now = state(40, 3, 8, 21)
    loss = sae.training_output(data, now).loss
    loss.backward()
    fast = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad()
    expected = dense_loss(sae, data, now.dead)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert fast["threshold"].count_nonzero() > 30
    for name, p in sae.named_parameters():
        torch.testing.assert_close(fast[name], p.grad, msg=name)


@pytest.mark.parametrize("cls", [Transcoder, SkipTranscoder])
@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_gradients_equal_the_dense_float64_objective(cls, activation: str) -> None:
    torch.manual_seed(0)
    config = cls.Config(d_sae=40, k=5, activation=activation, l1_warmup_fraction=0.0)
    sae = cls(config, 7, 4).double()
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    y = torch.randn(33, 7, dtype=torch.float64)
    data = batch(y, torch.randn(33, 4, dtype=torch.float64), variance=3.0)
    now = state(40, 3, 8, 21)
    loss = sae.training_output(data, now).loss
    loss.backward()
    fast = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad()
    expected = dense_loss(sae, data, now.dead)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, p in sae.named_parameters():
        torch.testing.assert_close(fast[name], p.grad, msg=name)


def fitted(kind: str, x: Tensor) -> Normaliser:
    return Normaliser.fit(
        kind,  # type: ignore[arg-type]
        mean=x.double().mean(0),
        mean_square=float(x.double().square().sum(1).mean()),
        sample=x,
    )


def random_sae(cls, activation: str, inside: str, outside: str):
    """Random weights, real normalisers of an input and an output of unlike scale and mean."""
    torch.manual_seed(1)
    sae = cls(cls.Config(d_sae=30, k=4, activation=activation), 6, 5).eval()
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter)
    if activation == "jumprelu":
        torch.nn.init.uniform_(sae.threshold)
    x, t = 3 * torch.randn(100, 6) + 2, 70 * torch.randn(100, 5) - 11
    sae.normaliser, sae.output_normaliser = fitted(inside, x), fitted(outside, t)
    return sae, x


KINDS = ["none", "unit_mean_square", "sqrt_d", "centred"]


@pytest.mark.parametrize("cls", [Transcoder, SkipTranscoder])
@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu"])
@pytest.mark.parametrize(
    ("inside", "outside"), [*((k, k) for k in KINDS), ("centred", "none"), ("sqrt_d", "centred")]
)
def test_folding_changes_nothing(cls, activation: str, inside: str, outside: str) -> None:
    """The input's mean goes through W_skip into b_dec, each side has its own scale."""
    sae, x = random_sae(cls, activation, inside, outside)
    folded = sae.fold()
    assert folded.normaliser.is_identity
    assert folded.normaliser_out.is_identity
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
    f, x_hat = sae.encode(x), sae(x).x_hat
    size = float(x_hat.abs().max().detach())
    torch.testing.assert_close(folded.encode(x), f, **close)
    torch.testing.assert_close(folded(x).x_hat / size, x_hat / size, **close)
    # the weights are in the model's units themselves
    plain = f @ folded.W_dec + folded.b_dec
    if cls is SkipTranscoder:
        plain = plain + x @ folded.W_skip
    torch.testing.assert_close(plain / size, x_hat / size, **close)
    again = folded.unfold(sae.normaliser, sae.output_normaliser)
    torch.testing.assert_close(again(x).x_hat / size, x_hat / size, **close)


@pytest.mark.parametrize("cls", [Transcoder, SkipTranscoder])
def test_saved_with_both_normalisers(cls, tmp_path: Path) -> None:
    sae, x = random_sae(cls, "jumprelu", "centred", "sqrt_d")
    sae.metadata = {"site": "blocks.0.hook_mlp_in", "target_site": "blocks.0.hook_mlp_out"}
    sae.save(tmp_path / "sae")
    again = load(tmp_path / "sae")
    assert type(again) is cls
    assert (again.d_in, again.d_out, again.metadata) == (6, 5, sae.metadata)
    assert again.output_normaliser is not None
    assert again.output_normaliser.kind == "sqrt_d"
    assert torch.equal(again.encode(x), sae.encode(x))
    assert torch.equal(again(x).x_hat, sae(x).x_hat)


def test_start_predicts_the_mean_and_no_feature_is_favoured() -> None:
    torch.manual_seed(0)
    sae = SkipTranscoder(SkipTranscoderConfig(d_sae=64, k=4), 10, 6)
    y = torch.randn(500, 10) + 20 * torch.ones(10)  # a mean that dwarfs what varies
    target = torch.randn(500, 6) + 3
    sae.start(batch(y, target))
    y_hat = sae(y).x_hat
    torch.testing.assert_close(y_hat, target.mean(0).expand(500, 6))
    counts = sae.encode_sparse(y).counts()
    assert int((counts > 0).sum()) > 55
    sae.normaliser = fitted("standardised", y)
    with pytest.raises(InputError, match="says nothing of the output's"):
        sae.start(batch(y, target))


@pytest.mark.parametrize(
    ("cls", "activation"),
    [
        (Transcoder, "topk"),
        (Transcoder, "relu"),
        (Transcoder, "jumprelu"),
        (SkipTranscoder, "topk"),
        (SkipTranscoder, "jumprelu"),
    ],
)
def test_learns_a_sparse_map(cls, activation: str) -> None:
    """Planted: 12 directions of the input, each read by a threshold, write 12 of the output."""
    torch.manual_seed(0)
    reads = torch.nn.functional.normalize(torch.randn(12, 16), dim=1)
    writes = torch.nn.functional.normalize(torch.randn(12, 8), dim=1)
    active = torch.rand(1000, 12) * (torch.rand(1000, 12) < 0.15)
    y, target = active @ reads, active @ writes
    variance = float((target - target.mean(0)).square().sum(1).mean())
    sae = cls(cls.Config(d_sae=32, k=3, activation=activation, l1_coefficient=0.1), 16, 8)
    data = batch(y, target, variance)
    sae.normaliser = Normaliser.identity(16, float((y - y.mean(0)).square().sum(1).mean()))
    sae.start(data)
    optimiser = torch.optim.Adam(sae.parameters(), lr=1e-2)
    now = state(32)
    now.total_steps = 250
    fvu = []
    for now.step in range(250):
        output = sae.training_output(data, now)
        optimiser.zero_grad()
        output.loss.backward()
        sae.before_step()
        optimiser.step()
        sae.after_step()
        fvu.append(float(output.terms["fvu"]))
    assert fvu[0] == pytest.approx(1, abs=1e-4)
    assert fvu[-1] < 0.1
    assert float(sae.training_output(data, now).l0) < 6


def test_configuration() -> None:
    assert TranscoderConfig(k=8).with_target_l0(20).k == 20
    relu = TranscoderConfig(activation="relu")
    assert relu.with_target_l0(17.5) == relu
    assert Transcoder(TranscoderConfig(d_sae=4, activation="relu"), 3, 2).penalised
    jumping = TranscoderConfig(activation="jumprelu", l0_warmup_fraction=0.7)
    assert jumping.with_target_l0(17.5).calibrated_l0 == 17.5
    assert jumping.penalty_warmup == 0.7
    assert Transcoder(TranscoderConfig(d_sae=4, activation="jumprelu"), 3, 2).penalised
    assert not by_hand(k=1).penalised
    with pytest.raises(InputError, match="k is a whole number"):
        TranscoderConfig().with_target_l0(17.5)
    with pytest.raises(InputError, match="no such activation"):
        TranscoderConfig(activation="gelu")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no such penalty"):
        TranscoderConfig(penalty="quadratic")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"sae\.k"):
        TranscoderConfig(d_sae=16, k=17)
