"""AbsTopK against numbers worked out by hand and a dense float64 objective."""

import pytest
import torch

from sae import kernels
from sae.architectures.abstopk import AbsTopKConfig, AbsTopKSAE
from sae.core.base import TrainingState
from sae.core.batch import TrainingBatch
from sae.kernels import torch_backend

X = torch.tensor([[3.0, 1.0], [1.0, 1.0], [0.0, -4.0]])


def by_hand() -> AbsTopKSAE:
    """d_in 2, d_sae 3, k 1; X - b_dec = (2,1), (0,1), (-1,-4)."""
    sae = AbsTopKSAE(AbsTopKConfig(d_sae=3, k=1), 2)
    with torch.no_grad():
        sae.W_enc_T.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.6, -0.8]]))
        sae.b_enc.copy_(torch.tensor([0.0, 0.5, 0.0]))
        sae.b_dec.copy_(torch.tensor([1.0, 0.0]))
    return sae


def test_forward_by_hand() -> None:
    # pre = (2, 1.5, -3), (0, 1.5, -1), (-1, -3.5, 5): by magnitude -3, 1.5 and 5
    sae = by_hand()
    assert sae.encode(X).tolist() == [[0, 0, -3], [0, 1.5, 0], [0, 0, 5]]
    torch.testing.assert_close(sae(X).x_hat, torch.tensor([[2.8, 2.4], [1.0, 1.5], [-2.0, -4.0]]))
    assert sae.signed


def test_loss_by_hand() -> None:
    sae = by_hand()
    # errors (.2, -1.4), (0, -.5), (2, 0): squares 2, .25, 4
    state = TrainingState(dead=torch.tensor([True, False, False]))
    output = sae.training_output(TrainingBatch.of(X), state)
    assert float(output.terms["fvu"]) == pytest.approx(6.25 / 3)
    # the dead feature's pre-activations 2, 0, -1 keep their signs: e_hat = (2,0), (0,0), (-1,0)
    left = (1.8**2 + 1.4**2) + 0.25 + 9
    error = torch.tensor([[0.2, -1.4], [0.0, -0.5], [2.0, 0.0]])
    total = float((error - error.mean(0)).square().sum())
    assert float(output.terms["auxk"]) == pytest.approx(left / total, rel=1e-5)
    assert float(output.loss.detach()) == pytest.approx(6.25 / 3 + left / total / 32, rel=1e-5)
    assert output.counts.tolist() == [0, 1, 2]


def dense_objective(sae: AbsTopKSAE, y: torch.Tensor, dead: torch.Tensor, k_aux: int):
    def signed_top(pre: torch.Tensor, k: int) -> torch.Tensor:
        return pre * torch.zeros_like(pre).scatter(1, pre.abs().topk(k, dim=1).indices, 1.0)

    pre = (y - sae.b_dec) @ sae.W_enc_T.T + sae.b_enc
    y_hat = signed_top(pre, sae.config.k) @ sae.W_dec + sae.b_dec
    error = (y - y_hat).detach()
    e_hat = signed_top(pre[:, dead], min(k_aux, int(dead.sum()))) @ sae.W_dec[dead]
    aux = (error - e_hat).square().sum() / (error - error.mean(0)).square().sum()
    return (y - y_hat).square().sum(1).mean() + aux / 32


@pytest.mark.parametrize("k_aux", [2, 9])
def test_gradients_equal_the_dense_float64_objective(
    k_aux: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_backend, "_CHUNK_ELEMENTS", 400)  # several chunks of ten rows
    torch.manual_seed(0)
    sae = AbsTopKSAE(AbsTopKConfig(d_sae=40, k=5, k_aux=k_aux), 7).double()
    with torch.no_grad():
        sae.W_enc_T.normal_()
        sae.b_dec.normal_()
        sae.b_enc.normal_(std=0.1)
    y = torch.randn(33, 7, dtype=torch.float64)
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[3, 8, 9, 21, 30]] = True
    names = dict(sae.named_parameters())
    loss = sae.training_output(TrainingBatch.of(y), TrainingState(dead=dead)).loss
    fast = torch.autograd.grad(loss, list(names.values()))
    expected = dense_objective(sae, y, dead, k_aux)
    torch.testing.assert_close(loss, expected)
    slow = torch.autograd.grad(expected, list(names.values()))
    for name, got, want in zip(names, fast, slow, strict=True):
        torch.testing.assert_close(got, want, msg=name)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    inputs = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in [(6, 4), (9, 4), (9,)]
    ]
    assert torch.autograd.gradcheck(
        lambda x, W, b: kernels.encode_topk(x, W, b, 3, signed=True)[1], inputs
    )


def test_opposite_rows_have_opposite_codes() -> None:
    """One feature serves a direction and its opposite."""
    sae = AbsTopKSAE(AbsTopKConfig(d_sae=30, k=4), 8)
    x = torch.randn(20, 8)
    torch.testing.assert_close(sae.encode(-x), -sae.encode(x))
    assert (sae.encode(x) < 0).any()
    assert (sae.encode_sparse(x).l0() == 4).all()
    left_out = (x @ sae.W_enc_T.T).abs().masked_fill(sae.encode(x) != 0, 0).amax(1)
    kept = sae.encode(x).abs().masked_fill(sae.encode(x) == 0, torch.inf).amin(1)
    assert (kept >= left_out).all()


def test_masked_auxk_explains_the_hidden_coordinates() -> None:
    torch.manual_seed(0)
    sae = AbsTopKSAE(AbsTopKConfig(d_sae=16, k=2), 6)
    visible = torch.tensor([True, True, True, True, False, False])
    state = TrainingState(dead=torch.arange(16) < 5)
    y = torch.randn(20, 6)
    first = sae.training_output(TrainingBatch.of(y, visible=visible), state)
    # no dead feature, and nothing left to explain: 0, not NaN
    assert (
        sae.training_output(TrainingBatch.of(y), TrainingState(dead=state.dead & False)).terms[
            "auxk"
        ]
        == 0
    )
    error = (y - first.y_hat).detach() * ~visible
    pre = ((y - sae.b_dec) * visible @ sae.W_enc_T.T)[:, :5]
    top = pre * torch.zeros_like(pre).scatter(1, pre.abs().topk(3, dim=1).indices, 1.0)
    left = ((error - top @ sae.W_dec[:5]) * ~visible).square().sum()
    torch.testing.assert_close(
        first.terms["auxk"], (left / (error - error.mean(0)).square().sum()).detach()
    )
