"""The batch an objective takes: units, layers, hidden coordinates, the tilted mean."""

import math

import pytest
import torch

from sae.architectures.topk import TopKConfig, TopKSAE
from sae.core.base import SparseAutoencoder, TrainingState
from sae.core.batch import RawBatch, TrainingBatch
from sae.core.normaliser import Normaliser
from sae.training.batch_maker import BatchMaker, LossConfig
from saescope.errors import InputError

Y = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])


def test_mean_is_an_fvu() -> None:
    batch = TrainingBatch.of(Y, variance=2.0)
    assert batch.per_row(torch.zeros(3, 2)).tolist() == [12.5, 0.0, 0.5]
    assert float(batch.reconstruction(torch.zeros(3, 2))) == pytest.approx(13 / 3)


@pytest.mark.parametrize("tilt", [1e-3, 0.5, 3.0])
def test_tilted_mean_and_its_softmax_gradient(tilt: float) -> None:
    """The gradient weighs rows by softmax(t l) (Li et al. 2021); equal tilts in equal units."""
    y_hat = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    batch = TrainingBatch.of(Y.double(), variance=2.0, tilt=tilt)
    loss = batch.reconstruction(y_hat)
    rows = torch.tensor([12.5, 0.0, 0.5], dtype=torch.float64)
    assert float(loss.detach()) == pytest.approx(math.log(float((tilt * rows).exp().mean())) / tilt)
    loss.backward()
    weight = torch.softmax(tilt * rows, 0)
    assert y_hat.grad is not None
    torch.testing.assert_close(y_hat.grad, -2 * weight[:, None] * Y.double() / 2.0)
    assert rows.mean() < float(loss.detach()) < rows.max()


def test_a_huge_tilt_does_not_overflow() -> None:
    """t = 1e9 is the maximum (Muhamed et al. 2024 use 500 and 1e9)."""
    batch = TrainingBatch.of(Y, variance=2.0, tilt=1e9)
    assert float(batch.reconstruction(torch.zeros(3, 2))) == pytest.approx(12.5)


def test_hidden_coordinates_carry_the_loss_and_do_not_reach_the_encoder() -> None:
    visible = torch.tensor([True, False])
    batch = TrainingBatch.of(Y, variance=2.0, visible=visible)
    # second coordinates 4, 0, 0: squares over the variance and the hidden half
    assert batch.per_row(torch.zeros(3, 2)).tolist() == [16.0, 0.0, 0.0]
    assert batch.mask_input(Y).tolist() == [[3.0, 0.0], [0.0, 0.0], [1.0, 0.0]]
    sae = TopKSAE(TopKConfig(d_sae=4, k=2), 2)
    out = sae.training_output(batch, TrainingState(dead=torch.zeros(4).bool()))
    changed = TrainingBatch(y=Y * torch.tensor([1.0, 9.0]), target=Y, variance=2.0, visible=visible)
    again = sae.training_output(changed, TrainingState(dead=torch.zeros(4).bool()))
    assert torch.equal(out.y_hat, again.y_hat)


def several_layers() -> SparseAutoencoder:
    sae = TopKSAE(TopKConfig(d_sae=4, k=2), 2)
    for name, size in (("a", 1.0), ("b", 10.0)):
        x = size * torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
        sae.site_normalisers[name] = Normaliser.fit(
            "unit_mean_square", mean=x.mean(0), mean_square=float(x.square().sum(1).mean())
        )
    return sae


def test_each_layer_has_its_own_units() -> None:
    raw = RawBatch(torch.tensor([[2.0, 0.0], [20.0, 0.0]]), group=torch.tensor([0, 1]))
    batch = BatchMaker(several_layers(), LossConfig()).make(raw, torch.Generator())
    torch.testing.assert_close(batch.y, torch.tensor([[2.0, 0.0], [2.0, 0.0]]))
    torch.testing.assert_close(batch.per_row(torch.zeros(2, 2)), torch.tensor([4.0, 4.0]))


def test_several_layers_are_told_apart_at_inference() -> None:
    sae = several_layers()
    with torch.no_grad():
        sae.b_dec.normal_()
    with pytest.raises(InputError, match=r"choose one with sae.at\(site\).*a, b"):
        sae(torch.randn(3, 2))
    x = torch.randn(3, 2)
    near, far = sae.at("a"), sae.at("b")
    torch.testing.assert_close(far(10 * x).x_hat, 10 * near(x).x_hat)
    with pytest.raises(InputError, match="not a site"):
        sae.at("c")


def test_masks_are_of_the_runs_own_randomness() -> None:
    sae = TopKSAE(TopKConfig(d_sae=4, k=2), 10)
    maker = BatchMaker(sae, LossConfig(visible_fraction=0.7))
    one, two = (maker.make(RawBatch(torch.randn(3, 10)), torch.Generator()).visible for _ in "ab")
    assert one is not None
    assert two is not None
    assert torch.equal(one, two)
    assert int(one.sum()) == 7
    generator = torch.Generator()
    masks = [maker.make(RawBatch(torch.randn(3, 10)), generator).visible for _ in range(50)]
    seen = torch.stack([mask for mask in masks if mask is not None])
    assert len(seen) == 50
    assert seen.any(0).all()
    assert not seen.all(0).any()


def test_wrong_objectives() -> None:
    with pytest.raises(InputError, match=r"trainer\.loss\.tilt"):
        LossConfig(tilt=-1.0)
    with pytest.raises(InputError, match="visible_fraction"):
        LossConfig(visible_fraction=0.0)
    with pytest.raises(InputError, match="visible coordinates"):
        BatchMaker(TopKSAE(TopKConfig(d_sae=4, k=2), 3), LossConfig(visible_fraction=0.99))
