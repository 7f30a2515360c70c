"""The L0 controller on simulated plants, and in real trainings on planted data."""

import json
import math
import random
from itertools import pairwise
from typing import Any

import pytest
import torch

from sae.architectures.gated import GatedConfig, GatedSAE
from sae.architectures.jumprelu import JumpReLUConfig, JumpReLUSAE
from sae.architectures.relu import ReLUConfig, ReLUSAE
from sae.architectures.topk import TopKConfig
from sae.core.base import SparseAutoencoder, TrainingState
from sae.core.batch import TrainingBatch
from sae.core.normaliser import Normaliser
from sae.evaluation.planted import PlantedConfig, PlantedDictionary
from sae.training.config import TrainConfig
from sae.training.l0_controller import L0Controller
from sae.training.optimisers import make_optimiser
from sae.training.schedules import lr_factor
from sae.training.trainer_config import TrainerConfig
from saescope.errors import InputError


def simulate(
    steps: int,
    target: float,
    *,
    first: float = 200.0,
    slope: float = 1.0,
    lag: float = 10.0,
    noise: float = 0.03,
    dead_zone: float = 1.0,
    fastest: float = math.inf,
    drift: float = 0.0,
    start: float | None = None,
) -> tuple[list[float], list[float]]:
    """L0 and penalty of a plant: L0 tends to first * (penalty / dead_zone)^-slope * e^drift.

    With a lag in steps, no faster than `fastest` in log L0 a step, not at all below the dead zone,
    and ever slower over the last fifth, where the learning rate falls.
    """
    chance = random.Random(0)
    controller = L0Controller(target, total_steps=steps, start=start, fraction=0.7)
    log_l0, found, penalties = math.log(first), [], []
    for step in range(steps):
        felt = (
            max(0.0, math.log(controller.penalty / dead_zone))
            if dead_zone > 1
            else math.log(controller.penalty)
        )
        goal = math.log(first) - slope * felt + drift * step / steps
        change = max(-fastest, min(fastest, (goal - log_l0) / lag))
        log_l0 += change * min(1.0, (steps - step) / (0.2 * steps))
        found.append(math.exp(log_l0))
        penalties.append(controller.penalty)
        controller.update(math.exp(log_l0 + chance.gauss(0, noise)), step)
    return found, penalties


@pytest.mark.parametrize("steps", [300, 600, 3000, 20_000])
@pytest.mark.parametrize("slope", [0.4, 1.0, 4.0])
@pytest.mark.parametrize("lag", [0.005, 0.03])
@pytest.mark.parametrize("noise", [0.01, 0.06])
def test_reaches_the_target(steps: int, slope: float, lag: float, noise: float) -> None:
    found, _ = simulate(steps, 16.0, slope=slope, lag=max(1.0, lag * steps), noise=noise)
    assert found[-1] == pytest.approx(16, rel=0.05)
    assert min(found) > 0.2 * 16


@pytest.mark.parametrize("steps", [600, 20_000])
@pytest.mark.parametrize("lag", [0.005, 0.03])
def test_grows_geometrically_until_l0_moves(steps: int, lag: float) -> None:
    """JumpReLU whose L0 does not fall: nothing happens before the penalty is 30 times as large."""
    found, penalties = simulate(steps, 16.0, dead_zone=30.0, lag=lag * steps)
    waiting = [p for p, l0 in zip(penalties, found, strict=True) if l0 > 199]
    assert waiting[-1] > 25
    assert len(waiting) < 0.35 * steps
    assert found[-1] == pytest.approx(16, rel=0.05)
    assert min(found) > 0.25 * 16
    # never faster than its slew allows
    rise = max(math.log(b / a) for a, b in pairwise(penalties))
    assert rise <= 50 / steps + 1e-9


@pytest.mark.parametrize("steps", [600, 20_000])
def test_thresholds_that_move_at_one_speed(steps: int) -> None:
    """L0 falls a step's length at a time, however large the penalty: no overshoot to nothing."""
    found, _ = simulate(steps, 8.0, dead_zone=5.0, fastest=8 / steps, lag=0.01 * steps)
    assert found[-1] == pytest.approx(8, rel=0.05)
    assert min(found) > 0.3 * 8


@pytest.mark.parametrize("drift", [-0.7, 0.7])
def test_follows_a_drift(drift: float) -> None:
    found, _ = simulate(1000, 16.0, drift=drift)
    assert found[-1] == pytest.approx(16, rel=0.05)


def test_cuts_its_gain_where_l0_answers_too_strongly() -> None:
    """With the gain it begins with, such a plant swings between a third and three times the target
    for the whole run."""
    found, _ = simulate(1000, 16.0, slope=8.0, lag=20.0, noise=0.02)
    assert all(14 < l0 < 18 for l0 in found[600:])


def test_warm_up_of_an_architecture() -> None:
    assert ReLUConfig(l1_warmup_fraction=0.07).penalty_warmup == 0.07
    assert JumpReLUConfig().penalty_warmup == JumpReLUConfig().l0_warmup_fraction
    assert TopKConfig().penalty_warmup == 0


def test_lowers_the_penalty_where_l0_is_too_small() -> None:
    found, penalties = simulate(600, 16.0, first=1.0)
    assert found[-1] == pytest.approx(16, rel=0.05)
    assert penalties[-1] < 0.1


@pytest.mark.parametrize("steps", [300, 20_000])
@pytest.mark.parametrize("slope", [0.4, 1.0, 4.0])
def test_follows_a_target_that_falls(steps: int, slope: float) -> None:
    found, _ = simulate(steps, 16.0, slope=slope, lag=0.01 * steps, start=64.0)
    assert 24 < found[round(0.35 * steps)] < 48, "about 32, half way by ratios"
    assert found[-1] == pytest.approx(16, rel=0.05)


def test_no_windup_at_the_limit() -> None:
    """L0 that never answers takes the penalty to its limit, from where it comes back at once."""
    controller = L0Controller(10.0, total_steps=300)
    for step in range(300):
        controller.update(1000.0, step)
    assert controller.penalty == pytest.approx(1e6)
    for step in range(300, 320):
        controller.update(0.0, step)
    assert controller.penalty < 1e6 / 2


def test_waits_for_the_warm_up() -> None:
    controller = L0Controller(10.0, total_steps=100, warmup_fraction=0.3)
    for step in range(30):
        controller.update(500.0, step)
        assert controller.penalty == 1.0
    controller.update(500.0, 30)
    assert controller.penalty > 1.0


@pytest.mark.parametrize("kill_at", [3, 50, 111])
def test_resumes_exactly_through_json(kill_at: int) -> None:
    chance = random.Random(1)
    series = [chance.uniform(5, 40) for _ in range(150)]
    whole = L0Controller(16.0, total_steps=150)
    killed, resumed = (L0Controller(16.0, total_steps=150) for _ in range(2))
    for step, l0 in enumerate(series):
        whole.update(l0, step)
        if step < kill_at:
            killed.update(l0, step)
    resumed.load_state_dict(json.loads(json.dumps(killed.state_dict())))
    for step in range(kill_at, 150):
        resumed.update(series[step], step)
    assert resumed.penalty == whole.penalty
    assert resumed.state_dict() == whole.state_dict()
    with pytest.raises(InputError, match="target differs"):
        L0Controller(17.0, total_steps=150).load_state_dict(whole.state_dict())


def test_bad_input() -> None:
    for l0 in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="not an L0"):
            L0Controller(10.0, total_steps=10).update(l0, 0)
    with pytest.raises(InputError, match="target_l0"):
        L0Controller(0.0, total_steps=10)
    with pytest.raises(InputError, match=r"trainer.target_l0_start: is of no use without"):
        TrainConfig(harvest="h", out="o", trainer=TrainerConfig(target_l0_start=20.0))
    with pytest.raises(InputError, match=r"trainer.target_l0_start"):
        TrainerConfig(target_l0=30.0, target_l0_start=20.0)


def train_to(cls: type[SparseAutoencoder], config: Any, target: float, steps: int) -> float:
    """Held-out L0 of an SAE trained to a target on planted data, learning rate decay and all."""
    planted = PlantedDictionary(PlantedConfig(d_in=32, features=64, active=4.0, noise=0.02))
    sample = planted.sample(30_000, stream=1).x
    torch.manual_seed(0)
    sae = cls(config, 32)
    sae.normaliser = Normaliser.fit(
        "centred",
        mean=sample.double().mean(0),
        mean_square=float(sample.double().square().sum(1).mean()),
    )
    y, variance = sae.normaliser.apply(sample), sae.normaliser.variance
    controller = L0Controller(target, total_steps=steps, warmup_fraction=config.penalty_warmup)
    optimiser = make_optimiser("adam", sae.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        rows = torch.randint(len(y), (256,), generator=generator)
        batch = TrainingBatch.of(y[rows], variance=variance)
        if step == 0:
            sae.start(batch)
        state = TrainingState(
            step=step, total_steps=steps, dead=torch.zeros(sae.d_sae, dtype=torch.bool),
            penalty=controller.penalty,
        )  # fmt: skip
        output = sae.training_output(batch, state)
        optimiser.zero_grad()
        output.loss.backward()
        sae.before_step()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        factor = lr_factor(step, steps, warmup=steps // 20, decay=steps // 5)
        optimiser.param_groups[0]["lr"] = 3e-3 * factor
        optimiser.step()
        sae.after_step()
        controller.update(float(output.l0), step)
    held_out = planted.sample(8000, stream=2).x
    with torch.no_grad():
        return len(sae.encode_sparse(held_out).compact().index) / len(held_out)


@pytest.mark.parametrize(
    ("cls", "config", "target"),
    [
        (ReLUSAE, ReLUConfig(d_sae=96), 4.0),
        (ReLUSAE, ReLUConfig(d_sae=96), 16.0),
        (GatedSAE, GatedConfig(d_sae=96), 8.0),
        (JumpReLUSAE, JumpReLUConfig(d_sae=96), 4.0),
        (JumpReLUSAE, JumpReLUConfig(d_sae=96, penalty="tanh"), 16.0),
        # thresholds that start far too low, under a penalty that is far too small
        (JumpReLUSAE, JumpReLUConfig(d_sae=96, l0_coefficient=0.01, initial_threshold=0.01), 8.0),
    ],
)
def test_trained_saes_reach_it_on_held_out_rows(cls: Any, config: Any, target: float) -> None:
    assert train_to(cls, config, target, steps=300) == pytest.approx(target, rel=0.05)
