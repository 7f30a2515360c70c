"""TopK and AuxK against numbers worked out by hand and a dense float64 objective."""

import pytest
import torch

from sae.architectures.topk import TopKConfig, TopKSAE
from sae.core.base import TrainingState
from sae.core.batch import TrainingBatch
from sae.core.losses import auxk, geometric_median
from saescope.errors import InputError


def by_hand() -> TopKSAE:
    """d_in 2, d_sae 3, k 1, with weights that can be multiplied in the head."""
    sae = TopKSAE(TopKConfig(d_sae=3, k=1), 2)
    with torch.no_grad():
        sae.W_enc_T.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.6, -0.8]]))
        sae.b_enc.copy_(torch.tensor([0.0, 0.5, 0.0]))
        sae.b_dec.copy_(torch.tensor([1.0, 0.0]))
    return sae


def test_forward_by_hand() -> None:
    sae = by_hand()
    x = torch.tensor([[3.0, 1.0], [1.0, 1.0], [0.0, -4.0]])
    # x - b_dec = (2,1), (0,1), (-1,-4); pre = (2, 1.5, -3), (0, 1.5, -1), (-1, -3.5, 5)
    assert sae.encode(x).tolist() == [[2, 0, 0], [0, 1.5, 0], [0, 0, 5]]
    torch.testing.assert_close(sae(x).x_hat, torch.tensor([[3.0, 0.0], [1.0, 1.5], [-2.0, -4.0]]))


def test_loss_by_hand() -> None:
    sae = by_hand()
    x = torch.tensor([[3.0, 1.0], [1.0, 1.0], [0.0, -4.0]])
    # errors (0,1), (0,-0.5), (2,0): squares 1, 0.25, 4; mean 1.75
    state = TrainingState(dead=torch.zeros(3, dtype=torch.bool))
    assert float(sae.training_output(TrainingBatch.of(x), state).loss.detach()) == pytest.approx(
        1.75
    )
    # feature 1 dead: its pre-activations 1.5, 1.5, -3.5, rectified; e_hat = (0,1.5), (0,1.5), 0
    state.dead = torch.tensor([False, True, False])
    output = sae.training_output(TrainingBatch.of(x), state)
    left = (0 + 0.25) + (0 + 4) + (4 + 0)  # (0,1)-(0,1.5), (0,-.5)-(0,1.5), (2,0)-0
    mean = torch.tensor([2 / 3, 0.5 / 3])
    total = sum(
        float((torch.tensor(e) - mean).square().sum()) for e in [(0.0, 1.0), (0, -0.5), (2, 0)]
    )
    assert float(output.terms["auxk"]) == pytest.approx(left / total, rel=1e-5)
    assert float(output.loss.detach()) == pytest.approx(1.75 + left / total / 32, rel=1e-5)


def test_negative_pre_activations_never_fire() -> None:
    sae = by_hand()
    with torch.no_grad():
        sae.b_enc.fill_(-100)
    codes = sae.encode_sparse(torch.randn(5, 2))
    assert codes.l0().tolist() == [0] * 5
    torch.testing.assert_close(sae.decode(codes), sae.b_dec.detach().expand(5, 2))


def dense_objective(sae: TopKSAE, y: torch.Tensor, dead: torch.Tensor, k_aux: int) -> torch.Tensor:
    """The paper's objective, dense and float64, written without the kernels."""
    centred = y - sae.b_dec
    pre = centred @ sae.W_enc_T.T + sae.b_enc
    mask = torch.zeros_like(pre).scatter(1, pre.topk(sae.config.k, dim=1).indices, 1.0)
    y_hat = torch.relu(pre) * mask @ sae.W_dec + sae.b_dec
    error = (y - y_hat).detach()
    dead_pre = pre[:, dead]
    k = min(k_aux, int(dead.sum()))
    dead_mask = torch.zeros_like(dead_pre).scatter(1, dead_pre.topk(k, dim=1).indices, 1.0)
    e_hat = torch.relu(dead_pre) * dead_mask @ sae.W_dec[dead]
    aux = (error - e_hat).square().sum() / (error - error.mean(0)).square().sum()
    fvu = (y - y_hat).square().sum(1).mean() / sae.normaliser.variance
    return fvu + sae.config.auxk_coefficient * aux


@pytest.mark.parametrize("k_aux", [3, 5, 9])
def test_gradients_equal_the_dense_float64_objective(k_aux: int) -> None:
    """With more dead features than k_aux, as many, and fewer."""
    torch.manual_seed(0)
    sae = TopKSAE(TopKConfig(d_sae=40, k=5, k_aux=k_aux), 7).double()
    with torch.no_grad():
        sae.W_enc_T.normal_()
        sae.b_dec.normal_()
        sae.b_enc.normal_(std=0.1)
    y = torch.randn(33, 7, dtype=torch.float64)
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[3, 8, 9, 21, 30]] = True
    loss = sae.training_output(TrainingBatch.of(y), TrainingState(dead=dead)).loss
    loss.backward()
    fast = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad()
    expected = dense_objective(sae, y, dead, k_aux)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, p in sae.named_parameters():
        torch.testing.assert_close(fast[name], p.grad, msg=name)


def test_auxk_reaches_dead_encoder_rows_and_no_living_ones() -> None:
    """sparsify's fused encoder gives AuxK no gradient here (training_libraries, defect 1)."""
    torch.manual_seed(0)
    W_enc_T, W_dec = (torch.randn(12, 5, requires_grad=True) for _ in range(2))
    b_enc = torch.zeros(12, requires_grad=True)
    dead = torch.arange(12) < 4
    auxk(torch.randn(9, 5), torch.randn(9, 5), W_enc_T, b_enc, W_dec, dead, 3).backward()
    for gradient in (W_enc_T.grad, b_enc.grad, W_dec.grad):
        assert gradient is not None
        gradient = gradient.to_dense()  # of chosen rows alone, until a loss adds the others
        assert gradient[:4].any()
        assert not gradient[4:].any()


@pytest.mark.parametrize("k_aux", [2, 9])
def test_dead_encoder_rows_have_a_gradient_in_training(k_aux: int) -> None:
    torch.manual_seed(0)
    sae = TopKSAE(TopKConfig(d_sae=12, k=2, k_aux=k_aux), 5).train()
    with torch.no_grad():
        sae.b_enc[4:] = 9.0  # those below are never chosen
    state = TrainingState(dead=torch.arange(12) < 4)
    output = sae.training_output(TrainingBatch.of(torch.randn(9, 5)), state)
    output.loss.backward()
    assert output.counts[:4].tolist() == [0] * 4
    for weight in (sae.W_enc_T, sae.W_dec):
        assert weight.grad is not None
        assert weight.grad.layout == torch.strided
        assert weight.grad[:4].any(1).all()


def test_auxk_is_detached_from_the_residual() -> None:
    residual = torch.randn(9, 5, requires_grad=True)
    W = torch.randn(12, 5, requires_grad=True)
    auxk(residual, torch.randn(9, 5), W, torch.zeros(12), W, torch.ones(12).bool(), 3).backward()
    assert residual.grad is None


def test_auxk_of_nothing_is_zero() -> None:
    W, zero = torch.randn(4, 5), torch.zeros(4)
    none, all_dead = torch.zeros(4).bool(), torch.ones(4).bool()
    assert auxk(torch.randn(3, 5), torch.randn(3, 5), W, zero, W, none, 2) == 0
    # a residual without spread has nothing to normalise by: 0, not NaN
    assert auxk(torch.zeros(3, 5), torch.randn(3, 5), W, zero, W, all_dead, 2) == 0


def test_decoder_gradient_has_no_part_along_its_rows() -> None:
    torch.manual_seed(0)
    sae = TopKSAE(TopKConfig(d_sae=16, k=3), 5)
    batch = TrainingBatch.of(torch.randn(20, 5))
    sae.training_output(batch, TrainingState(dead=torch.zeros(16).bool())).loss.backward()
    assert sae.W_dec.grad is not None
    before = sae.W_dec.grad.clone()
    sae.before_step()
    along = (sae.W_dec.grad * sae.W_dec).sum(1)
    assert along.abs().max() < 1e-6
    # and only that part is gone
    removed = before - sae.W_dec.grad
    cross = removed - (removed * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
    assert cross.abs().max() < 1e-6
    with torch.no_grad():
        sae.W_dec.add_(torch.randn_like(sae.W_dec))
    sae.after_step()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(16))


def test_starts_at_the_geometric_median_with_tied_weights() -> None:
    sae = TopKSAE(TopKConfig(d_sae=16, k=3), 2)
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    # of four corners and a far outlier the median stays near the corners, the mean does not
    y = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1], [1000, 0]])
    sae.start(TrainingBatch.of(y))
    assert sae.b_dec.norm() < 1
    assert geometric_median(y).norm() < 1 < y.mean(0).norm()


def test_geometric_median_minimises_the_summed_distance() -> None:
    y = torch.randn(30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    median = geometric_median(y, tolerance=1e-12, iterations=1000).requires_grad_()
    (y - median).norm(dim=1).sum().backward()
    assert median.grad is not None
    assert median.grad.norm() < 1e-6


def test_multi_topk_loss_by_hand() -> None:
    sae = by_hand()
    sae.config = TopKConfig(d_sae=3, k=1, multi_topk=2, multi_topk_coefficient=1 / 8)
    x = torch.tensor([[3.0, 1.0], [1.0, 1.0], [0.0, -4.0]])
    # two features kept: codes (2, 1.5, 0), (0, 1.5, 0), (0, 0, 5); errors (0,-.5), (0,-.5), (2,0)
    output = sae.training_output(TrainingBatch.of(x), TrainingState(dead=torch.zeros(3).bool()))
    assert float(output.terms["fvu"]) == pytest.approx(1.75)
    assert float(output.terms["multi_topk"]) == pytest.approx(4.5 / 3)
    assert float(output.loss.detach()) == pytest.approx(1.75 + 1.5 / 8)
    assert output.counts.tolist() == [1, 1, 1]


def test_multi_topk_gradients_equal_the_dense_float64_objective() -> None:
    """sparsify's fused encoder gives Multi-TopK no gradient (training_libraries, defect 1)."""
    torch.manual_seed(1)
    config = TopKConfig(d_sae=40, k=5, k_aux=3, multi_topk_coefficient=0.3, multi_topk=3)
    sae = TopKSAE(config, 7).double()
    with torch.no_grad():
        sae.W_enc_T.normal_()
        sae.b_dec.normal_()
    y = torch.randn(33, 7, dtype=torch.float64)
    dead = torch.arange(40) < 5
    names = dict(sae.named_parameters())
    loss = sae.training_output(TrainingBatch.of(y), TrainingState(dead=dead)).loss
    fast = torch.autograd.grad(loss, list(names.values()))
    pre = (y - sae.b_dec) @ sae.W_enc_T.T + sae.b_enc
    mask = torch.zeros_like(pre).scatter(1, pre.topk(15, dim=1).indices, 1.0)
    wide = (y - torch.relu(pre) * mask @ sae.W_dec - sae.b_dec).square().sum(1).mean()
    expected = dense_objective(sae, y, dead, 3) + 0.3 * wide
    torch.testing.assert_close(loss, expected)
    for name, got, want in zip(
        names, fast, torch.autograd.grad(expected, list(names.values())), strict=True
    ):
        torch.testing.assert_close(got, want, msg=name)
    # the term alone reaches encoder rows that are not among the k
    sae.config = TopKConfig(d_sae=40, k=1, multi_topk_coefficient=1.0, auxk_coefficient=0)
    output = sae.training_output(TrainingBatch.of(y[:1]), TrainingState(dead=dead & False))
    (gradient,) = torch.autograd.grad(output.loss, sae.W_enc_T)
    assert int(output.counts.sum()) == 1
    assert int(gradient.any(1).sum()) == int((pre[0].topk(4).values > 0).sum()) > 1


def test_k_falls_linearly_from_k_start() -> None:
    config = TopKConfig(d_sae=40, k=4, k_start=24, k_anneal_fraction=0.5)
    sae, y = TopKSAE(config, 30), torch.randn(50, 30)
    with torch.no_grad():
        sae.b_enc.fill_(100.0)  # every pre-activation is positive: L0 is k
    kept = {}
    for step in range(12):
        state = TrainingState(step=step, total_steps=10, dead=torch.zeros(40).bool())
        kept[step] = float(sae.training_output(TrainingBatch.of(y), state).l0)
    assert [kept[step] for step in range(6)] == [24, 20, 16, 12, 8, 4]
    assert all(kept[step] == 4 for step in range(6, 12))
    assert sae.encode_sparse(y).l0().tolist() == [4] * 50  # inference knows k alone


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k": 0}, r"sae.k: out of range \(given: 0; allowed: at least 1\)"),
        ({"k": 9}, r"sae.k: k exceeds the dictionary \(given: 9; allowed: 1 to 8\)"),
        ({"auxk_coefficient": -1.0}, "auxk_coefficient"),
        ({"k_aux": 0}, "k_aux"),
        ({"k_start": 1}, r"k_start: out of range \(given: 1; allowed: at least 2\)"),
        ({"k_start": 9}, "k_start exceeds the dictionary"),
        ({"k_anneal_fraction": 1.5}, "k_anneal_fraction"),
        ({"multi_topk_coefficient": -1.0}, "multi_topk_coefficient"),
        ({"multi_topk": 1}, "multi_topk"),
        ({"d_sae": 0, "k": 1}, "d_sae"),
    ],
)
def test_ranges(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TopKConfig(**{"d_sae": 8, "k": 2, **values})
