"""CSR against numbers worked out by hand, dense float64 formulas and its tied dictionary."""

import math

import pytest
import torch

from sae.architectures import csr
from sae.architectures.csr import CSRSAE, CSRConfig, contrastive_loss, similarities
from sae.core.base import TrainingState
from sae.core.batch import TrainingBatch
from sae.core.normaliser import Normaliser
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError

X = torch.tensor([[3.0, 1.0], [1.0, 1.0], [0.0, -4.0]])
ALIVE = torch.zeros(3, dtype=torch.bool)


def by_hand(**options) -> CSRSAE:
    """d_in 2, d_sae 3; X - b_dec = (2,1), (0,1), (-1,-4)."""
    sae = CSRSAE(CSRConfig(**{"d_sae": 3, "k": 1, "multi_topk": 2, **options}), 2)
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.6, -0.8]]))
        sae.b_enc.copy_(torch.tensor([0.0, 0.5, 0.0]))
        sae.b_dec.copy_(torch.tensor([1.0, 0.0]))
    return sae


def test_forward_and_loss_by_hand() -> None:
    # pre = (2, 1.5, -2), (0, 1.5, -.8), (-1, -3.5, 3.8)
    sae = by_hand()
    torch.testing.assert_close(sae.encode(X), torch.tensor([[2.0, 0, 0], [0, 1.5, 0], [0, 0, 3.8]]))
    x_hat = torch.tensor([[3.0, 0.0], [1.0, 1.5], [-1.28, -3.04]])
    torch.testing.assert_close(sae(X).x_hat, x_hat)
    output = sae.training_output(TrainingBatch.of(X), TrainingState(dead=ALIVE))
    # squared errors 1, .25, 1.28^2 + .96^2 = 2.56; with two features .25, .25, 2.56
    assert float(output.terms["fvu"]) == pytest.approx(3.81 / 3)
    assert float(output.terms["multi_topk"]) == pytest.approx(3.06 / 3)
    # unit codes are three axes: similarities 1 and 0, over a temperature of .2
    uniformity = math.log(1 + 2 * math.exp(-5))
    assert float(output.terms["contrastive"]) == pytest.approx(uniformity, rel=1e-5)
    loss = 3.81 / 3 + 3.06 / 3 / 8 + 0.1 * uniformity
    assert float(output.loss.detach()) == pytest.approx(loss)


def test_contrastive_loss_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 1.0]])
    e = math.exp
    expected = [
        -math.log(e(2) / (e(2) + e(1) + e(0))),
        -math.log(e(3) / (e(1) + e(3) + e(0.5))),
        -math.log(e(1) / (e(0) + e(0.5) + e(1))),
    ]
    assert float(contrastive_loss(logits, None)) == pytest.approx(sum(expected) / 3)
    # rows 0 and 1 are of a class, itself left out; row 2 has none and stays with itself
    mates = [-math.log(e(1) / (e(1) + e(0))), -math.log(e(1) / (e(1) + e(0.5))), expected[2]]
    for labels in ([7, 7, -1], [7, 7, 2]):
        got = float(contrastive_loss(logits, torch.tensor(labels)))
        assert got == pytest.approx(sum(mates) / 3)
    # two mates count alike; -1 is never a class
    three = contrastive_loss(logits, torch.tensor([4, 4, 4]))
    first = -(1 + 0) / 2 + math.log(e(1) + e(0))
    second = -(1 + 0.5) / 2 + math.log(e(1) + e(0.5))
    third = -(0 + 0.5) / 2 + math.log(e(0) + e(0.5))
    assert float(three) == pytest.approx((first + second + third) / 3)
    none = contrastive_loss(logits, torch.full((3,), -1))
    assert float(none) == pytest.approx(sum(expected) / 3)


@pytest.mark.parametrize("at_once", [1, 3, 100])
@pytest.mark.parametrize("unit", [True, False])
def test_similarities_and_gradients_equal_the_dense_ones(
    unit: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csr, "_CHUNK_ELEMENTS", at_once * 90)
    torch.manual_seed(0)
    dense = torch.relu(torch.randn(7, 90, dtype=torch.float64) - 1.8)
    dense[3] = 0  # a row on which nothing fires
    index = dense.topk(4, dim=1).indices  # with stored zeros, as TopK leaves them
    index[3] = index[2]  # of features that fire elsewhere
    dense = torch.zeros_like(dense).scatter(1, index, dense.gather(1, index))
    codes = SparseCodes.from_fixed(index, dense.gather(1, index), 90)
    value = codes.value.clone().requires_grad_()
    sparse = SparseCodes(codes.row_ptr, codes.index, value, 90)
    got = similarities(sparse, unit=unit)
    leaf = dense.clone().requires_grad_()
    norm = leaf.norm(dim=1, keepdim=True).clamp_min(1e-30) if unit else torch.ones(7, 1)
    z = torch.where(leaf.any(1, keepdim=True), leaf / norm, 0.0)
    want = z @ z.T
    torch.testing.assert_close(got, want)
    weights = torch.randn(7, 7, dtype=torch.float64)
    (got_d,) = torch.autograd.grad((got * weights).sum(), value)
    (want_d,) = torch.autograd.grad((want * weights).sum(), leaf)
    fires = codes.value > 0
    torch.testing.assert_close(got_d[fires], want_d[codes.rows(), codes.index][fires])
    assert not got_d[codes.rows() == 3].any() or not unit


@pytest.mark.parametrize("positives", ["self", "class"])
def test_gradients_equal_the_dense_float64_objective(positives: str) -> None:
    """k, 4k, AuxK and the contrastive term all reach the one dictionary, and add up there."""
    torch.manual_seed(0)
    config = CSRConfig(d_sae=40, k=2, k_aux=3, gamma=0.7, positives=positives)  # type: ignore[arg-type]
    sae = CSRSAE(config, 7).double()
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.b_enc.normal_(std=0.1)
    y = torch.randn(33, 7, dtype=torch.float64)
    dead = torch.arange(40) < 5
    labels = torch.randint(-1, 4, (33,))
    names = dict(sae.named_parameters())
    assert set(names) == {"W_dec", "b_enc", "b_dec"}
    batch = TrainingBatch.of(y, labels=labels)
    loss = sae.training_output(batch, TrainingState(dead=dead)).loss
    fast = torch.autograd.grad(loss, list(names.values()))

    pre = (y - sae.b_dec) @ sae.W_dec.T + sae.b_enc

    def code(kept: int) -> torch.Tensor:
        mask = torch.zeros_like(pre).scatter(1, pre.topk(kept, dim=1).indices, 1.0)
        return torch.relu(pre) * mask

    fvu = [(y - code(kept) @ sae.W_dec - sae.b_dec).square().sum(1).mean() for kept in (2, 8)]
    error = (y - code(2) @ sae.W_dec - sae.b_dec).detach()
    dead_pre = pre[:, dead]
    top = torch.zeros_like(dead_pre).scatter(1, dead_pre.topk(3, dim=1).indices, 1.0)
    left = (error - torch.relu(dead_pre) * top @ sae.W_dec[dead]).square().sum()
    aux = left / (error - error.mean(0)).square().sum()
    z = code(2)
    z = z / z.norm(dim=1, keepdim=True)
    s = z @ z.T / 0.2
    terms = []
    for i in range(33):
        mates = [j for j in range(33) if j != i and labels[i] >= 0 and bool(labels[i] == labels[j])]
        if positives == "self" or not mates:
            terms.append(s[i].logsumexp(0) - s[i, i])
        else:
            others = [j for j in range(33) if j != i]
            terms.append(s[i, others].logsumexp(0) - s[i, mates].mean())
    expected = fvu[0] + fvu[1] / 8 + aux / 32 + 0.7 * torch.stack(terms).mean()
    torch.testing.assert_close(loss, expected)
    slow = torch.autograd.grad(expected, list(names.values()))
    for name, got, want in zip(names, fast, slow, strict=True):
        torch.testing.assert_close(got, want, msg=name)


def test_the_term_spreads_codes_and_classes_draw_together() -> None:
    """Gradient steps on the term alone: self lowers every cosine, class raises those of mates."""
    torch.manual_seed(0)
    start = torch.rand(6, 12) + 0.1
    index = torch.arange(12).expand(6, 12)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    mates = (labels[:, None] == labels) & ~torch.eye(6, dtype=torch.bool)
    after = {}
    for name, classes in [("self", None), ("class", labels)]:
        value = start.clone().requires_grad_()
        for _ in range(200):
            codes = SparseCodes.from_fixed(index, value, 12)
            loss = contrastive_loss(similarities(codes, unit=True) / 0.2, classes)
            (gradient,) = torch.autograd.grad(loss, value)
            value = (value - 0.5 * gradient).detach().requires_grad_()
        unit = torch.nn.functional.normalize(value.detach(), dim=1)
        after[name] = unit @ unit.T
    unit = torch.nn.functional.normalize(start, dim=1)
    before = unit @ unit.T
    assert after["self"][mates].mean() < before[mates].mean() - 0.3
    assert after["class"][mates].mean() > before[mates].mean() + 0.1
    assert after["class"][~mates].mean() < before[~mates].mean()


def test_dictionary_is_tied_and_its_rows_keep_unit_norm() -> None:
    torch.manual_seed(0)
    sae = CSRSAE(CSRConfig(d_sae=20, k=3), 5)
    optimiser = torch.optim.Adam(sae.parameters(), lr=0.05)
    for _ in range(3):
        output = sae.training_output(
            TrainingBatch.of(torch.randn(30, 5)), TrainingState(dead=torch.zeros(20).bool())
        )
        optimiser.zero_grad()
        output.loss.backward()
        sae.before_step()
        optimiser.step()
        sae.after_step()
    assert sae.W_enc_T is sae.W_dec
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(20))
    assert "W_enc_T" not in sae.state_dict()
    assert sae.clone().W_enc_T is not sae.W_dec


def test_what_would_untie_it_is_refused() -> None:
    with pytest.raises(InputError, match="a tied SAE reconstructs what it reads"):
        CSRSAE(CSRConfig(d_sae=20, k=3), 5, 4)
    sae = CSRSAE(CSRConfig(d_sae=20, k=3), 4)
    parts = [Normaliser("centred", torch.zeros(2), torch.tensor(s), 1.0) for s in (1.0, 3.0)]
    sae.normaliser = Normaliser.side_by_side(parts)
    with pytest.raises(InputError, match="would untie the dictionary"):
        sae.fold()


def test_class_positives_need_labels() -> None:
    sae = by_hand(positives="class")
    with pytest.raises(InputError, match="needs a class for each row"):
        sae.training_output(TrainingBatch.of(X), TrainingState(dead=ALIVE))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gamma": -1.0}, "gamma"),
        ({"temperature": 0.0}, "temperature"),
        ({"positives": "labels"}, "no such positives"),
        ({"k": 9}, "k exceeds the dictionary"),
    ],
)
def test_ranges(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CSRConfig(**{"d_sae": 8, "k": 2, **values})
