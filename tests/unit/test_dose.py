"""Dose-responses: directions, metrics and sweet spots against hand-made and one-by-one numbers."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import sae
from activations import Model, load_model
from sae.architectures.topk import TopKSAE
from sae.steering.dose import DoseSettings, dose_response, gumbel
from sae.steering.dose_result import DoseResponse
from saescope.errors import InputError
from tests.tiny import make_tiny_model
from tests.tiny_steering import made_sae

SITE = "blocks.0.hook_resid_post"
TEXTS = [
    [1, 20, 33, 47, 52, 61, 75, 80],
    [1, 44, 91, 17, 60, 12, 99, 101],
    [1, 5, 6, 7, 5, 6, 7, 9],
]
WORDS = {"own": [10, 11, 12, 13], "other": [20]}
SETTINGS = DoseSettings(strengths=(0.0, 4.0, 40.0), nulls=2, prompt_tokens=3, new_tokens=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(str(make_tiny_model(tmp_path_factory.mktemp("m") / "model")), dtype="float32")


@pytest.fixture(scope="module")
def made() -> TopKSAE:
    return made_sae(SITE)


@pytest.fixture(scope="module")
def found(model: Model, made: TopKSAE) -> DoseResponse:
    probe = ("blocks.1.hook_resid_post", torch.ones(32))
    return sae.dose_response(
        model, made, 5, texts=TEXTS, words=WORDS, settings=SETTINGS, probe=probe
    )


def test_no_strength_changes_nothing(found: DoseResponse) -> None:
    for name in ("kl", "delta_ce", "target:own", "target:other", "probe"):
        assert np.abs(found.metric(name)[:, 0]).max() < 1e-5, name
    assert found.metric("kl")[:, 2].min() > 0
    for name, values in found.values.items():  # all directions then write the same text
        assert (
            (values[:, 0] == values[:1, 0]).all()
            or name in ("kl", "probe", "delta_ce")
            or (np.abs(values[:, 0] - values[:1, 0]).max() < 1e-5)
        )
    assert found.sources == ("feature", "random", "random", "untrained", "untrained")


def test_metrics_are_those_of_steering_one_by_one(
    model: Model, made: TopKSAE, found: DoseResponse
) -> None:
    for row, text in enumerate(TEXTS):
        tokens = torch.tensor([text])
        old = model.logits(tokens)[0].double().log_softmax(-1)[1:]
        plain = model.capture(tokens, ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"]
        with sae.steer(model, made, add={5: 4.0}):
            new = model.logits(tokens)[0].double().log_softmax(-1)[1:]
            moved = model.capture(tokens, ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"]
        kl = (old.exp() * (old - new)).sum(-1).mean()
        assert found.metric("kl")[0, 1, row] == pytest.approx(float(kl), rel=1e-3)
        following = torch.tensor(text[2:])[:, None]
        rise = (old - new)[:-1].gather(1, following).mean()
        assert found.metric("delta_ce")[0, 1, row] == pytest.approx(float(rise), rel=1e-3, abs=1e-6)
        own = torch.tensor(WORDS["own"])
        mass = new.exp()[:, own].sum(-1).log() - old.exp()[:, own].sum(-1).log()
        target = found.metric("target", "own")[0, 1, row]
        assert target == pytest.approx(float(mass.mean()), rel=1e-3, abs=1e-6)
        along = ((moved - plain)[0, 1:].sum(-1) / 32**0.5).mean()
        assert found.metric("probe")[0, 1, row] == pytest.approx(float(along), rel=1e-3)


def test_what_is_generated_is_what_steering_generates(
    model: Model, made: TopKSAE, found: DoseResponse
) -> None:
    greedy = DoseSettings(
        strengths=(4.0, 40.0), nulls=1, prompt_tokens=3, new_tokens=6, temperature=0.0
    )
    words = {"all": list(range(50)), "some": list(range(50, 320))}
    ours = dose_response(model, made, 5, texts=TEXTS, words=words, settings=greedy)
    for row, text in enumerate(TEXTS):
        for at, strength in enumerate(greedy.strengths):
            with sae.steer(model, made, add={5: strength}):
                ids = model.generate_ids(text[:3], max_new_tokens=6, stop_at_eos=False)[3:]
            rate = sum(each < 50 for each in ids) / 6
            assert ours.metric("word_rate", "all")[0, at, row] == pytest.approx(rate)
            assert ours.metric("word_rate", "some")[0, at, row] == pytest.approx(1 - rate)


def test_the_same_seed_gives_the_same(model: Model, made: TopKSAE, found: DoseResponse) -> None:
    again = dose_response(model, made, 5, texts=TEXTS, words=WORDS, settings=SETTINGS)
    for name, values in again.values.items():
        np.testing.assert_array_equal(values, found.values[name])


def by_hand(rate: list[float], kl: list[float], null: list[float]) -> DoseResponse:
    """Four texts on which every direction does the same."""

    def four(*rows: list[float]) -> np.ndarray:
        return np.repeat(np.array(rows)[:, :, None], 4, axis=2)

    values = {"word_rate:own": four(rate, null, null), "kl": four(kl, kl, kl)}
    return DoseResponse(
        feature=3, strengths=(1.0, 2.0, 4.0), sources=("feature", "random", "untrained"),
        words=("own",), values=values,
    )  # fmt: skip


def test_the_sweet_spot_is_the_largest_effect_at_little_collateral() -> None:
    spot = by_hand([0.1, 0.3, 0.9], [0.1, 0.5, 2.0], [0.0, 0.05, 0.9]).sweet_spot()
    assert (spot.strength, spot.strength_low, spot.strength_high) == (2.0, 2.0, 2.0)
    assert (spot.effect, spot.kl) == (0.3, 0.5)
    assert spot.null == pytest.approx(0.05)
    assert spot.above_null == pytest.approx(0.25)
    assert spot.succeeds
    # a null chooses its best strength, too
    level = by_hand([0.1, 0.3, 0.0], [0.1, 0.5, 0.6], [0.3, 0.0, 0.0]).sweet_spot()
    assert level.above_null == pytest.approx(0.0)
    assert not level.succeeds
    nowhere = by_hand([0.1, 0.3, 0.9], [1.0, 5.0, 2.0], [0.0, 0.0, 0.0]).sweet_spot()
    assert nowhere.strength is None
    assert not nowhere.succeeds


def test_intervals_are_over_texts() -> None:
    found = by_hand([0.0, 0.5, 0.0], [0.1, 0.1, 0.1], [0.0, 0.0, 0.0])
    found.values["word_rate:own"][0, 1] = [0, 0, 1, 1]
    spot = found.sweet_spot()
    assert spot.effect == 0.5
    assert (spot.effect_low, spot.effect_high) == (0.0, 1.0)
    assert not spot.succeeds  # one resampling in sixteen has no text with the words


def test_it_is_written_as_a_table_and_whole(found: DoseResponse, tmp_path: Path) -> None:
    found.save(tmp_path / "dose.csv")
    rows = list(csv.DictReader((tmp_path / "dose.csv").read_text().splitlines()))
    assert [(r["source"], float(r["strength"])) for r in rows[:4]] == [
        ("feature", 0.0), ("feature", 4.0), ("feature", 40.0), ("random", 0.0),
    ]  # fmt: skip
    assert float(rows[1]["kl"]) == pytest.approx(found.metric("kl")[0, 1].mean())
    assert float(rows[1]["kl_low"]) <= float(rows[1]["kl"]) <= float(rows[1]["kl_high"])
    found.save(tmp_path / "dose.json")
    whole = json.loads((tmp_path / "dose.json").read_text())
    assert np.array(whole["values"]["kl"]).shape == (5, 3, 3)
    assert whole["sweet_spots"].keys() >= {"word_rate:own", "target:other"}
    with pytest.raises(InputError, match=r"\.csv, \.json"):
        found.save(tmp_path / "dose.txt")


def test_wrong_questions_are_refused(model: Model, made: TopKSAE) -> None:
    def ask(**given: object) -> None:
        known = {"texts": TEXTS, "words": WORDS, "settings": SETTINGS, **given}
        dose_response(model, made, 5, **known)  # type: ignore[arg-type]

    with pytest.raises(InputError, match="words"):
        ask(words={"own": []})
    with pytest.raises(InputError, match="longer than its prompt"):
        ask(texts=[[1, 2, 3]])
    with pytest.raises(InputError, match="strengths"):
        DoseSettings(strengths=(1.0, 1.0))
    with pytest.raises(InputError, match="no such feature"):
        dose_response(model, made, 24, texts=TEXTS, words=WORDS)


def test_gumbel_noise_draws_by_probability() -> None:
    log_p = torch.tensor([0.5, 0.3, 0.2]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = [int((log_p + gumbel(3, generator)).argmax()) for _ in range(4000)]
    shares = np.bincount(drawn, minlength=3) / 4000
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=4 * 0.5 / 4000**0.5)
