"""The benchmark of steered texts, against `sae.steer` and numbers by hand."""

from pathlib import Path

import pytest
import torch

import sae
from activations import Model, load_model
from benchmarks import steering_texts
from benchmarks.steering_texts import PROMPTS, SteeringTextsConfig, calibrated, collateral, written
from sae.architectures.topk import TopKSAE
from sae.steering.dose import gumbel
from saescope.errors import InputError
from tests.tiny import make_tiny_model
from tests.tiny_steering import made_sae

SITE = "blocks.0.hook_resid_post"
TEXTS = [[1, 20, 33, 47, 52, 61, 75, 80], [1, 44, 91, 17, 60, 12, 99, 101]]
CONFIG = SteeringTextsConfig(store="none", prompts=2, new_tokens=4, temperature=0.9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(str(make_tiny_model(tmp_path_factory.mktemp("m") / "model")), dtype="float32")


@pytest.fixture(scope="module")
def made() -> TopKSAE:
    return made_sae(SITE)


def test_collateral_is_that_of_steering(model: Model, made: TopKSAE) -> None:
    rows = torch.stack([0 * made.W_dec[5], 4 * made.W_dec[5], 9 * made.W_dec[7]]).detach()
    found = collateral(model, SITE, rows, TEXTS)
    assert found[0] == pytest.approx(0, abs=1e-6)
    for row, (feature, amount) in ((1, (5, 4.0)), (2, (7, 9.0))):
        kls = []
        for text in TEXTS:
            tokens = torch.tensor([text])
            old = model.logits(tokens)[0, 1:].double().log_softmax(-1)
            with sae.steer(model, made, add={feature: amount}):
                new = model.logits(tokens)[0, 1:].double().log_softmax(-1)
            kls.append(float((old.exp() * (old - new)).sum(-1).mean()))
        assert float(found[row]) == pytest.approx(sum(kls) / 2, rel=1e-3)


def test_strengths_come_near_to_the_collateral_and_stay_below_the_most(
    model: Model, made: TopKSAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = made.W_dec[:6].detach()
    monkeypatch.setattr(steering_texts, "_START", 1.0)
    with torch.inference_mode():
        strength, kl = calibrated(model, SITE, vectors, TEXTS, 0.01)
        assert kl.tolist() == pytest.approx(
            collateral(model, SITE, strength[:, None] * vectors, TEXTS).tolist(), rel=1e-3
        )
    assert ((kl > 0.003) & (kl < 0.03)).all()
    monkeypatch.undo()
    # a jump from too little to too much: what is too much is never chosen
    monkeypatch.setattr(
        steering_texts, "collateral", lambda *a: torch.where(a[2].norm(dim=1) > 40, 5.0, 0.4)
    )
    strength, kl = calibrated(model, SITE, torch.eye(3), TEXTS, 0.7)
    assert kl.tolist() == pytest.approx([0.4] * 3)
    assert (strength <= 40).all()


def test_words_are_counted_in_what_the_steered_model_writes(model: Model, made: TopKSAE) -> None:
    rows = torch.stack([0 * made.W_dec[5], 30 * made.W_dec[5]]).detach()
    everything = torch.arange(model.d_vocab)[None]
    words = {"some": torch.tensor([[10, 11, 12], [50, 7, 3]]), "all": everything}
    with torch.inference_mode():
        found = written(model, SITE, rows, words, CONFIG)
    assert found["all"][0].tolist() == [[4.0], [4.0]]  # each of the four tokens is a word
    assert found["all"][1].flatten().tolist() == pytest.approx([4.0, 4.0], rel=1e-5)
    for row, amount in ((0, 0.0), (1, 30.0)):
        count, expected = torch.zeros(2), torch.zeros(2)
        for number, prompt in enumerate(PROMPTS[:2]):
            generator = torch.Generator().manual_seed(1_000_003 + number)
            ids = model.tokenize(prompt)
            for _ in range(4):  # no cache, one text at a time
                with sae.steer(model, made, add={5: amount}):
                    logits = model.logits(torch.tensor([ids]))[0, -1].float() / 0.9
                ids.append(int((logits + gumbel(len(logits), generator)).argmax()))
                for which, mine in enumerate(words["some"].tolist()):
                    count[which] += (ids[-1] in mine) / 2
                    expected[which] += float(logits.softmax(0)[mine].sum()) / 2
        assert found["some"][0][row].tolist() == count.tolist()
        assert found["some"][1][row].tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_collateral_of_a_nat_or_more_is_refused() -> None:
    with pytest.raises(InputError, match="below"):
        SteeringTextsConfig(store=str(Path("x")), kl=1.0)
