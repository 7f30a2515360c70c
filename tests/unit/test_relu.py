"""ReLU SAE: penalties, p-annealing and resampling, by hand and against dense float64."""

from typing import Any, ClassVar

import pytest
import torch
from torch.func import functional_call

from sae.architectures.relu import ReLUConfig, ReLUSAE
from sae.core.base import TrainingState
from sae.core.batch import TrainingBatch
from saescope.config import from_dict, to_dict
from saescope.errors import InputError

ROWS = torch.tensor([[3.0, 1.0], [1.0, 1.0], [0.0, -4.0]])


def by_hand(**options) -> ReLUSAE:
    """d_in 2, d_sae 3, with weights that can be multiplied in the head."""
    sae = ReLUSAE(ReLUConfig(**{"d_sae": 3, "l1_warmup_fraction": 0.0, **options}), 2)
    with torch.no_grad():
        sae.W_enc_T.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
        sae.W_dec.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0], [-3.0, -4.0]]))
        sae.b_enc.copy_(torch.tensor([0.0, 0.5, 0.0]))
        sae.b_dec.copy_(torch.tensor([1.0, 0.0]))
    return sae


def random_sae(**options) -> tuple[ReLUSAE, torch.Tensor]:
    torch.manual_seed(0)
    sae = ReLUSAE(ReLUConfig(**{"d_sae": 40, "l1_warmup_fraction": 0.0, **options}), 7).double()
    with torch.no_grad():
        sae.W_enc_T.normal_()
        sae.W_dec.normal_()
        sae.b_dec.normal_()
        sae.b_enc.normal_(std=0.1)
    return sae, torch.randn(33, 7, dtype=torch.float64)


def test_forward_by_hand() -> None:
    # x - b_dec = (2,1), (0,1), (-1,-4); pre = (2, 1.5, -3), (0, 1.5, -1), (-1, -3.5, 5)
    sae = by_hand()
    assert sae.encode(ROWS).tolist() == [[2, 1.5, 0], [0, 1.5, 0], [0, 0, 5]]
    expected = torch.tensor([[5.0, 1.5], [1.0, 1.5], [-14.0, -20.0]])
    torch.testing.assert_close(sae(ROWS).x_hat, expected)


@pytest.mark.parametrize(
    ("weighted", "l1"),
    [(True, (2 * 2 + 1.5 + 1.5 + 5 * 5) / 3), (False, (2 + 1.5 + 1.5 + 5) / 3)],
)
def test_loss_by_hand(weighted: bool, l1: float) -> None:
    sae = by_hand(l1_coefficient=0.7, decoder_norm_weighted=weighted)
    batch = TrainingBatch.of(ROWS, variance=4.0)
    # errors (-2,-.5), (0,-.5), (14,16): squares 4.25, .25, 452
    fvu = (4.25 + 0.25 + 452) / 3 / 4
    output = sae.training_output(batch, TrainingState(penalty=3.0))
    assert float(output.terms["fvu"]) == pytest.approx(fvu)
    assert float(output.terms["l1"]) == pytest.approx(l1 / 2)
    assert float(output.loss.detach()) == pytest.approx(fvu + 3 * 0.7 * l1 / 2)
    assert output.counts.tolist() == [1, 2, 1]


def test_penalty_warms_up() -> None:
    sae = by_hand(l1_coefficient=1.0, l1_warmup_fraction=0.5)
    batch = TrainingBatch.of(ROWS)
    excess = []
    for step in (0, 1, 4, 9):
        output = sae.training_output(batch, TrainingState(step=step, total_steps=10))
        excess.append(float(output.loss.detach() - output.terms["fvu"]))
    assert torch.tensor(excess).div(excess[-1]).tolist() == pytest.approx(
        [0.2, 0.4, 1, 1], rel=1e-4
    )


def test_the_coefficient_means_the_same_at_every_scale() -> None:
    """Data and biases 10 times larger, with the variance that goes with them: the same loss."""
    sae, y = random_sae(p_start=0.6, p_end=0.6)
    small = sae.training_output(TrainingBatch.of(y, variance=7.0), TrainingState()).loss
    with torch.no_grad():
        sae.b_enc.mul_(10)
        sae.b_dec.mul_(10)
    large = sae.training_output(TrainingBatch.of(10 * y, variance=700.0), TrainingState()).loss
    torch.testing.assert_close(large, small)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("p", [1.0, 0.5])
def test_gradients_equal_the_dense_float64_objective(weighted: bool, p: float) -> None:
    sae, y = random_sae(decoder_norm_weighted=weighted, p_start=p, p_end=p)
    batch = TrainingBatch.of(y, variance=5.0)
    loss = sae.training_output(batch, TrainingState()).loss
    loss.backward()
    fast = {name: q.grad.clone() for name, q in sae.named_parameters() if q.grad is not None}
    sae.zero_grad()
    f = torch.relu((y - sae.b_dec) @ sae.W_enc_T.T + sae.b_enc)
    w = f / 5.0**0.5 * (sae.W_dec.norm(dim=1) if weighted else 1)
    penalty = ((w + 1e-3) ** p - 1e-3**p).sum(1).mean()
    fvu = (y - f @ sae.W_dec - sae.b_dec).square().sum(1).mean() / 5.0
    expected = fvu + 0.1 * penalty
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, q in sae.named_parameters():
        torch.testing.assert_close(fast[name], q.grad, msg=name)


class Loss(torch.nn.Module):
    """The loss as a module, so that its parameters can be put in from outside."""

    def __init__(self, sae: ReLUSAE, y: torch.Tensor) -> None:
        super().__init__()
        self.sae, self.y = sae, y

    def forward(self) -> torch.Tensor:
        return self.sae.training_output(TrainingBatch.of(self.y), TrainingState()).loss


@pytest.mark.parametrize("p", [1.0, 0.5])
def test_objective_passes_gradcheck(p: float) -> None:
    sae, y = random_sae(d_sae=5, p_start=p, p_end=p)
    module = Loss(sae, y[:4])
    names = [name for name, _ in module.named_parameters()]

    def loss(*values: torch.Tensor) -> torch.Tensor:
        return functional_call(module, dict(zip(names, values, strict=True)), ())

    assert torch.autograd.gradcheck(loss, tuple(module.parameters()))


def test_decoder_norm_is_held_only_under_the_plain_penalty() -> None:
    for weighted in (True, False):
        sae = by_hand(decoder_norm_weighted=weighted)
        sae.after_step()
        assert (float(sae.W_dec[2].detach().norm()) == pytest.approx(1)) != weighted


class TestAnnealing:
    OPTIONS: ClassVar[dict[str, Any]] = {
        "p_end": 0.2,
        "p_levels": 4,
        "p_from": 0.2,
        "p_until": 0.6,
        "l1_coefficient": 1.0,
    }

    def test_exponent_by_step(self) -> None:
        config = ReLUConfig(d_sae=3, **self.OPTIONS)
        levels = [config.level(TrainingState(step=s, total_steps=20)) for s in range(20)]
        assert levels == [0] * 4 + [1, 1, 2, 2, 3, 3] + [4] * 10
        assert [config.exponent(level) for level in range(5)] == pytest.approx(
            [1, 0.8, 0.6, 0.4, 0.2]
        )

    def test_penalty_does_not_jump_and_then_stays_rescaled(self) -> None:
        sae, y = random_sae(**self.OPTIONS)
        batch = TrainingBatch.of(y)

        def penalty(step: int, batch: TrainingBatch = batch) -> float:
            output = sae.training_output(batch, TrainingState(step=step, total_steps=20))
            return float(output.terms["lp"])

        l1 = penalty(3)
        assert [penalty(s) for s in (4, 6, 8, 10, 15)] == pytest.approx([l1] * 5, rel=1e-5)
        # the factor was fixed by the batch at the change: on another the penalty is another
        w = sae.encode_normalised(2 * y).value.detach()
        w = w * sae.W_dec.detach().norm(dim=1)[sae.encode_normalised(2 * y).index]
        expected = float(((w + 1e-3) ** 0.2 - 1e-3**0.2).sum() / 33 * sae.anneal[0])
        assert penalty(16, TrainingBatch.of(2 * y)) == pytest.approx(expected, rel=1e-5)

    def test_the_same_step_again_changes_nothing(self) -> None:
        """Micro-batches and logging (dictionary_learning's counters advanced twice, defect 8)."""
        sae, y = random_sae(**self.OPTIONS)
        state = TrainingState(step=10, total_steps=20)
        sae.training_output(TrainingBatch.of(y), state)
        before = sae.anneal.clone()
        sae.training_output(TrainingBatch.of(3 * y), state)
        assert torch.equal(sae.anneal, before)

    def test_resumes_exactly(self) -> None:
        sae, y = random_sae(**self.OPTIONS)
        batch = TrainingBatch.of(y)
        sae.training_output(batch, TrainingState(step=7, total_steps=20))
        again, _ = random_sae(**self.OPTIONS)
        again.load_state_dict(sae.state_dict())
        state = TrainingState(step=8, total_steps=20)
        other = TrainingBatch.of(2 * y)
        assert torch.equal(
            sae.training_output(other, state).loss, again.training_output(other, state).loss
        )

    def test_without_it_there_is_no_such_state(self) -> None:
        assert set(by_hand().state_dict()) == {"W_enc_T", "b_enc", "W_dec", "b_dec"}


class TestResampling:
    def state(self, dead: list[bool], step: int = 4) -> TrainingState:
        generator = torch.Generator().manual_seed(0)
        dead_ = torch.tensor(dead)
        return TrainingState(step=step, total_steps=10, dead=dead_, generator=generator)

    def test_by_hand(self) -> None:
        """dictionary_learning's PAnneal resamples nothing (training_libraries, defect 7)."""
        sae = by_hand(resample_at=(0.5,))
        with torch.no_grad():
            sae.b_enc.copy_(torch.tensor([0.0, -0.5, 0.0]))
        # rows 1 and 2 are b_dec, reconstructed exactly; only row 0 has a loss
        batch = TrainingBatch.of(torch.tensor([[4.0, 4.0], [1.0, 0.0], [1.0, 0.0]]))
        before = {name: value.clone() for name, value in sae.state_dict().items()}
        features = sae.resample(batch, self.state([False, True, False]))
        assert features is not None
        assert features.tolist() == [1]
        # y - b_dec = (3, 4); living rows have norms 1 and sqrt 2 (encoder), 2 and 5 (decoder)
        torch.testing.assert_close(sae.W_dec[1], 3.5 * torch.tensor([0.6, 0.8]))
        norm = 0.2 * (1 + 2**0.5) / 2
        torch.testing.assert_close(sae.W_enc_T[1], norm * torch.tensor([0.6, 0.8]))
        assert sae.b_enc[1] == 0
        for name in ("W_enc_T", "W_dec", "b_enc"):
            for row in (0, 2):
                assert torch.equal(sae.state_dict()[name][row], before[name][row])

    def test_decoder_rows_of_unit_norm_get_one_more(self) -> None:
        sae = by_hand(resample_at=(0.5,), decoder_norm_weighted=False)
        sae.normalise_decoder()
        sae.resample(TrainingBatch.of(torch.tensor([[4.0, 4.0]])), self.state([False, True, False]))
        torch.testing.assert_close(sae.W_dec[1], torch.tensor([0.6, 0.8]))

    def test_only_at_its_steps_and_only_the_dead(self) -> None:
        sae, batch = by_hand(resample_at=(0.5,)), TrainingBatch.of(ROWS)
        assert sae.resample(batch, self.state([True] * 3, step=3)) is None
        assert sae.resample(batch, self.state([True] * 3, step=5)) is None
        assert sae.resample(batch, self.state([False] * 3)) is None
        assert by_hand().resample(batch, self.state([True] * 3)) is None

    def test_rows_are_drawn_by_squared_loss(self) -> None:
        sae = by_hand(resample_at=(0.5,))
        batch = TrainingBatch.of(sae.b_dec.detach() + torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        state, second = self.state([True, False, False]), 0
        for _ in range(500):
            with torch.no_grad():
                sae.b_enc.fill_(-100)  # y_hat = b_dec; losses 1 and 4, so squares 1 and 16
            sae.resample(batch, state)
            second += int(sae.W_dec[0, 1] > 0)
        assert second / 500 == pytest.approx(16 / 17, abs=0.04)

    def test_no_row_is_taken_twice(self) -> None:
        """Two features started equal would stay equal; those without a row of their own wait."""
        sae = by_hand(resample_at=(0.5,))
        batch = TrainingBatch.of(ROWS[[0, 2]])
        features = sae.resample(batch, self.state([True] * 3))
        assert features is not None
        assert features.tolist() == [0, 1]
        assert not torch.equal(sae.W_dec[0], sae.W_dec[1])

    def test_needs_the_runs_generator(self) -> None:
        state = self.state([True] * 3)
        state.generator = None
        with pytest.raises(InputError, match="generator"):
            by_hand(resample_at=(0.5,)).resample(TrainingBatch.of(ROWS), state)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"l1_coefficient": -1.0}, "l1_coefficient"),
        ({"p_end": 1.5}, r"p_end: out of range \(given: 1.5; allowed: .*at most 1.0"),
        ({"p_end": 0.0}, "p_end"),
        ({"p_until": 0.2}, "p_until"),
        ({"resample_at": (0.5, 1.0)}, "resample_at"),
    ],
)
def test_ranges(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ReLUConfig(**values)


def test_configuration_round_trip_with_resampling() -> None:
    config = ReLUConfig(resample_at=(0.25, 0.5), p_end=0.2)
    assert from_dict(ReLUConfig, to_dict(config), "test") == config
