"""MSAE against numbers worked out by hand and separate dense TopK losses."""

import pytest
import torch

from sae.architectures.msae import MSAE, MSAEConfig
from sae.core.base import TrainingState
from sae.core.batch import TrainingBatch
from saescope.errors import InputError

X = torch.tensor([[3.0, 1.0], [1.0, 1.0], [0.0, -4.0]])


def by_hand(**options) -> MSAE:
    """d_in 2, d_sae 3; pre-activations of X are (2, 1.5, -3), (0, 1.5, -1), (-1, -3.5, 5)."""
    sae = MSAE(MSAEConfig(d_sae=3, k=1, ks=(1, 2), **options), 2)
    with torch.no_grad():
        sae.W_enc_T.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.6, -0.8]]))
        sae.b_enc.copy_(torch.tensor([0.0, 0.5, 0.0]))
        sae.b_dec.copy_(torch.tensor([1.0, 0.0]))
    return sae


@pytest.mark.parametrize(
    ("weighting", "loss"), [("uniform", (1.75 + 1.5) / 2), ("reverse", (2 * 1.75 + 1.5) / 3)]
)
def test_loss_by_hand(weighting: str, loss: float) -> None:
    # one feature kept: errors (0,1), (0,-.5), (2,0), FVU 5.25 / 3
    # two kept: codes (2, 1.5, 0), (0, 1.5, 0), (0, 0, 5), errors (0,-.5), (0,-.5), (2,0), 4.5 / 3
    sae = by_hand(weighting=weighting)
    output = sae.training_output(TrainingBatch.of(X), TrainingState(dead=torch.zeros(3).bool()))
    assert float(output.terms["fvu_1"]) == pytest.approx(1.75)
    assert float(output.terms["fvu_2"]) == pytest.approx(1.5)
    assert float(output.terms["fvu"]) == pytest.approx(1.75)  # of the level in use
    assert float(output.loss.detach()) == pytest.approx(loss)
    assert output.counts.tolist() == [1, 1, 1]
    torch.testing.assert_close(output.y_hat, torch.tensor([[3.0, 0.0], [1.0, 1.5], [-2.0, -4.0]]))


def test_forward_by_hand_at_every_k() -> None:
    sae = by_hand()
    assert sae.encode(X).tolist() == [[2, 0, 0], [0, 1.5, 0], [0, 0, 5]]
    two = sae.at_k(2)
    assert two.encode(X).tolist() == [[2, 1.5, 0], [0, 1.5, 0], [0, 0, 5]]
    assert two.config.levels == sae.config.levels == (1, 2)
    assert sae.config.k == 1
    with pytest.raises(InputError, match="k exceeds the dictionary"):
        sae.at_k(4)


@pytest.mark.parametrize("weighting", ["uniform", "reverse"])
@pytest.mark.parametrize("k", [6, 4])  # one of the levels, and a k that is none
def test_gradients_equal_separate_dense_float64_losses(weighting: str, k: int) -> None:
    torch.manual_seed(0)
    config = MSAEConfig(d_sae=40, k=k, ks=(2, 6, 18), weighting=weighting, k_aux=3)  # type: ignore[arg-type]
    sae = MSAE(config, 7).double()
    with torch.no_grad():
        sae.W_enc_T.normal_()
        sae.b_dec.normal_()
        sae.b_enc.normal_(std=0.1)
    y = torch.randn(33, 7, dtype=torch.float64)
    dead = torch.arange(40) < 5
    names = dict(sae.named_parameters())
    output = sae.training_output(TrainingBatch.of(y), TrainingState(dead=dead))
    fast = torch.autograd.grad(output.loss, list(names.values()))

    pre = (y - sae.b_dec) @ sae.W_enc_T.T + sae.b_enc

    def y_hat(kept: int) -> torch.Tensor:
        mask = torch.zeros_like(pre).scatter(1, pre.topk(kept, dim=1).indices, 1.0)
        return torch.relu(pre) * mask @ sae.W_dec + sae.b_dec

    alpha = {"uniform": (1, 1, 1), "reverse": (3, 2, 1)}[weighting]
    fvu = [(y - y_hat(kept)).square().sum(1).mean() for kept in (2, 6, 18)]
    error = (y - y_hat(k)).detach()
    dead_pre = pre[:, dead]
    top = torch.zeros_like(dead_pre).scatter(1, dead_pre.topk(3, dim=1).indices, 1.0)
    left = (error - torch.relu(dead_pre) * top @ sae.W_dec[dead]).square().sum()
    aux = left / (error - error.mean(0)).square().sum()
    expected = sum(a * f for a, f in zip(alpha, fvu, strict=True)) / sum(alpha) + aux / 32
    torch.testing.assert_close(output.loss, expected)
    slow = torch.autograd.grad(expected, list(names.values()))
    for name, got, want in zip(names, fast, slow, strict=True):
        torch.testing.assert_close(got, want, msg=name)
    torch.testing.assert_close(output.y_hat, y_hat(k))


def test_levels_are_nested_and_never_worse_in_count() -> None:
    torch.manual_seed(0)
    sae, x = MSAE(MSAEConfig(d_sae=40, k=8), 12), torch.randn(30, 12)
    codes = {k: sae.at_k(k).encode(x) for k in (1, 2, 8, 32, 40)}
    for low, high in [(1, 2), (2, 8), (8, 32), (32, 40)]:
        assert ((codes[low] != 0) <= (codes[high] != 0)).all()
        assert (codes[low] != 0).sum(1).max() <= low
    # every positive pre-activation, as the paper's own inference
    pre = (x - sae.b_dec) @ sae.W_enc_T.T + sae.b_enc
    torch.testing.assert_close(codes[40], torch.relu(pre))


def test_the_sparsest_level_weighs_most_in_reverse() -> None:
    weights = MSAEConfig(d_sae=99, ks=(4, 8, 16, 32), weighting="reverse").weights
    assert weights == (0.4, 0.3, 0.2, 0.1)
    assert MSAEConfig(d_sae=99, ks=(4, 8, 16, 32)).weights == (0.25,) * 4


def test_default_levels_lie_around_k() -> None:
    assert MSAEConfig(k=32).levels == (8, 16, 32, 64, 128)
    assert MSAEConfig(k=1, d_sae=3).levels == (1, 2, 3)
    assert MSAEConfig(k=4, d_sae=10).levels == (1, 2, 4, 8, 10)
    assert MSAEConfig(k=32).with_target_l0(64).levels == (16, 32, 64, 128, 256)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ks": (4, 2)}, "levels must rise"),
        ({"ks": (2, 2)}, "levels must rise"),
        ({"ks": (0, 2)}, "sae.ks: out of range"),
        ({"ks": (2, 9)}, "ks exceeds the dictionary"),
        ({"weighting": "RW"}, "no such weighting"),
        ({"k": 9}, "k exceeds the dictionary"),
    ],
)
def test_ranges(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        MSAEConfig(**{"d_sae": 8, "k": 2, **values})
