"""JumpReLU SAE: by hand, against a dense float64 objective, and its estimated gradients."""

import math
from typing import Any

import pytest
import torch

from sae.architectures._ste import jump_relu, step
from sae.architectures.jumprelu import JumpReLUConfig, JumpReLUSAE
from sae.core.base import TrainingState
from sae.core.batch import TrainingBatch
from sae.core.normaliser import Normaliser
from sae.formats.load import load
from saescope.errors import InputError

ROWS = torch.tensor([[3.0, 1.0], [1.0, 1.0], [0.0, -4.0]])


def plain(**options: Any) -> JumpReLUConfig:
    """A configuration without warm-up and without pre-activation loss, unless given."""
    return JumpReLUConfig(**{"l0_warmup_fraction": 0.0, "pre_act_coefficient": 0.0, **options})


def by_hand(**options: Any) -> JumpReLUSAE:
    """d_in 2, d_sae 3, with weights that can be multiplied in the head."""
    config = plain(d_sae=3, **options)
    sae = JumpReLUSAE(config, 2)
    theta = torch.tensor([1.0, 2.0, 4.0])
    with torch.no_grad():
        sae.W_enc_T.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.6, -0.8]]))
        sae.b_enc.copy_(torch.tensor([0.0, 0.5, 0.0]))
        sae.b_dec.copy_(torch.tensor([1.0, 0.0]))
        if config.parametrisation == "log":
            sae.log_threshold.copy_(theta.log())
        else:
            sae.threshold.copy_(theta)
    return sae


# x - b_dec = (2,1), (0,1), (-1,-4); z = (2, 1.5, -3), (0, 1.5, -1), (-1, -3.5, 5)


@pytest.mark.parametrize("parametrisation", ["theta", "log"])
def test_forward_by_hand(parametrisation: str) -> None:
    sae = by_hand(parametrisation=parametrisation)
    torch.testing.assert_close(sae.theta, torch.tensor([1.0, 2.0, 4.0]))
    assert sae.encode(ROWS).tolist() == [[2, 0, 0], [0, 0, 0], [0, 0, 5]]
    expected = torch.tensor([[3.0, 0.0], [1.0, 0.0], [-2.0, -4.0]])
    torch.testing.assert_close(sae(ROWS).x_hat, expected)


FVU = (1 + 1 + 4) / 3 / 8  # errors (0,1), (0,1), (2,0), over the variance
UNIT = (8 / 2) ** 0.5


@pytest.mark.parametrize(
    ("penalty", "value"),
    [
        ("step", 2 / 3 / 2),
        ("tanh", (math.tanh(3 * 2 / UNIT) + math.tanh(3 * 5 / UNIT)) / 3 / 2),
        ("quadratic", (2 / 3 / 0.5 - 1) ** 2),
    ],
)
def test_loss_by_hand(penalty: str, value: float) -> None:
    sae = by_hand(penalty=penalty, l0_coefficient=0.7, tanh_scale=3.0, l0_target=0.5)
    output = sae.training_output(TrainingBatch.of(ROWS, variance=8.0), TrainingState(penalty=3.0))
    assert float(output.terms["fvu"]) == pytest.approx(FVU)
    assert float(output.terms["sparsity"]) == pytest.approx(value)
    assert float(output.loss.detach()) == pytest.approx(FVU + 3 * 0.7 * value)
    assert output.counts.tolist() == [1, 0, 1]


@pytest.mark.parametrize("penalty", ["step", "tanh", "quadratic"])
def test_frequent_features_cost_more_by_hand(penalty: str) -> None:
    """Features fire on 3, 1 and 1 of 4 rows: f = 3/4, 1/4, 1/4, their squares 11/16."""
    rows = torch.cat([ROWS, torch.tensor([[4.0, 3.0]])])
    rows[1] = torch.tensor([3.0, 1.0])  # x - b_dec = (2,1) twice, (-1,-4), (3,3)
    options: dict[str, Any] = {"penalty": penalty, "l0_coefficient": 0.7, "l0_target": 0.5}
    batch, state = TrainingBatch.of(rows, variance=8.0), TrainingState(penalty=3.0)
    without = by_hand(**options).training_output(batch, state)
    output = by_hand(**options, frequency_scale=0.2).training_output(batch, state)
    assert output.counts.tolist() == [3, 1, 1]
    assert "frequency" not in without.terms
    assert float(output.terms["frequency"]) == pytest.approx(11 / 16 / 0.2 / 2)
    assert float(output.terms["sparsity"]) == float(without.terms["sparsity"])
    added = float(output.loss.detach() - without.loss.detach())
    assert added == pytest.approx(3 * 0.7 * 11 / 16 / 0.2 / 2)
    if penalty == "step":  # the published sum_i f_i (1 + f_i / f_0)
        published = 0.75 * (1 + 0.75 / 0.2) + 2 * 0.25 * (1 + 0.25 / 0.2)
        found = float(output.terms["sparsity"] + output.terms["frequency"])
        assert found == pytest.approx(published / 2)


def test_the_gradient_of_frequencies_is_a_finite_difference_of_the_penalty() -> None:
    """Rows that lie evenly: counts are linear in a threshold, so a difference over a band is exact.

    (f+ ^2 - f- ^2) / eps = -2 f (f- - f+) / eps, since (f+ + f-) / 2 is f where they are linear.
    """
    config = plain(d_sae=3, bandwidth=0.5, l0_coefficient=1.0, frequency_scale=0.05)
    sae = JumpReLUSAE(config, 1).double()
    at = torch.tensor([0.8, 1.0, 1.7], dtype=torch.float64)
    y = (torch.arange(4000, dtype=torch.float64)[:, None] + 0.5) / 1000 - 2  # -2 to 2
    batch = TrainingBatch.of(y, variance=1.0)
    with torch.no_grad():
        sae.W_enc_T.copy_(torch.tensor([[1.0], [0.9], [-1.0]]))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
        sae.W_dec.zero_()  # nothing is reconstructed: thresholds feel the penalty alone

    def penalty(theta: torch.Tensor) -> float:
        with torch.no_grad():
            sae.threshold.copy_(theta)
            terms = sae.training_output(batch, TrainingState()).terms
        return float(terms["sparsity"] + terms["frequency"])

    width = config.bandwidth / 2
    slopes = [
        (penalty(at + direction) - penalty(at - direction)) / (2 * width)
        for direction in torch.eye(3, dtype=torch.float64) * width
    ]
    with torch.no_grad():
        sae.threshold.copy_(at)
    sae.training_output(batch, TrainingState()).loss.backward()
    assert sae.threshold.grad is not None
    assert sae.threshold.grad.tolist() == pytest.approx(slopes, rel=5e-3)
    # of the first, f = 1.2 / 4 and its slope -1 / 4: -(1 + 2 f / f_0) / 4
    assert slopes[0] == pytest.approx(-(1 + 2 * 0.3 / 0.05) / 4, rel=5e-3)
    # those that fire more often are pressed harder
    assert sae.threshold.grad[0] < sae.threshold.grad[2] < -0.25


def test_a_scale_of_frequencies_is_above_0() -> None:
    with pytest.raises(InputError, match=r"sae\.frequency_scale.*given: 0"):
        plain(d_sae=3, frequency_scale=0.0)


def test_features_that_fire_often_go() -> None:
    """The most frequent feature of a short run, against the mean of all."""
    most = []
    for scale in (None, 0.02):
        torch.manual_seed(0)
        config = JumpReLUConfig(
            d_sae=64, penalty="quadratic", l0_target=4.0, frequency_scale=scale, l0_coefficient=1.0
        )
        sae = JumpReLUSAE(config, 16)
        y = torch.randn(512, 16) / 4 * torch.linspace(0.2, 1.8, 16)
        batch = TrainingBatch.of(y, variance=float(y.square().sum(1).mean()))
        sae.start(batch)
        optimiser = torch.optim.Adam(sae.parameters(), lr=2e-3)
        counts = torch.zeros(64)
        for number in range(300):
            output = sae.training_output(batch, TrainingState(step=number, total_steps=300))
            optimiser.zero_grad()
            output.loss.backward()
            sae.before_step()
            optimiser.step()
            sae.after_step()
            counts = output.counts.double()
        most.append(float(counts.max() / counts.mean()))
    assert most[0] > 3
    assert most[1] < 1.6


def test_pre_activation_loss_of_dead_features_by_hand() -> None:
    sae = by_hand(l0_coefficient=0.0, pre_act_coefficient=0.5)
    batch, dead = TrainingBatch.of(ROWS, variance=8.0), torch.tensor([False, True, False])
    output = sae.training_output(batch, TrainingState(dead=dead))
    # feature 1 falls short of its threshold 2 by .5, .5 and 5.5
    short = 6.5 / 3 / UNIT / 2
    assert float(output.terms["pre_act"]) == pytest.approx(short)
    assert float(output.loss.detach()) == pytest.approx(FVU + 0.5 * short)
    for none in (torch.zeros(3, dtype=torch.bool), torch.empty(0, dtype=torch.bool)):
        assert sae.training_output(batch, TrainingState(dead=none)).terms["pre_act"] == 0


def test_pre_activation_loss_moves_dead_features_alone() -> None:
    sae = by_hand(l0_coefficient=0.0, pre_act_coefficient=0.5)
    dead = torch.tensor([False, True, False])
    output = sae.training_output(TrainingBatch.of(ROWS, variance=8.0), TrainingState(dead=dead))
    fvu = sae.training_output(TrainingBatch.of(ROWS, variance=8.0), TrainingState())
    (both,) = torch.autograd.grad(output.loss, sae.b_enc)
    (one,) = torch.autograd.grad(fvu.loss, sae.b_enc)
    assert (both - one).tolist() == pytest.approx([0, -0.5 / UNIT / 2, 0])


class _DenseJump(torch.autograd.Function):
    """The pseudo-derivatives as they stand in the paper, on dense [batch, d_sae] matrices."""

    @staticmethod
    def forward(ctx, z, theta, eps, is_step):
        ctx.save_for_backward(z, theta)
        ctx.eps, ctx.is_step = eps, is_step
        heaviside = (z > theta).to(z)
        return heaviside if is_step else z * heaviside

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        z, theta = ctx.saved_tensors
        kernel = (((z - theta) / ctx.eps).abs() < 0.5).to(z)
        if ctx.is_step:
            return None, (-kernel / ctx.eps * gradient).sum(0), None, None
        d_theta = (-theta / ctx.eps * kernel * gradient).sum(0)
        return (z > theta) * gradient, d_theta, None, None


def dense_objective(sae: JumpReLUSAE, y: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    """The loss for variance 7 and 7 coordinates, so that the unit is 1, without the kernels."""
    config = sae.config
    log = config.parametrisation == "log"
    theta = sae.log_threshold.exp() if log else sae.threshold
    z = (y - sae.b_dec) @ sae.W_enc_T.T + sae.b_enc
    f = _DenseJump.apply(z, theta, config.bandwidth, False)
    loss = (y - f @ sae.W_dec - sae.b_dec).square().sum(1).mean() / 7
    norm = sae.W_dec.norm(dim=1)
    if config.penalty == "tanh":
        sparsity = torch.tanh(config.tanh_scale * f * norm).sum(1).mean() / 7
    else:
        l0 = _DenseJump.apply(z, theta, config.bandwidth, True).sum(1).mean()
        quadratic = config.penalty == "quadratic"
        sparsity = (l0 / config.l0_target - 1) ** 2 if quadratic else l0 / 7
    if config.frequency_scale is not None:
        frequency = _DenseJump.apply(z, theta, config.bandwidth, True).mean(0)
        sparsity = sparsity + frequency.square().sum() / config.frequency_scale / 7
    silent = (torch.relu(theta - z) * dead * norm).sum(1).mean() / 7
    return loss + config.l0_coefficient * sparsity + config.pre_act_coefficient * silent


@pytest.mark.parametrize("parametrisation", ["theta", "log"])
@pytest.mark.parametrize("penalty", ["step", "tanh", "quadratic"])
@pytest.mark.parametrize(("bandwidth", "frequency_scale"), [(0.4, None), (3.0, None), (0.4, 0.02)])
def test_gradients_equal_the_dense_float64_objective(
    parametrisation: str, penalty: str, bandwidth: float, frequency_scale: float | None
) -> None:
    """With bands above 0 and with bands that reach below it."""
    torch.manual_seed(0)
    config = plain(
        d_sae=40, penalty=penalty, parametrisation=parametrisation,
        bandwidth=bandwidth, pre_act_coefficient=0.3, l0_target=5.0,
        frequency_scale=frequency_scale,
    )  # fmt: skip
    sae = JumpReLUSAE(config, 7).double()
    with torch.no_grad():
        for name, value in sae.named_parameters():
            value.normal_(std=0.3 if name != "W_enc_T" else 1.0)
        if parametrisation == "theta":
            sae.threshold.abs_()
    y = torch.randn(33, 7, dtype=torch.float64)
    dead = torch.arange(40) % 5 == 0
    loss = sae.training_output(TrainingBatch.of(y, variance=7.0), TrainingState(dead=dead)).loss
    loss.backward()
    fast = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad()
    expected = dense_objective(sae, y, dead)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert len(fast) == 5
    for name, p in sae.named_parameters():
        torch.testing.assert_close(fast[name], p.grad, msg=name)


def test_jump_passes_gradcheck_in_z_away_from_thresholds() -> None:
    theta = torch.tensor([0.5, 0.5, 1.0, 1.0], dtype=torch.float64)
    z = torch.tensor([0.2, 0.9, 1.5, -2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: jump_relu(z, theta, 0.1), z)


def test_step_sends_nothing_to_z() -> None:
    """The penalty on L0 never reaches the encoder, even inside the band."""
    z = torch.tensor([0.9, 1.1], requires_grad=True)
    theta = torch.ones(2, requires_grad=True)
    step(z, theta, 0.5).sum().backward()
    assert z.grad is None
    assert theta.grad is not None
    assert theta.grad.tolist() == [-2, -2]
    # a band is open, at half its width on either side, and the kernel is divided by it once
    # (overcomplete divides twice: training_libraries, defect 11)
    theta = torch.full((4,), 1.0, requires_grad=True)
    step(torch.tensor([0.7, 0.75, 1.2, 1.3]), theta, 0.5).sum().backward()
    assert theta.grad is not None
    assert theta.grad.tolist() == [0, 0, -2, 0]


@pytest.mark.parametrize("parametrisation", ["theta", "log"])
@pytest.mark.parametrize("penalty", ["step", "quadratic"])
def test_mean_estimate_is_the_derivative_of_the_expected_loss(
    parametrisation: str, penalty: str
) -> None:
    """Against a finite difference over many samples, within 5%."""
    config = plain(
        d_sae=1, bandwidth=0.1, l0_coefficient=2.0, penalty=penalty, l0_target=0.1,
        parametrisation=parametrisation,
    )  # fmt: skip
    sae = JumpReLUSAE(config, 1).double()
    z = torch.randn(1_000_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch, state = TrainingBatch.of(z), TrainingState()
    stored = sae.get_parameter("log_threshold" if parametrisation == "log" else "threshold")
    at, width = (math.log(0.7), 0.04) if parametrisation == "log" else (0.7, 0.03)
    with torch.no_grad():
        sae.W_dec.fill_(1.0)
        sae.W_enc_T.fill_(1.0)

    def expected_loss(value: float) -> float:
        with torch.no_grad():
            stored.fill_(value)
            return float(sae.training_output(batch, state).loss)

    slope = (expected_loss(at + width) - expected_loss(at - width)) / (2 * width)
    with torch.no_grad():
        stored.fill_(at)
    sae.training_output(batch, state).loss.backward()
    assert abs(slope) > 0.05
    assert float(stored.grad) == pytest.approx(slope, rel=0.05)  # type: ignore[arg-type]
    if penalty == "step":  # (E[error saved | z = theta] - lambda) p(theta), here (theta^2 - 2) p
        density = math.exp(-(0.7**2) / 2) / (2 * math.pi) ** 0.5
        chain = 0.7 if parametrisation == "log" else 1.0
        assert slope == pytest.approx((0.7**2 - 2) * density * chain, rel=0.05)


def test_the_settings_mean_the_same_at_every_scale() -> None:
    """Data, biases and thresholds 10 times larger: the same loss, ten times the thresholds."""
    losses = []
    for scale in (1, 10):
        torch.manual_seed(0)
        config = JumpReLUConfig(d_sae=40, penalty="tanh", pre_act_coefficient=0.1)
        sae = JumpReLUSAE(config, 7)
        y = scale * torch.randn(64, 7)
        batch = TrainingBatch.of(y, variance=7.0 * scale**2)
        sae.start(batch)
        torch.testing.assert_close(sae.theta, torch.full((40,), 1.0 * scale))
        output = sae.training_output(batch, TrainingState(dead=torch.arange(40) < 5))
        losses.append(output.loss)
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("penalty", ["step", "tanh", "quadratic"])
def test_thresholds_move_and_l0_falls_in_a_short_run(penalty: str) -> None:
    """SAELens' users complain of JumpReLU whose L0 never falls (its issues 494, 382, 718, 719)."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"penalty": penalty, "l0_target": 4.0}
    config = JumpReLUConfig(d_sae=64, **options)
    sae = JumpReLUSAE(config, 16)
    optimiser = torch.optim.Adam(sae.parameters(), lr=2e-3)
    y = torch.randn(256, 16) / 4
    batch, l0 = TrainingBatch.of(y), []
    sae.start(batch)
    first = sae.theta.detach().clone()
    for number in range(200):
        output = sae.training_output(batch, TrainingState(step=number, total_steps=200))
        optimiser.zero_grad()
        output.loss.backward()
        sae.before_step()
        optimiser.step()
        sae.after_step()
        l0.append(float(output.l0))
    assert l0[-1] < 0.7 * l0[0]
    assert ((sae.theta - first).abs() > 0.01 * first).float().mean() > 0.8


@pytest.mark.parametrize("parametrisation", ["theta", "log"])
def test_thresholds_stay_float32_under_bfloat16(parametrisation: str, tmp_path) -> None:
    sae = by_hand(parametrisation=parametrisation)
    name = "log_threshold" if parametrisation == "log" else "threshold"
    fine = 1 + 2**-12  # bfloat16 would round it to 1
    with torch.no_grad():
        sae.get_parameter(name).fill_(math.log(fine) if parametrisation == "log" else fine)
    sae.to(torch.bfloat16)
    assert sae.W_dec.dtype == torch.bfloat16
    assert sae.theta.dtype == torch.float32
    assert sae.theta.tolist() == pytest.approx([fine] * 3, rel=1e-7)
    # z = 1 exactly, below the threshold, equal to it if that were rounded; 1.0078125 is above
    x = torch.tensor([[2.0, 0.0], [2.015625, 0.0]], dtype=torch.bfloat16)
    codes = sae.encode(x)
    assert codes.dtype == torch.bfloat16
    assert (codes[:, 0] > 0).tolist() == [False, True]
    output = sae.training_output(TrainingBatch.of(x), TrainingState())
    output.loss.backward()
    gradient = sae.get_parameter(name).grad
    assert gradient is not None
    assert gradient.dtype == torch.float32
    sae.save(tmp_path / "sae")
    assert sae.float().double().theta.dtype == torch.float64


def test_thresholds_never_fall_below_zero() -> None:
    sae = by_hand()
    with torch.no_grad():
        sae.threshold.copy_(torch.tensor([-1.0, 0.5, -3.0]))
    assert sae.theta.tolist() == [0, 0.5, 0]
    assert (sae.encode(torch.randn(50, 2)) >= 0).all()
    sae.after_step()
    assert sae.threshold.tolist() == [0, 0.5, 0]


@pytest.mark.parametrize("parametrisation", ["theta", "log"])
def test_folding_and_saving_keep_the_thresholds(parametrisation: str, tmp_path) -> None:
    """SAELens' silent mis-loads lost thresholds or their scale (its issues 308, 553, 608)."""
    sae = by_hand(parametrisation=parametrisation)
    x = ROWS / 0.2
    scale = torch.tensor(0.2)
    sae.normaliser = Normaliser("unit_mean_square", torch.zeros(2), scale, 1.0)
    folded = sae.fold()
    torch.testing.assert_close(folded.theta, sae.theta / 0.2)
    torch.testing.assert_close(folded.encode(x), sae.encode(x))
    folded.save(tmp_path / "sae")
    assert torch.equal(load(tmp_path / "sae").encode(x), folded.encode(x))


@pytest.mark.parametrize("parametrisation", ["theta", "log"])
def test_permuting_features_with_their_thresholds_permutes_codes(parametrisation: str) -> None:
    sae = by_hand(parametrisation=parametrisation)
    dense, order = sae.encode(ROWS), torch.tensor([2, 0, 1])
    with torch.no_grad():
        for name, value in sae.named_parameters():
            if name != "b_dec":
                value.copy_(value[order].clone())
    assert torch.equal(sae.encode(ROWS), dense[:, order])


def test_target_l0_sets_the_quadratic_penaltys_target() -> None:
    assert JumpReLUConfig(penalty="quadratic").with_target_l0(20.0).l0_target == 20
    plain = JumpReLUConfig().with_target_l0(20.0)
    assert plain == JumpReLUConfig(calibrated_l0=20.0)


@pytest.mark.parametrize(
    "values",
    [
        {"l0_coefficient": -1.0},
        {"l0_target": 0.0},
        {"bandwidth": 0.0},
        {"initial_threshold": 0.0},
        {"tanh_scale": 0.0},
        {"l0_warmup_fraction": 1.5},
        {"pre_act_coefficient": -1.0},
    ],
)
def test_ranges(values: dict) -> None:
    with pytest.raises(InputError, match=rf"sae.{next(iter(values))}: out of range"):
        JumpReLUConfig(**values)


@pytest.mark.parametrize("parametrisation", ["theta", "log"])
def test_calibration_brings_held_out_l0_to_the_target(parametrisation: str) -> None:
    torch.manual_seed(0)
    config = JumpReLUConfig(d_sae=64, parametrisation=parametrisation)  # type: ignore[arg-type]
    sae = JumpReLUSAE(config.with_target_l0(5.0), 16)
    with torch.no_grad():
        getattr(sae, sae._stored).add_(0.05 * torch.rand(64))
    rows = torch.randn(2000, 16)
    profile = sae.theta.detach().clone()
    sae.calibrate(lambda: iter(rows.split(300)))
    assert float(sae.encode_sparse(rows).l0().double().mean()) == pytest.approx(5.0, rel=1e-3)
    ratio = sae.theta / profile
    torch.testing.assert_close(ratio, ratio.mean().expand(64), rtol=1e-4, atol=0)
    plain = JumpReLUSAE(config, 16)
    before = plain.theta.detach().clone()
    plain.calibrate(lambda: iter([rows]))  # no target, nothing to do
    assert torch.equal(plain.theta.detach(), before)
