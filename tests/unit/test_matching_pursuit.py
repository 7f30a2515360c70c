"""Matching pursuit against numbers worked out by hand, plain loops, and least squares."""

import pytest
import torch
from torch import Tensor

from sae.architectures import matching_pursuit as module
from sae.architectures.matching_pursuit import (
    MatchingPursuitConfig,
    MatchingPursuitSAE,
    matching_pursuit,
    merge,
    orthogonal_pursuit,
)
from sae.core.base import TrainingState
from sae.core.batch import TrainingBatch
from saescope.errors import InputError

X = torch.tensor([[2.0, 2.0], [1.0, -3.0]])


def by_hand(**options) -> MatchingPursuitSAE:
    """d_in 2, d_sae 3; X - b_dec = (1, 2), (0, -3)."""
    sae = MatchingPursuitSAE(MatchingPursuitConfig(**{"d_sae": 3, "k": 2, **options}), 2)
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
        sae.b_dec.copy_(torch.tensor([1.0, 0.0]))
    return sae


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(
        torch.randn(*shape, dtype=torch.float64, generator=generator), dim=-1
    )


def plain(x: Tensor, atoms: Tensor, k: int) -> tuple[Tensor, list[list[int]]]:
    """Codes [batch, d_sae], one row and one step at a time, differentiated by autograd."""
    codes, steps = [], []
    for row in x:
        residual, code, chosen = row, torch.zeros(len(atoms), dtype=x.dtype), []
        for _ in range(k):
            correlation = atoms @ residual
            best = int(correlation.argmax())
            # an atom just taken out has a correlation of 0 up to rounding: that is an end too
            c = correlation[best] * (correlation[best] > 1e-13)
            chosen.append(best)
            code = code + c * torch.nn.functional.one_hot(torch.tensor(best), len(atoms))
            residual = residual - c * atoms[best]
        codes.append(code)
        steps.append(chosen)
    return torch.stack(codes), steps


@pytest.mark.parametrize("k", [1, 2, 3])
def test_forward_and_loss_by_hand(k: int) -> None:
    # (1, 2): correlations 1, 2, 2.2; 2.2 of atom 2 leave (-.32, .24), of which atom 1 takes .24;
    # then nothing correlates positively. (0, -3): nothing does from the start
    codes = torch.tensor([[0, 0.24 if k > 1 else 0, 2.2], [0, 0, 0]])
    sae = by_hand(k=k)
    torch.testing.assert_close(sae.encode(X), codes)
    assert sae.encode_sparse(X).l0().tolist() == [min(k, 2), 0]
    left = 0.32**2 + (0 if k > 1 else 0.24**2)
    output = sae.training_output(TrainingBatch.of(X), TrainingState(dead=torch.zeros(3).bool()))
    assert float(output.loss.detach()) == pytest.approx((left + 9) / 2)
    torch.testing.assert_close(output.y_hat, codes @ sae.W_dec + sae.b_dec)


def test_auxk_goes_on_where_the_pursuit_stopped() -> None:
    sae = by_hand(k=1)
    state = TrainingState(dead=torch.tensor([False, True, False]))
    output = sae.training_output(TrainingBatch.of(X), state)
    # left over: (-.32, .24) and (0, -3); the dead atom (0, 1) takes .24 of the first
    error = torch.tensor([[-0.32, 0.24], [0.0, -3.0]])
    expected = (0.32**2 + 9) / float((error - error.mean(0)).square().sum())
    assert float(output.terms["auxk"]) == pytest.approx(expected, rel=1e-5)
    alone = by_hand(k=1)
    alone.W_dec = sae.W_dec
    plain = alone.training_output(TrainingBatch.of(X), TrainingState(dead=state.dead & False))
    (gradient,) = torch.autograd.grad(output.loss - plain.loss, sae.W_dec)
    assert (gradient.abs().amax(1) > 1e-6).tolist() == [False, True, False]


@pytest.mark.parametrize("gram", [True, False])
def test_codes_and_gradients_equal_the_plain_loop(
    gram: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unrolled gradient in the input and the dictionary, rows stopped early included."""
    monkeypatch.setattr(module, "_GRAM_WIDTH", 8192 if gram else 0)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 50)  # a few rows a chunk
    x = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    atoms = unit(9, 4)
    atoms[:, 0] = atoms[:, 0].abs()  # a half-space: pursuits of rows outside it end early
    x.requires_grad_()
    atoms.requires_grad_()
    index, value = matching_pursuit(x, atoms, 6)
    codes = merge(index, value, 9)
    want, steps = plain(x, atoms, 6)
    torch.testing.assert_close(codes.dense(), want)
    assert any(len(set(row)) < 6 for row in steps)  # an atom was chosen twice
    stopped = (value == 0).sum(1)
    assert ((stopped > 0) & (stopped < 6)).any()
    weights = torch.randn(12, 9, dtype=torch.float64)
    got = torch.autograd.grad((codes.dense() * weights).sum(), [x, atoms])
    slow = torch.autograd.grad((want * weights).sum(), [x, atoms])
    for fast, plain_gradient in zip(got, slow, strict=True):
        torch.testing.assert_close(fast, plain_gradient)


def test_gradcheck() -> None:
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    inputs = [x.requires_grad_(), unit(7, 4).requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, atoms: matching_pursuit(x, atoms, 3)[1], inputs)


def test_each_step_is_greedy_and_takes_its_share() -> None:
    x, atoms = 3 * unit(40, 16, seed=1), unit(60, 16)
    index, value = matching_pursuit(x, atoms, 8)
    residual = x
    for step in range(8):
        correlation = residual @ atoms.T
        torch.testing.assert_close(value[:, step], correlation.amax(1).clamp_min(0))
        before = residual.square().sum(1)
        residual = residual - value[:, step, None] * atoms[index[:, step]]
        torch.testing.assert_close(residual.square().sum(1), before - value[:, step].square())


def test_codes_have_each_feature_once_and_at_most_k() -> None:
    torch.manual_seed(0)
    sae = MatchingPursuitSAE(MatchingPursuitConfig(d_sae=30, k=8), 6)
    codes = sae.encode_sparse(torch.randn(50, 6))
    keys = codes.rows() * 30 + codes.index
    assert len(keys.unique()) == len(keys)
    assert codes.l0().max() <= 8
    assert codes.l0().min() < 8  # an atom was chosen again
    assert (codes.value > 0).all()
    once = MatchingPursuitSAE(MatchingPursuitConfig(d_sae=30, k=8, repeats=False), 6)
    once.load_state_dict(sae.state_dict())
    index, _ = matching_pursuit(torch.randn(50, 6), sae.W_dec, 8, repeats=False)
    assert all(len(set(row)) == 8 for row in index.tolist())
    assert once.encode_sparse(torch.randn(50, 6)).l0().max() <= 8


def test_orthogonal_coefficients_are_the_least_squares_fit() -> None:
    x, atoms = unit(20, 12, seed=2), unit(40, 12)
    index, value = orthogonal_pursuit(x, atoms, 5)
    assert all(len(set(row)) == 5 for row in index.tolist())
    for row in range(20):
        chosen = atoms[index[row]]
        fit = torch.linalg.lstsq(chosen.T, x[row]).solution
        torch.testing.assert_close(value[row], fit)
        residual = x[row] - value[row] @ chosen
        assert (chosen @ residual).abs().max() < 1e-12
    # and each choice was the largest |correlation| of what the earlier ones left
    for step in range(1, 5):
        for row in range(20):
            chosen = atoms[index[row, :step]]
            residual = x[row] - torch.linalg.lstsq(chosen.T, x[row]).solution @ chosen
            assert int((atoms @ residual).abs().argmax()) == int(index[row, step])


def test_orthogonal_stops_when_nothing_is_left() -> None:
    x = torch.tensor([[2.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    atoms = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # one of them twice
    index, value = orthogonal_pursuit(x, atoms, 3)
    torch.testing.assert_close(merge(index, value, 3).dense() @ atoms, x)
    assert (value != 0).sum(1).tolist() == [1, 0, 2]


def test_orthogonal_sae_is_signed_and_its_codes_are_constants() -> None:
    torch.manual_seed(0)
    config = MatchingPursuitConfig(d_sae=30, k=4, orthogonal=True)
    sae = MatchingPursuitSAE(config, 8).double()
    assert sae.signed
    assert not MatchingPursuitSAE(MatchingPursuitConfig(d_sae=30, k=4), 8).signed
    y = torch.randn(25, 8, dtype=torch.float64)
    codes = sae.encode(y).detach()
    assert (codes < 0).any()
    loss = sae.training_output(TrainingBatch.of(y), TrainingState(dead=torch.zeros(30).bool())).loss
    got = torch.autograd.grad(loss, [sae.W_dec, sae.b_dec])
    want = torch.autograd.grad(
        (y - codes @ sae.W_dec - sae.b_dec).square().sum(1).mean(), [sae.W_dec, sae.b_dec]
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_a_masked_pursuit_knows_the_visible_coordinates_alone(orthogonal: bool) -> None:
    torch.manual_seed(0)
    config = MatchingPursuitConfig(d_sae=30, k=4, orthogonal=orthogonal)
    sae = MatchingPursuitSAE(config, 8).double()
    visible = torch.tensor([True] * 5 + [False] * 3)
    state = TrainingState(dead=torch.arange(30) < 4)
    y = torch.randn(20, 8, dtype=torch.float64)
    other = torch.where(visible, y, torch.randn_like(y))
    outputs = [
        sae.training_output(TrainingBatch.of(rows, visible=visible), state) for rows in (y, other)
    ]
    torch.testing.assert_close(outputs[0].y_hat, outputs[1].y_hat)
    # the pursuit in the restricted dictionary, whose atoms are no longer of unit norm
    seen = sae.W_dec.detach()[:, visible]
    norm = seen.norm(dim=1, keepdim=True)
    part = (y - sae.b_dec)[:, visible].detach()
    pursuit = orthogonal_pursuit if orthogonal else matching_pursuit
    index, value = pursuit(part, seen / norm, 4)
    codes = merge(index, value, 30).dense() / norm.T
    torch.testing.assert_close(outputs[0].y_hat, codes @ sae.W_dec + sae.b_dec)
    hidden = (y - outputs[0].y_hat)[:, ~visible].square().sum(1).mean() * 8 / 3
    torch.testing.assert_close(outputs[0].terms["fvu"], hidden.detach())


def test_masked_gradient_passes_through_the_restricted_norms() -> None:
    """Against a finite difference in a random direction."""
    torch.manual_seed(0)
    config = MatchingPursuitConfig(d_sae=30, k=4, auxk_coefficient=0)
    sae = MatchingPursuitSAE(config, 8).double()
    batch = TrainingBatch.of(
        torch.randn(20, 8, dtype=torch.float64), visible=torch.tensor([True] * 5 + [False] * 3)
    )
    state = TrainingState(dead=torch.zeros(30).bool())
    (gradient,) = torch.autograd.grad(sae.training_output(batch, state).loss, sae.W_dec)
    direction = torch.randn_like(sae.W_dec)
    losses = []
    for size in (1e-6, -2e-6):
        with torch.no_grad():
            sae.W_dec.add_(size * direction)
        losses.append(float(sae.training_output(batch, state).loss.detach()))
    slope = (losses[0] - losses[1]) / 2e-6
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


def test_masked_orthogonal_codes_are_constants_to_the_gradient() -> None:
    torch.manual_seed(0)
    config = MatchingPursuitConfig(d_sae=30, k=4, auxk_coefficient=0, orthogonal=True)
    sae = MatchingPursuitSAE(config, 8).double()
    visible = torch.tensor([True] * 5 + [False] * 3)
    y, state = torch.randn(20, 8, dtype=torch.float64), TrainingState(dead=torch.zeros(30).bool())
    output = sae.training_output(TrainingBatch.of(y, visible=visible), state)
    (gradient,) = torch.autograd.grad(output.loss, sae.W_dec)
    codes = sae._codes(sae.encoder_input(y) * visible, visible).dense().detach()
    error = (codes @ sae.W_dec + sae.b_dec - y)[:, ~visible]
    (wanted,) = torch.autograd.grad(error.square().sum(1).mean() * 8 / 3, sae.W_dec)
    torch.testing.assert_close(gradient, wanted)


def test_finds_the_parts_that_make_a_row() -> None:
    """Sparse sums in an incoherent dictionary: the atoms, and by OMP their strengths too."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q[:40]
    true = torch.zeros(30, 40)
    for row in true:
        row[torch.randperm(40, generator=generator)[:3]] = 1 + torch.rand(3, generator=generator)
    x = true @ atoms
    for pursuit in (matching_pursuit, orthogonal_pursuit):
        torch.testing.assert_close(merge(*pursuit(x, atoms, 3), 40).dense(), true)


def test_ranges() -> None:
    with pytest.raises(InputError, match="k exceeds the dictionary"):
        MatchingPursuitConfig(d_sae=8, k=9)
    with pytest.raises(InputError, match="a tied SAE reconstructs what it reads"):
        MatchingPursuitSAE(MatchingPursuitConfig(d_sae=8, k=2), 4, 5)
