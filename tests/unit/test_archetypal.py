"""Archetypal SAEs: numbers worked out by hand, the convex hull, and the dictionary's one source."""

import pytest
import torch

from sae.architectures.archetypal import ArchetypalConfig, ArchetypalSAE, kmeans
from sae.core.base import TrainingState
from sae.core.batch import TrainingBatch
from sae.core.normaliser import Normaliser
from saescope.errors import InputError

X = torch.tensor([[3.0, 1.0], [1.0, 1.0], [0.0, -4.0]])


def by_hand() -> ArchetypalSAE:
    """d_in 2, d_sae 3, N 2; decoder rows (2, 0), (0, 2) and half of each, with (.1, 0) added."""
    sae = ArchetypalSAE(ArchetypalConfig(d_sae=3, k=1, n_candidates=2), 2)
    with torch.no_grad():
        sae.points.copy_(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
        sae.mixture.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]))
        sae.relaxation.copy_(torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.1, 0.0]]))
        sae.W_enc_T.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
        sae.b_enc.copy_(torch.tensor([0.0, 0.5, 0.0]))
        sae.b_dec.copy_(torch.tensor([1.0, 0.0]))
    return sae


def random(**options) -> ArchetypalSAE:
    torch.manual_seed(0)
    sae = ArchetypalSAE(ArchetypalConfig(**{"d_sae": 24, "k": 3, "n_candidates": 9, **options}), 7)
    sae.start(TrainingBatch.of(torch.randn(50, 7)))
    return sae


def test_forward_and_loss_by_hand() -> None:
    sae = by_hand()
    torch.testing.assert_close(sae.W_dec, torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.1, 1.0]]))
    # pre = (2, 1.5, -3), (0, 1.5, -1), (-1, -3.5, 5)
    x_hat = torch.tensor([[5.0, 0.0], [1.0, 3.0], [6.5, 5.0]])
    torch.testing.assert_close(sae(X).x_hat, x_hat)
    output = sae.training_output(TrainingBatch.of(X), TrainingState(dead=torch.zeros(3).bool()))
    assert float(output.loss.detach()) == pytest.approx((5 + 4 + 123.25) / 3)


def test_gradients_equal_the_dense_float64_objective() -> None:
    torch.manual_seed(0)
    config = ArchetypalConfig(d_sae=40, k=5, n_candidates=11, k_aux=3, multi_topk_coefficient=0.3)
    sae = ArchetypalSAE(config, 7).double()
    with torch.no_grad():
        sae.mixture.copy_(torch.rand(40, 11).softmax(1))
        sae.relaxation.normal_(std=0.1)
        sae.b_dec.normal_()
        sae.b_enc.normal_(std=0.1)
    y = torch.randn(33, 7, dtype=torch.float64)
    dead = torch.arange(40) < 5
    names = dict(sae.named_parameters())
    loss = sae.training_output(TrainingBatch.of(y), TrainingState(dead=dead)).loss
    fast = torch.autograd.grad(loss, list(names.values()))

    decoder = sae.mixture @ sae.points + sae.relaxation
    pre = (y - sae.b_dec) @ sae.W_enc_T.T + sae.b_enc

    def y_hat(kept: int) -> torch.Tensor:
        mask = torch.zeros_like(pre).scatter(1, pre.topk(kept, dim=1).indices, 1.0)
        return torch.relu(pre) * mask @ decoder + sae.b_dec

    error = (y - y_hat(5)).detach()
    top = torch.zeros_like(pre[:, dead]).scatter(1, pre[:, dead].topk(3, dim=1).indices, 1.0)
    left = (error - torch.relu(pre[:, dead]) * top @ decoder[dead]).square().sum()
    expected = (
        (y - y_hat(5)).square().sum(1).mean()
        + 0.3 * (y - y_hat(20)).square().sum(1).mean()
        + left / (error - error.mean(0)).square().sum() / 32
    )
    torch.testing.assert_close(loss, expected)
    slow = torch.autograd.grad(expected, list(names.values()))
    for name, got, want in zip(names, fast, slow, strict=True):
        torch.testing.assert_close(got, want, msg=name)


@pytest.mark.parametrize("delta", [0.0, 0.2])
def test_rows_stay_within_delta_of_the_convex_hull(delta: float) -> None:
    sae = random(delta=delta)
    optimiser = torch.optim.Adam(sae.parameters(), lr=0.05)
    for _ in range(20):
        batch = TrainingBatch.of(torch.randn(50, 7))
        output = sae.training_output(batch, TrainingState(dead=torch.arange(24) < 3))
        optimiser.zero_grad()
        output.loss.backward()
        sae.before_step()
        optimiser.step()
        sae.after_step()
    assert (sae.mixture >= 0).all()
    torch.testing.assert_close(sae.mixture.sum(1), torch.ones(24))
    radius = delta * float(sae.points.norm(dim=1).square().mean().sqrt())
    distance = (sae.W_dec - sae.mixture @ sae.points).norm(dim=1)
    assert distance.max() <= radius + 1e-5
    if delta:  # and the ball was reached
        assert distance.max() > 0.99 * radius
    # no direction has a decoder row further out than the furthest point and the radius
    directions = torch.nn.functional.normalize(torch.randn(200, 7), dim=1)
    furthest = (directions @ sae.points.T).amax(1)
    assert ((directions @ sae.W_dec.T).amax(1) <= furthest + radius + 1e-5).all()


def test_a_row_without_weight_starts_again() -> None:
    sae = by_hand()
    with torch.no_grad():
        sae.mixture[0] = -1.0
    sae.after_step()
    assert sae.mixture[0].tolist() == [0.5, 0.5]


def test_start_takes_candidates_from_the_batch() -> None:
    sae = ArchetypalSAE(ArchetypalConfig(d_sae=7, k=2, n_candidates=3, candidates="sample"), 2)
    y = torch.arange(12.0).reshape(6, 2)
    sae.start(TrainingBatch.of(y))
    torch.testing.assert_close(sae.points + sae.b_dec, y[[0, 2, 4]])
    # atoms 0 to 2 at a candidate each, the others half-way between two
    torch.testing.assert_close(sae.W_dec[:3], sae.points)
    torch.testing.assert_close(sae.W_dec[3], (sae.points[0] + sae.points[1]) / 2)
    torch.testing.assert_close(sae.W_dec[6], sae.points[0] / 2 + sae.points[2] / 2)
    # rows are given again if there are too few
    few = ArchetypalSAE(ArchetypalConfig(d_sae=7, k=2, n_candidates=8), 2)
    few.start(TrainingBatch.of(y))
    torch.testing.assert_close(few.points + few.b_dec, y[[0, 1, 2, 3, 4, 5, 0, 1]])
    assert all((each == 0).all() for each in [few.relaxation, few.b_enc])


def test_kmeans_finds_separate_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    rows = means.repeat_interleave(20, 0) + 0.1 * torch.randn(60, 2, generator=generator)
    expected = rows.view(3, 20, 2).mean(1)
    torch.testing.assert_close(kmeans(rows, 3), expected)
    assert torch.equal(kmeans(rows, 3), kmeans(rows, 3))
    # the points are means of rows: nothing lies outside the hull
    centres = kmeans(rows, 7)
    directions = torch.nn.functional.normalize(torch.randn(50, 2, generator=generator), dim=1)
    assert ((directions @ centres.T).amax(1) <= (directions @ rows.T).amax(1) + 1e-5).all()


def test_dictionary_follows_its_parts() -> None:
    """W_dec is kept between uses; a change of what it is made of is seen at once."""
    sae = random().eval()
    first = sae.W_dec
    assert sae.W_dec is first
    with torch.no_grad():
        sae.relaxation[4, 2] += 1
    assert float(sae.W_dec[4, 2] - first[4, 2]) == pytest.approx(1)
    assert torch.equal(sae.clone().W_dec, sae.W_dec)
    other = random(k=5)
    other.load_state_dict(sae.state_dict())
    assert torch.equal(other.eval().W_dec, sae.W_dec)
    assert sae.half().W_dec.dtype == torch.float16


def test_fold_keeps_the_dictionary_and_its_parts_in_step() -> None:
    """With a scale for each of two sites, too."""
    sae, x = random().eval(), torch.randn(20, 7)
    parts = [
        Normaliser("centred", torch.randn(width), torch.tensor(scale), 1.0)
        for width, scale in ((4, 0.5), (3, 3.0))
    ]
    sae.normaliser = Normaliser.side_by_side(parts)
    folded = sae.fold()
    torch.testing.assert_close(folded(x).x_hat, sae(x).x_hat)
    torch.testing.assert_close(folded.encode(x), sae.encode(x))
    torch.testing.assert_close(folded.W_dec, folded.mixture @ folded.points + folded.relaxation)
    assert not torch.allclose(folded.W_dec, sae.W_dec)


def test_dictionary_is_differentiable_outside_the_objective_too() -> None:
    sae = random().train()
    sae(torch.randn(5, 7)).x_hat.square().sum().backward()
    assert sae.mixture.grad is not None
    assert sae.mixture.grad.any()
    with pytest.raises(AttributeError):
        sae.training_output(None, TrainingState(dead=torch.zeros(24).bool()))  # type: ignore[arg-type]
    with torch.no_grad():  # a failed step leaves nothing behind
        sae.relaxation.add_(1)
        torch.testing.assert_close(sae.W_dec, sae.mixture @ sae.points + sae.relaxation)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_candidates": 0}, "n_candidates"),
        ({"delta": -0.1}, "delta"),
        ({"candidates": "hull"}, "no such candidates"),
        ({"k": 9}, "k exceeds the dictionary"),
    ],
)
def test_ranges(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ArchetypalConfig(**{"d_sae": 8, "k": 2, **values})
