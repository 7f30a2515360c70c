"""Feature Choice: quotas, columns, thresholds, and the switch of phases."""

import copy

import pytest
import torch

from sae.architectures.feature_choice import (
    FeatureChoiceConfig,
    FeatureChoiceSAE,
    quotas,
)
from sae.core.base import TrainingState
from sae.core.batch import TrainingBatch
from sae.evaluation.planted import PlantedConfig, PlantedDictionary
from saescope.errors import InputError

X = torch.tensor([[3.0, 1.0], [1.0, 1.0], [0.0, -4.0]])
"""less b_dec: (2,1), (0,1), (-1,-4); pre-activations (2, 1.5, -3), (0, 1.5, -1), (-1, -3.5, 5)"""


def by_hand(k: float = 4 / 3) -> FeatureChoiceSAE:
    """d_in 2, d_sae 3, with weights that can be multiplied in the head; the quotas are 2, 1, 1."""
    sae = FeatureChoiceSAE(FeatureChoiceConfig(d_sae=3, k=k, phase_one=0.5), 2)
    with torch.no_grad():
        sae.W_enc_T.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.6, -0.8]]))
        sae.b_enc.copy_(torch.tensor([0.0, 0.5, 0.0]))
        sae.b_dec.copy_(torch.tensor([1.0, 0.0]))
    sae.share.copy_(torch.tensor([0.5, 0.25, 0.25]))
    return sae


def state_at(step: int, total: int, d_sae: int) -> TrainingState:
    return TrainingState(step=step, total_steps=total, dead=torch.zeros(d_sae, dtype=torch.bool))


# ---- by hand --------------------------------------------------------------------------------


def test_each_feature_keeps_its_quota_by_hand() -> None:
    """Feature 0 may have two rows but only one is positive: the zero is not taken."""
    sae = by_hand()
    output = sae.training_output(TrainingBatch.of(X), state_at(5, 10, 3))
    assert output.counts.tolist() == [1, 1, 1]
    torch.testing.assert_close(output.y_hat, torch.tensor([[3.0, 1.5], [1.0, 0.0], [-2.0, -4.0]]))
    # errors (0,-0.5), (0,1), (2,0): squares 0.25, 1, 4
    assert float(output.loss.detach()) == pytest.approx(1.75)
    # before the switch the whole batch shares: both 1.5 of feature 1 are kept
    before = by_hand().training_output(TrainingBatch.of(X), state_at(4, 10, 3))
    assert before.counts.tolist() == [1, 2, 1]


def test_thresholds_are_each_features_smallest_selected_value() -> None:
    sae = by_hand()
    sae.threshold.fill_(9.0)
    sae.training_output(TrainingBatch.of(X), state_at(5, 10, 3))
    assert sae.threshold.tolist() == [2.0, 1.5, 5.0]
    # feature 2 has no positive row now: its threshold and count stay
    sae.training_output(TrainingBatch.of(X[:2]), state_at(6, 10, 3))
    assert sae.threshold_updates.tolist() == [2, 2, 1]
    assert sae.threshold[2] == 5
    sae.threshold.copy_(torch.tensor([1.0, 1.5, 6.0]))
    assert sae.encode(X).tolist() == [[2, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_gradients_equal_a_dense_float64_objective() -> None:
    torch.manual_seed(0)
    sae = FeatureChoiceSAE(FeatureChoiceConfig(d_sae=12, k=3), 5).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    sae.share.copy_(torch.rand(12))
    sae.share /= sae.share.sum()
    y = torch.randn(40, 5, dtype=torch.float64)
    output = sae.training_output(TrainingBatch.of(y), state_at(9, 10, 12))
    output.loss.backward()
    fast = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad()
    pre = (y - sae.b_dec) @ sae.W_enc_T.T + sae.b_enc
    mask = torch.zeros_like(pre)
    for column, quota in enumerate(quotas(sae.share, 120, 40, 9).tolist()):
        mask[pre[:, column].argsort(descending=True)[:quota], column] = 1
    mask = mask * (pre > 0)
    y_hat = pre * mask @ sae.W_dec + sae.b_dec
    expected = (y - y_hat).square().sum(1).mean()
    expected.backward()
    torch.testing.assert_close(output.loss, expected)
    assert output.counts.tolist() == mask.sum(0).tolist()
    for name, p in sae.named_parameters():
        torch.testing.assert_close(fast[name], p.grad, msg=name)


# ---- quotas ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [40, 64, 500])
@pytest.mark.parametrize("alpha", [0.0, 0.7, 2.0, 9.0])
@pytest.mark.parametrize("k", [0.4, 1.0, 1.3, 12.0, 49.9])
def test_quotas_sum_to_the_budget(rows: int, alpha: float, k: float) -> None:
    features, budget = 50, round(rows * k)
    share = (torch.arange(1, features + 1) + 2.0) ** -alpha
    share = share / share.sum()
    found = quotas(share, budget, rows, step=3)
    assert int(found.sum()) == budget
    assert int(found.max()) <= rows
    assert int(found.min()) >= (1 if budget >= features else 0)
    if budget >= features:  # in the order of the law
        assert bool((found.diff() <= 0).all())
    free = found[(found > 1) & (found < rows)].double()
    if budget >= features and len(free):  # and proportional to it, but for whole numbers
        exact = share[(found > 1) & (found < rows)].double()
        scale = free.sum() / exact.sum()
        assert float((free - scale * exact).abs().max()) < 1.5


def test_quotas_of_a_small_budget_turn_and_are_fair_over_steps() -> None:
    """With fewer activations than features some have none in a batch, but not for long."""
    share = 1 / (torch.arange(1, 41) + 3.0)
    share = share / share.sum()
    many = torch.stack([quotas(share, 10, 32, step) for step in range(500)])
    assert (many.sum(1) == 10).all()
    torch.testing.assert_close(many.double().mean(0), 10 * share.double(), atol=0.02, rtol=0)


# ---- phases ---------------------------------------------------------------------------------

STEPS, SWITCH = 24, 12
DATA = PlantedDictionary(PlantedConfig(features=24, d_in=12, active=2))


def step_of(
    sae: FeatureChoiceSAE, optimiser: torch.optim.Optimizer, step: int, steps: int = STEPS
) -> None:
    batch = TrainingBatch.of(DATA.sample(128, stream=step).x)
    optimiser.zero_grad()
    sae.training_output(batch, state_at(step, steps, sae.d_sae)).loss.backward()
    sae.before_step()
    optimiser.step()
    sae.after_step()


def fresh(seed: int = 0) -> tuple[FeatureChoiceSAE, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    config = FeatureChoiceConfig(d_sae=40, k=2, phase_one=0.5, ema_decay=0.8)
    sae = FeatureChoiceSAE(config, 12).train()
    return sae, torch.optim.Adam(sae.parameters(), lr=3e-3)


@pytest.mark.parametrize("stop", [1, SWITCH - 1, SWITCH, SWITCH + 1, SWITCH + 5])
def test_resumed_around_the_switch_gives_the_same_bits(stop: int) -> None:
    sae, optimiser = fresh()
    for step in range(stop):
        step_of(sae, optimiser, step)
    saved = copy.deepcopy((sae.state_dict(), optimiser.state_dict()))
    for step in range(stop, STEPS):
        step_of(sae, optimiser, step)
    again, its_optimiser = fresh(seed=1)
    again.load_state_dict(saved[0])
    its_optimiser.load_state_dict(saved[1])
    for step in range(stop, STEPS):
        step_of(again, its_optimiser, step)
    assert sae.share.any()
    for name, value in sae.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_the_switch_fits_quotas_once_and_starts_thresholds_anew() -> None:
    sae, optimiser = fresh()
    for step in range(SWITCH):
        step_of(sae, optimiser, step)
    assert not sae.share.any()
    assert len(sae.threshold.unique()) == 1  # all have the batch's threshold
    density, common = sae.density.clone(), sae.threshold.clone()
    assert sae.threshold_updates.tolist() == [SWITCH] * 40
    sae.eval().training_output(
        TrainingBatch.of(DATA.sample(128, stream=0).x), state_at(SWITCH, STEPS, 40)
    )
    assert not sae.share.any()  # evaluation leaves no trace
    step_of(sae.train(), optimiser, SWITCH)
    share = sae.share.clone()
    assert float(share.sum()) == pytest.approx(1, rel=1e-5)
    assert torch.equal(
        share.argsort(descending=True, stable=True), density.argsort(descending=True, stable=True)
    )
    picked = sae.threshold_updates == 1
    assert picked.any()
    assert torch.equal(sae.threshold[~picked], common[~picked])
    assert (sae.threshold[picked] != common[picked]).any()
    for step in range(SWITCH + 1, STEPS):
        step_of(sae, optimiser, step)
    assert torch.equal(sae.share, share)


def test_columns_sum_to_their_quotas_in_phase_two() -> None:
    sae, optimiser = fresh()
    for step in range(STEPS - 1):
        step_of(sae, optimiser, step)
    y = DATA.sample(128, stream=99).x
    output = sae.training_output(TrainingBatch.of(y), state_at(STEPS - 1, STEPS, 40))
    positive = ((sae.encoder_input(y) @ sae.W_enc + sae.b_enc) > 0).sum(0)
    expected = torch.minimum(quotas(sae.share, 256, 128, STEPS - 1), positive)
    assert torch.equal(output.counts, expected)


def test_phase_one_can_be_the_whole_run() -> None:
    sae, _ = fresh()
    sae.config = FeatureChoiceConfig(d_sae=40, k=2, phase_one=1.0)
    assert not sae.in_phase_two(state_at(STEPS - 1, STEPS, 40))
    with pytest.raises(InputError, match="phase_one"):
        FeatureChoiceConfig(phase_one=0.0)


# ---- calibration ----------------------------------------------------------------------------


def test_calibration_scales_all_thresholds_and_reaches_k_on_other_rows() -> None:
    sae, optimiser = fresh()
    for step in range(200):
        step_of(sae, optimiser, step, steps=200)
    sae.eval()
    before = sae.threshold.clone()
    rows, other = DATA.sample(4000, stream=1001).x, DATA.sample(4000, stream=1002).x
    sae.calibrate(lambda: iter(rows.split(999)))
    factor = sae.threshold / before
    torch.testing.assert_close(factor, factor[:1].expand(40))
    assert float(sae.encode_sparse(rows).l0().float().mean()) == pytest.approx(2, abs=2e-3)
    assert float(sae.encode_sparse(other).l0().float().mean()) == pytest.approx(2, rel=0.05)


def test_calibration_of_features_without_a_threshold() -> None:
    """They take the mean of the others; before training, all take the same."""
    sae, _ = fresh()
    rows = DATA.sample(1000, stream=1).x
    sae.calibrate(lambda: iter([rows]))
    assert len(sae.threshold.unique()) == 1
    assert float(sae.encode_sparse(rows).l0().float().mean()) == pytest.approx(2, abs=2e-3)
    sae.threshold[:3] = torch.tensor([0.0, 1.0, 3.0])
    sae.threshold[3:] = 2.0
    profile = sae.threshold_profile()
    assert float(profile[0]) == pytest.approx(float(sae.threshold[1:].mean()))
    assert torch.equal(profile[1:], sae.threshold[1:])
