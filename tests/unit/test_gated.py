"""Gated SAE: by hand, against dense float64, and which term teaches what."""

import math

import pytest
import torch

from sae.architectures.gated import GatedConfig, GatedSAE
from sae.core.base import TrainingState
from sae.core.batch import TrainingBatch

ROWS = torch.tensor([[3.0, 1.0], [1.0, 1.0], [0.0, -4.0]])


def by_hand(**options) -> GatedSAE:
    """d_in 2, d_sae 3, with weights that can be multiplied in the head."""
    sae = GatedSAE(GatedConfig(**{"d_sae": 3, "l1_warmup_fraction": 0.0, **options}), 2)
    with torch.no_grad():
        sae.W_enc_T.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.6, -0.8]]))
        sae.b_dec.copy_(torch.tensor([1.0, 0.0]))
        sae.b_gate.copy_(torch.tensor([-1.0, -0.5, 2.0]))
        sae.b_mag.copy_(torch.tensor([0.0, -2.0, 1.0]))
        sae.r_mag.copy_(torch.tensor([math.log(2), 0.0, 0.0]))
    return sae


# x - b_dec = (2,1), (0,1), (-1,-4); W = (2, 1, -3), (0, 1, -1), (-1, -4, 5)
# pi_gate = (1, .5, -1), (-1, .5, 1), (-2, -4.5, 7); pi_mag = (4, -1, -2), (0, -1, 0), (-2, -6, 6)


def random_sae(**options) -> tuple[GatedSAE, torch.Tensor]:
    torch.manual_seed(0)
    sae = GatedSAE(GatedConfig(**{"d_sae": 40, "l1_warmup_fraction": 0.0, **options}), 7).double()
    with torch.no_grad():
        for name, value in sae.named_parameters():
            value.normal_(std=0.3 if name in ("b_gate", "b_mag", "r_mag") else 1.0)
    return sae, torch.randn(33, 7, dtype=torch.float64)


def dense_terms(sae: GatedSAE, y: torch.Tensor, weighted: bool) -> list[torch.Tensor]:
    """FVU, L1 and auxiliary term of section 3.2, dense, for unit variance."""
    product = (y - sae.b_dec) @ sae.W_enc_T.T
    pi_gate = product + sae.b_gate
    pi_mag = product * sae.r_mag.exp() + sae.b_mag
    f = (pi_gate > 0) * torch.relu(pi_mag)
    fvu = (y - f @ sae.W_dec - sae.b_dec).square().sum(1).mean()
    norm = sae.W_dec.norm(dim=1) if weighted else 1
    l1 = (torch.relu(pi_gate) * norm).sum(1).mean()
    frozen = torch.relu(pi_gate) @ sae.W_dec.detach() + sae.b_dec.detach()
    return [fvu, l1, (y - frozen).square().sum(1).mean()]


def test_forward_by_hand() -> None:
    sae = by_hand()
    assert sae.encode(ROWS).tolist() == [[4, 0, 0], [0, 0, 0], [0, 0, 6]]
    expected = torch.tensor([[5.0, 0.0], [1.0, 0.0], [-2.6, -4.8]])
    torch.testing.assert_close(sae(ROWS).x_hat, expected)


def test_loss_by_hand() -> None:
    sae = by_hand(l1_coefficient=0.7)
    output = sae.training_output(TrainingBatch.of(ROWS, variance=4.0), TrainingState(penalty=3.0))
    # errors (-2,1), (0,1), (2.6,.8): 5, 1, 7.4
    fvu = (5 + 1 + 7.4) / 3 / 4
    l1 = (1.5 + 1.5 + 7) / 3 / 2
    # gates through the decoder: (2,.5), (.4,-.3), (-3.2,-5.6); errors (1,.5), (.6,1.3), (3.2,1.6)
    auxiliary = (1.25 + 2.05 + 12.8) / 3 / 4
    assert {name: float(value) for name, value in output.terms.items()} == pytest.approx(
        {"fvu": fvu, "l1": l1, "auxiliary": auxiliary}
    )
    assert float(output.loss.detach()) == pytest.approx(fvu + 3 * 0.7 * l1 + auxiliary)
    assert output.counts.tolist() == [1, 0, 1]


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_equal_the_dense_float64_objective(weighted: bool) -> None:
    sae, y = random_sae(decoder_norm_weighted=weighted)
    loss = sae.training_output(TrainingBatch.of(y), TrainingState()).loss
    loss.backward()
    fast = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad()
    fvu, l1, auxiliary = dense_terms(sae, y, weighted)
    expected = fvu + 0.3 * l1 + auxiliary
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, p in sae.named_parameters():
        torch.testing.assert_close(fast[name], p.grad, msg=name)


def test_decoder_is_detached_in_the_auxiliary_term() -> None:
    """SAELens lets it learn there (training_libraries, defect 13; its issue 543)."""
    sae, y = random_sae(l1_coefficient=0.0)
    sae.training_output(TrainingBatch.of(y), TrainingState()).loss.backward()
    assert sae.W_dec.grad is not None
    fast = sae.W_dec.grad.clone()
    sae.zero_grad()
    dense_terms(sae, y, False)[0].backward()  # the reconstruction alone
    torch.testing.assert_close(fast, sae.W_dec.grad)


def test_gates_learn_from_the_penalty_and_the_auxiliary_term_alone() -> None:
    sae, y = random_sae()
    fvu, l1, auxiliary = dense_terms(sae, y, False)
    sae.training_output(TrainingBatch.of(y), TrainingState()).loss.backward()
    (expected,) = torch.autograd.grad(0.3 * l1 + auxiliary, sae.b_gate, retain_graph=True)
    torch.testing.assert_close(sae.b_gate.grad, expected)
    for name in ("b_mag", "r_mag"):
        (expected,) = torch.autograd.grad(fvu, sae.get_parameter(name), retain_graph=True)
        torch.testing.assert_close(sae.get_parameter(name).grad, expected)


def test_masks_tilts_and_layers_count_in_the_auxiliary_term_too() -> None:
    sae, y = random_sae(l1_coefficient=0.0)
    visible = torch.arange(7) < 4
    group = torch.arange(33) % 2
    batch = TrainingBatch.of(
        y,
        visible=visible,
        group=group,
        group_variance=torch.tensor([2.0, 5.0]).double(),
        tilt=0.5,
    )
    output = sae.training_output(batch, TrainingState())
    pi_gate = ((y - sae.b_dec) * visible) @ sae.W_enc_T.T + sae.b_gate
    frozen = torch.relu(pi_gate) @ sae.W_dec + sae.b_dec
    rows = (y - frozen)[:, 4:].square().sum(1) * 7 / 3 / torch.tensor([2.0, 5.0])[group]
    expected = (0.5 * rows).exp().mean().log() / 0.5
    torch.testing.assert_close(output.terms["auxiliary"], expected.detach())


def test_objective_passes_gradcheck_for_magnitudes() -> None:
    sae, y = random_sae(d_sae=5)

    def loss(r_mag: torch.Tensor, b_mag: torch.Tensor, W_dec: torch.Tensor) -> torch.Tensor:
        sae.r_mag, sae.b_mag, sae.W_dec = r_mag, b_mag, W_dec  # type: ignore[assignment]
        codes = sae.encode_normalised(y[:4])
        return TrainingBatch.of(y[:4]).reconstruction(sae.decode_normalised(codes))

    names = ("r_mag", "b_mag", "W_dec")
    values = tuple(sae.get_parameter(name).detach().requires_grad_() for name in names)
    for name in names:
        del sae._parameters[name]
    assert torch.autograd.gradcheck(loss, values)


def test_starts_tied_with_magnitudes_equal_to_gates() -> None:
    sae = GatedSAE(GatedConfig(d_sae=16), 5)
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert not any(sae.get_parameter(name).any() for name in ("b_gate", "b_mag", "r_mag"))
    names = {"W_enc_T", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"}
    assert set(sae.state_dict()) == names


def test_magnitudes_do_not_shrink() -> None:
    """One true feature: the L1 penalty lowers its gate, and not what is reconstructed."""
    torch.manual_seed(0)
    sae = GatedSAE(GatedConfig(d_sae=1, l1_coefficient=0.3), 3)
    direction = torch.tensor([0.6, 0.0, 0.8])
    with torch.no_grad():
        sae.W_dec.copy_(direction[None])
        sae.W_enc_T.copy_(direction[None])
    y = (1 + torch.rand(500, 1)) * direction
    batch = TrainingBatch.of(y)
    optimiser = torch.optim.Adam([sae.b_gate, sae.b_mag, sae.r_mag], lr=2e-2)
    for step in range(250):
        optimiser.zero_grad()
        sae.training_output(batch, TrainingState(step=step, total_steps=250)).loss.backward()
        optimiser.step()
    x_hat = sae(y).x_hat.detach()
    assert float((x_hat * y).sum() / (y * y).sum()) == pytest.approx(1, abs=0.005)
    assert float(sae.b_gate.detach()) < -0.1
