"""Optimisers against steps computed by hand, on a quadratic, resumed, and with constraints."""

import math

import pytest
import torch
from torch import Tensor, nn

from sae.architectures.topk import TopKConfig, TopKSAE
from sae.core.batch import TrainingBatch
from sae.training import checkpoint
from sae.training.optimisers import averaged, clear_rows, decays, make_optimiser
from sae.training.schedules import base_lr
from saescope.errors import InputError

KINDS = ("adam", "signum", "schedule_free_adam", "schedule_free_signum")
FREE = KINDS[2:]


def bits(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [each.detach().clone() for each in parameters]


def take_step(optimiser: torch.optim.Optimizer, parameter: nn.Parameter, gradient: object) -> None:
    parameter.grad = torch.tensor(gradient, dtype=parameter.dtype).reshape(parameter.shape)
    optimiser.step()


def test_signum_by_hand() -> None:
    """m = 0.5 m + 0.5 g: (0.5, -1), (-0.25, -0.5), (-0.125, 0.25); each step is lr long."""
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimiser = make_optimiser("signum", [parameter], lr=0.5, momentum=0.5)
    expected = [[0.5, 2.5], [1.0, 3.0], [1.5, 2.5]]
    for gradient, place in zip([[1.0, -2.0], [-1.0, 0.0], [0.0, 1.0]], expected, strict=True):
        take_step(optimiser, parameter, gradient)
        assert parameter.tolist() == place


def test_schedule_free_signum_by_hand() -> None:
    """Rates 1 and 2: weights 1 and 4, so c = 1, 4/5. With beta 3/4, y = z / 4 + 3 x / 4."""
    parameter = nn.Parameter(torch.tensor([10.0], dtype=torch.float64))
    optimiser = make_optimiser("schedule_free_signum", [parameter], lr=1.0, momentum=0.75)
    take_step(optimiser, parameter, [3.0])  # z = 9, x = 9
    assert parameter.item() == 9.0
    optimiser.param_groups[0]["lr"] = 2.0
    take_step(optimiser, parameter, [5.0])  # z = 7, x = 9 / 5 + 4 / 5 * 7 = 7.4, y = 7.3
    assert parameter.item() == pytest.approx(7.3)
    with averaged(optimiser):
        assert parameter.item() == pytest.approx(7.4)
    # a rate that falls keeps the weight of the largest: c = 4 / 9
    optimiser.param_groups[0]["lr"] = 1.0
    take_step(optimiser, parameter, [-5.0])  # z = 8, x = 5 / 9 * 7.4 + 4 / 9 * 8
    with averaged(optimiser):
        assert parameter.item() == pytest.approx(5 / 9 * 7.4 + 32 / 9)


def test_schedule_free_adam_by_hand() -> None:
    """Against the three sequences of the paper, written out with numbers."""
    parameter = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimiser = make_optimiser(
        "schedule_free_adam", [parameter], lr=0.1, beta1=0.9, beta2=0.5, eps=1e-3
    )
    z = x = 1.0
    square = total = 0.0
    for step, gradient in enumerate([2.0, -1.0, 0.5, 3.0], start=1):
        take_step(optimiser, parameter, [gradient])
        square = 0.5 * square + 0.5 * gradient**2
        z -= 0.1 * gradient / (math.sqrt(square / (1 - 0.5**step)) + 1e-3)
        total += 0.01
        x += 0.01 / total * (z - x)
        assert parameter.item() == pytest.approx(0.1 * z + 0.9 * x, rel=1e-12)
    with averaged(optimiser):
        assert parameter.item() == pytest.approx(x, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_finds_the_minimum_of_a_quadratic(kind: str) -> None:
    """From noisy gradients, to where the gradient is 0; averaging does what decay does."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-0.5, 1, 8)
    parameter = nn.Parameter(torch.full((8,), 2.0))
    optimiser = make_optimiser(kind, [parameter], lr=0.02)  # type: ignore[arg-type]
    steps = 1500
    for step in range(steps):
        if decays(kind):  # type: ignore[arg-type]
            optimiser.param_groups[0]["lr"] = 0.02 * min(1.0, 2 * (steps - step) / steps)
        noise = 0.05 * torch.randn(8, generator=generator)
        take_step(optimiser, parameter, (scale * (parameter.detach() - 1) + noise).tolist())
    with averaged(optimiser):
        assert (parameter - 1).abs().max() < 0.03


class Run:
    """A small SAE trained on fixed random batches."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.sae = TopKSAE(TopKConfig(d_sae=24, k=3), 6)
        self.parameters = list(self.sae.parameters())
        self.optimiser = make_optimiser(kind, self.parameters, lr=1e-2)  # type: ignore[arg-type]

    def train(self, steps: range) -> None:
        for step in steps:
            x = torch.randn(32, 6, generator=torch.Generator().manual_seed(step))
            batch = TrainingBatch.of(x, variance=6.0)
            self.optimiser.zero_grad(set_to_none=True)
            self.sae.training_output(batch, _state(step)).loss.backward()
            self.sae.before_step()
            self.optimiser.param_groups[0]["lr"] = 1e-2 * min(1.0, (step + 1) / 4)
            self.optimiser.step()
            self.sae.after_step()


def _state(step: int):
    from sae.core.base import TrainingState

    return TrainingState(step=step, total_steps=100, dead=torch.zeros(24, dtype=torch.bool))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kill_at", [1, 5])
def test_resumes_with_the_same_bits(kind: str, kill_at: int, tmp_path) -> None:
    whole = Run(kind)
    whole.train(range(12))
    killed = Run(kind)
    killed.train(range(kill_at))
    saved = checkpoint.optimiser_tensors(killed.optimiser)
    tensors = {"sae": dict(killed.sae.state_dict()), "optimiser": saved}
    checkpoint.save(tmp_path / "last", tensors=tensors, state={})
    resumed = Run(kind)
    tensors, _ = checkpoint.load(tmp_path / "last")
    resumed.sae.load_state_dict(tensors["sae"])
    checkpoint.restore_optimiser(resumed.optimiser, tensors["optimiser"])
    for name, value in checkpoint.optimiser_tensors(resumed.optimiser).items():
        assert value.dtype == saved[name].dtype
        assert torch.equal(value, saved[name])
    resumed.train(range(kill_at, 12))
    for found, expected in zip(resumed.parameters, whole.parameters, strict=True):
        assert torch.equal(found, expected)
    with averaged(resumed.optimiser), averaged(whole.optimiser):
        assert torch.equal(resumed.sae.W_dec, whole.sae.W_dec)


@pytest.mark.parametrize("kind", KINDS)
def test_averaged_gives_back_the_same_bits(kind: str) -> None:
    run = Run(kind)
    run.train(range(9))
    before = bits(run.parameters)

    def changed() -> list[bool]:
        now = zip(run.parameters, before, strict=True)
        return [not torch.equal(parameter, old) for parameter, old in now]

    with averaged(run.optimiser, run.sae.after_step):
        assert any(changed()) == (kind in FREE)
    assert not any(changed())

    class Killed(BaseException):
        pass

    def evaluate_and_be_killed() -> None:
        with averaged(run.optimiser):
            raise Killed

    with pytest.raises(Killed):
        evaluate_and_be_killed()
    assert not any(changed())


@pytest.mark.parametrize("kind", FREE)
def test_a_constraint_between_steps_holds_all_three_points(kind: str) -> None:
    """y has unit rows; z stays near (it would leave without end); the average can be put back."""
    run = Run(kind)
    run.train(range(600))
    ones = torch.ones(24)
    torch.testing.assert_close(run.sae.W_dec.norm(dim=1), ones)
    z = run.optimiser.state[run.sae.W_dec]["z"]
    assert (z.norm(dim=1) - 1).abs().max() < 0.5
    with averaged(run.optimiser):
        assert (run.sae.W_dec.norm(dim=1) - 1).abs().max() > 1e-5
        free = run.sae.W_dec.detach().clone()
    with averaged(run.optimiser, run.sae.after_step):
        torch.testing.assert_close(run.sae.W_dec.norm(dim=1), ones)
        torch.testing.assert_close(run.sae.W_dec, free / free.norm(dim=1, keepdim=True))


def test_what_moves_the_parameter_moves_the_other_points() -> None:
    """y is moved by 1 between steps: z and x are 1 further than they would have been."""
    places = []
    for shift in (0.0, 1.0):
        parameter = nn.Parameter(torch.tensor([4.0], dtype=torch.float64))
        optimiser = make_optimiser("schedule_free_signum", [parameter], lr=0.5)
        take_step(optimiser, parameter, [1.0])
        take_step(optimiser, parameter, [1.0])
        with torch.no_grad():
            parameter.add_(shift)
        with averaged(optimiser):
            moved_average = parameter.item()
        take_step(optimiser, parameter, [1.0])
        state = optimiser.state[parameter]
        places.append((moved_average, state["z"].item(), state["x"].item(), parameter.item()))
    for before, after in zip(*places, strict=True):
        assert after - before == pytest.approx(1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_clear_rows(kind: str) -> None:
    """Rows of the features given, of every parameter that has one a feature, and no others."""
    run = Run(kind)
    run.train(range(6))
    sae, features = run.sae, torch.tensor([2, 7])
    with torch.no_grad():
        sae.W_dec[features] = torch.nn.functional.normalize(torch.ones(2, 6), dim=1)
    saved = checkpoint.optimiser_tensors(run.optimiser)
    before = {name: value.clone() for name, value in saved.items()}
    clear_rows(run.optimiser, sae, features)
    others = torch.ones(24, dtype=torch.bool)
    others[features] = False
    for number, (name, parameter) in enumerate(sae.named_parameters()):
        for key, value in run.optimiser.state[parameter].items():
            old = before[f"{number}.{key}"]
            if name == "b_dec" or value.ndim == 0:
                assert torch.equal(value, old)
                continue
            assert torch.equal(value[others], old[others])
            if key in ("z", "x"):
                assert torch.equal(value[features], parameter[features])
            else:
                assert not old[features].eq(0).all()
                assert value[features].eq(0).all()
    if kind in FREE:  # the new rows are the average's too
        with averaged(run.optimiser):
            torch.testing.assert_close(
                sae.W_dec[features], torch.full((2, 6), 6**-0.5), atol=1e-6, rtol=0
            )


def test_clear_rows_leaves_shared_parameters_of_the_same_length() -> None:
    sae = TopKSAE(TopKConfig(d_sae=6, k=2), 6)
    optimiser = make_optimiser("adam", sae.parameters(), lr=0.1)
    batch = TrainingBatch.of(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))
    sae.training_output(batch, _state(0)).loss.backward()
    optimiser.step()
    clear_rows(optimiser, sae, torch.arange(6))
    assert optimiser.state[sae.b_dec]["exp_avg"].ne(0).all()
    assert optimiser.state[sae.W_dec]["exp_avg"].eq(0).all()


def test_parameters_without_gradient_stay() -> None:
    for kind in KINDS:
        moving, still = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        optimiser = make_optimiser(kind, [moving, still], lr=0.1)  # type: ignore[arg-type]
        take_step(optimiser, moving, [1.0, 1.0])
        with averaged(optimiser):
            assert still.tolist() == [1.0, 1.0]
        assert moving.tolist() != [1.0, 1.0]


def test_learning_rates_by_kind() -> None:
    assert base_lr(2**12, "schedule_free_adam") == base_lr(2**12)
    assert base_lr(2**12, "signum") == pytest.approx(1e-2)
    assert [decays(kind) for kind in KINDS] == [True, True, False, False]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("adamw", {}, "optimiser: no such optimiser"),
        ("adam", {"lr": 0.0}, r"optimiser\.lr"),
        ("adam", {"beta2": 1.0}, r"optimiser\.beta2"),
        ("signum", {"momentum": -0.1}, r"optimiser\.momentum"),
        ("schedule_free_adam", {"eps": 0.0}, r"optimiser\.eps"),
    ],
)
def test_bad_input(kind, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_optimiser(kind, [nn.Parameter(torch.ones(1))], **{"lr": 0.1, **options})
