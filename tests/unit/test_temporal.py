"""Temporal SAE: by hand, against a dense float64 formula, and what it does to neighbours."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from sae.architectures.matryoshka import MatryoshkaConfig, MatryoshkaSAE
from sae.architectures.temporal import TemporalConfig, TemporalSAE, first_of_pairs
from sae.core.base import TrainingState
from sae.core.batch import TrainingBatch
from saescope.errors import InputError


def state(d_sae: int) -> TrainingState:
    return TrainingState(dead=torch.zeros(d_sae, dtype=torch.bool))


def test_loss_by_hand() -> None:
    """Two pairs, codes that are read off: the high level is features 0 and 1 of 4."""
    config = TemporalConfig(
        d_sae=4, k=2, group_fractions=(0.5, 0.5), temporal_coefficient=0.5, auxk_coefficient=0.0
    )
    sae = TemporalSAE(config, 4)
    with torch.no_grad():
        for weights in (sae.W_enc_T, sae.W_dec):
            weights.copy_(torch.eye(4))
    # tokens 10 and 11 of a sequence, 50 and 51 of another, and one alone
    y = torch.tensor(
        [[3.0, 4.0, 0, 0], [1.0, 0, 2.0, 0], [0, 2.0, 0, 1.0], [0, 5.0, 0, 0], [0, 0, 1.0, 3.0]]
    )
    batch = TrainingBatch.of(y, variance=2.0, labels=torch.tensor([10, 11, 50, 51, 90]))
    output = sae.training_output(batch, state(4))
    # of all: nothing is left over; of the high level alone: 4, 1 and 1 + 9
    assert float(output.terms["fvu"]) == 0
    assert float(output.terms["nested"]) == pytest.approx((4 + 1 + 10) / 5 / 2 / 2)
    # z = (.6, .8), (0, 1) against z' = (1, 0), (0, 1): s = ((.6, .8), (0, 1))
    e = math.exp
    forward = -math.log(e(0.6) / (e(0.6) + e(0.8))) - math.log(e(1) / (e(0) + e(1)))
    backward = -math.log(e(0.6) / (e(0.6) + e(0))) - math.log(e(1) / (e(0.8) + e(1)))
    contrast = (forward + backward) / 2
    assert float(output.terms["contrastive"]) == pytest.approx(contrast)
    assert float(output.terms["paired"]) == pytest.approx(2 / 5)
    assert float(output.loss.detach()) == pytest.approx(15 / 20 + 0.5 * contrast)


def dense_loss(sae: TemporalSAE, y: torch.Tensor, first: list[int]) -> torch.Tensor:
    """The formulas of the file's heading on dense matrices; the selection by plain sorting."""
    config = sae.config
    pre = torch.relu((y - sae.b_dec) @ sae.W_enc_T.T + sae.b_enc)
    kept = pre.detach().flatten().topk(round(config.k * len(y))).indices
    f = pre * torch.zeros(pre.numel(), dtype=pre.dtype).index_fill_(0, kept, 1).view_as(pre)
    width = config.widths()[0]
    high = f[:, :width]
    loss = torch.zeros((), dtype=y.dtype)
    for codes, rows in ((high, sae.W_dec[:width]), (f, sae.W_dec)):
        loss = loss + (y - codes @ rows - sae.b_dec).square().sum(1).mean() / 3 / 2
    if config.unit_codes:
        high = functional.normalize(high, dim=1)
    now, later = high[first], high[[i + 1 for i in first]]
    logits = now @ later.T / config.temperature
    same = torch.arange(len(first))
    both = functional.cross_entropy(logits, same) + functional.cross_entropy(logits.T, same)
    return loss + config.temporal_coefficient * both


@pytest.mark.parametrize("unit_codes", [True, False])
def test_loss_and_gradients_equal_the_dense_float64_formula(unit_codes: bool) -> None:
    torch.manual_seed(0)
    config = TemporalConfig(
        d_sae=40, k=6, temporal_coefficient=0.7, temperature=0.5, unit_codes=unit_codes,
        auxk_coefficient=0.0,
    )  # fmt: skip
    sae = TemporalSAE(config, 9).double()
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1)
        sae.b_dec.normal_(std=0.3)
    y = torch.randn(21, 9, dtype=torch.float64)
    labels = torch.tensor([4, 5, 9, 7, 8, 20, 21, 22, 23, 3, *range(40, 51)])
    first = [0, 3, 5, 6, 7, *range(10, 20)]
    batch = TrainingBatch.of(y, variance=3.0, labels=labels)
    assert first_of_pairs(batch).tolist() == first
    loss = sae.training_output(batch, state(40)).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad()
    expected = dense_loss(sae, y, first)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert set(found) == {"W_enc_T", "W_dec", "b_enc", "b_dec"}
    for name, p in sae.named_parameters():
        torch.testing.assert_close(found[name], p.grad, msg=name)
    # and they are finite differences of the loss, where no selection changes
    step = 1e-6
    for name, p in sae.named_parameters():
        values, gradient = p.data.view(-1), found[name].view(-1)
        for at in gradient.abs().topk(3).indices.tolist():
            ends = []
            for sign in (1, -1):
                values[at] += sign * step
                ends.append(float(sae.training_output(batch, state(40)).loss.detach()))
                values[at] -= sign * step
            assert float(gradient[at]) == pytest.approx((ends[0] - ends[1]) / 2 / step, rel=1e-4)


def test_without_the_term_it_is_matryoshka() -> None:
    shared: dict[str, Any] = {
        "d_sae": 20, "k": 3, "group_fractions": (0.2, 0.8), "include_empty": False,
    }  # fmt: skip
    torch.manual_seed(0)
    temporal = TemporalSAE(TemporalConfig(**shared, temporal_coefficient=0.0), 6)
    plain = MatryoshkaSAE(MatryoshkaConfig(**shared), 6)
    plain.load_state_dict(temporal.state_dict())
    batch = TrainingBatch.of(torch.randn(11, 6))
    assert not temporal.config.needs_neighbours
    found, expected = (each.training_output(batch, state(20)) for each in (temporal, plain))
    assert torch.equal(found.loss, expected.loss)
    assert set(found.terms) == set(expected.terms)


def test_what_it_cannot_be_trained_on_is_refused() -> None:
    sae = TemporalSAE(TemporalConfig(d_sae=20, k=3), 6)
    y = torch.randn(11, 6)
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "rows of no known token"),
        ({"labels": torch.arange(11), "group": torch.zeros(11, dtype=torch.int64)}, "layers"),
        ({"labels": 2 * torch.arange(11)}, "no neighbouring tokens .*given: '11 rows'"),
    ]
    for options, message in cases:
        batch = TrainingBatch.of(y, **options)
        with pytest.raises(InputError, match=message):
            sae.training_output(batch, state(20))
    # a pair alone has nothing to be told from
    alone = TrainingBatch.of(y, labels=torch.tensor([0, 1, *range(4, 22, 2)]))
    assert float(sae.training_output(alone, state(20)).terms["contrastive"]) == 0
    for name in ("temperature", "temporal_coefficient"):
        with pytest.raises(InputError, match=rf"sae\.{name}.*given: -1"):
            TemporalConfig(d_sae=20, k=3, **{name: -1.0})  # type: ignore[arg-type]


def test_high_level_codes_of_neighbours_come_to_be_alike() -> None:
    """A topic that both tokens of a pair share, and a word that each has for itself."""
    alike = []
    for coefficient in (0.0, 1.0):
        torch.manual_seed(0)
        config = TemporalConfig(
            d_sae=60, k=4, temporal_coefficient=coefficient, temperature=0.1, ema_decay=0.9
        )
        sae = TemporalSAE(config, 24)
        topics, words = torch.randn(6, 24), 1.5 * torch.randn(30, 24)
        optimiser = torch.optim.Adam(sae.parameters(), lr=3e-3)
        generator, y = torch.Generator().manual_seed(1), words
        for number in range(300):
            topic = torch.randint(6, (64,), generator=generator).repeat_interleave(2)
            word = torch.randint(30, (128,), generator=generator)
            y = topics[topic] + words[word]
            labels = torch.arange(64).repeat_interleave(2) * 5 + torch.arange(128) % 2
            batch = TrainingBatch.of(y, variance=80.0, labels=labels)
            output = sae.training_output(batch, TrainingState(number, 300, state(60).dead))
            optimiser.zero_grad()
            output.loss.backward()
            sae.before_step()
            optimiser.step()
            sae.after_step()
        with torch.no_grad():
            high = functional.normalize(sae.eval().encode(y)[:, :12], dim=1)
            cosine = (high[::2] * high[1::2]).sum(1).mean() - (high[::2] @ high[1::2].T).mean()
        alike.append(float(cosine))
    assert alike[1] > alike[0] + 0.1, alike
