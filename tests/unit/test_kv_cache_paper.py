"""The KV cache paper's trials on a tiny model of the layout that its configuration is for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sae.papers.kv_cache as kv
from sae.reproduction import kv_codecs, kv_subject
from sae.reproduction.kv_subject import Scale
from saescope.config import from_dict, read_toml
from saescope.errors import InputError
from saescope.examples import examples
from tests.tiny import make_tiny_corpus, make_tiny_model

WIDTH = 2 * 8
"""channels of the tiny model's key heads"""
SMALL = {
    "dtype": "float32",
    "device": "cpu",
    "training_tokens": 200,
    "vectors": 300,
    "atoms": 32,
    "trained_k": 2,
    "passes": 1.0,
    "texts": 1,
    "context": 60,
    "copied": 20,
    "copied_from": 4,
    "copy_seen": 4,
    "window": 8,
    "group": 8,
    "held": 64,
    "caches": 2,
}


@pytest.fixture(scope="module")
def scale(tmp_path_factory: pytest.TempPathFactory) -> Scale:
    root = tmp_path_factory.mktemp("kv")
    name = "configs/papers/kv-cache.toml"
    large = from_dict(Scale, read_toml(examples()[name]), where=name)
    assert (large.atoms, large.window, large.held) == (4096, 128, 131_072)
    model, corpus = make_tiny_model(root / "model"), make_tiny_corpus(root / "texts", 400)
    return replace(large, model=str(model), source=str(corpus), **SMALL)


def test_seeds_have_texts_of_their_own_that_nothing_is_fitted_on(scale: Scale) -> None:
    seeds = [kv_subject.texts(scale, seed) for seed in range(2)]
    assert [tuple(each.shape) for each in seeds] == [(1, 60)] * 2
    assert torch.equal(seeds[0][:, 4:24], seeds[0][:, 40:]), "a stretch once more"
    assert not torch.equal(*seeds)
    fitted, held = (set(kv_subject.documents(scale, held_out=held)) for held in (False, True))
    assert not fitted & held
    assert 0 < len(held) < len(fitted) / 2


def test_a_trial_of_each_codec(scale: Scale, tmp_path: Path) -> None:
    """Sparse codes are counted by what they keep, and more atoms are nearer to the model."""
    trials = [each for each in kv._trials(scale, kv._SIZES) if each["seed"] == 0]
    rows = [{**each, **kv.measure(each, tmp_path)} for each in trials]
    by = {(row["method"], row["size"], row["keys"]): row for row in rows}
    assert len(by) == len(rows)
    for k in (3, 6):
        row = by["sparse", k, "rotated"]
        assert row["code_bits"] == pytest.approx(k * (5 + 8) / 8)
        # 48 of 64 held tokens are codes; 3 layers, of each 2 dictionaries with their means
        numbers = 3 * 2 * WIDTH
        constant = 3 * 2 * 16 * (33 * 8 + 1) / numbers
        assert row["constant_bits"] == pytest.approx(constant)
        wanted = row["code_bits"] * 0.75 + 16 * 0.25 + constant / 128
        assert kv.true_bits(row) == pytest.approx(wanted)
    assert by["kivi", 2, "rotated"]["code_bits"] == pytest.approx(2 + 32 / 8)
    assert by["calibrated", 2, "rotated"]["code_bits"] == 2
    assert by["mean", 0, "rotated"]["code_bits"] == 0


def test_claims_are_beside_nulls_of_at_least_as_many_bits() -> None:
    bits = {"calibrated": 1.0, "kivi": 3.0, "principal": 0.3, "mean": 0.0}

    def row(trial: dict[str, Any], **more: float) -> dict[str, Any]:
        own = bits.get(trial["method"], 18 / 64) * max(trial["size"], 1)
        cost = 0.1 / (own + 0.1) + 0.01 * trial["seed"]
        kept = {"code_bits": own, "constant_bits": 0.0, "text": cost, "recall": 3 * cost}
        return {**trial, **kept, **more}

    rows = [row(dict(each)) for each in kv.trials(False)]
    found = kv.findings(rows)
    assert len(found.claims) == 14
    assert {each.pairs for each in found.claims} == {3}
    margin = next(each for each in found.claims if "KIVI at 2 bits" in each.says)
    assert margin.null == pytest.approx(0.1 / 6.1 + 0.01 + 0.02)
    fewer = [{**each, "code_bits": 0.1} if each["method"] == "kivi" else each for each in rows]
    with pytest.raises(ValueError, match="kivi of 1 has fewer true bits than 3 atoms"):
        kv.findings(fewer)


def test_trials_go_on_and_use_the_dictionaries_that_are_there(
    scale: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, *_) = kv._trials(scale, {"sparse": (2,)})
    found = kv.measure(first, tmp_path)
    (path,) = (tmp_path / "dictionaries").iterdir()
    monkeypatch.setattr(kv_codecs, "train", None)
    assert kv.measure(first, tmp_path) == found
    path.unlink()
    with pytest.raises(TypeError):
        kv.measure(first, tmp_path)


def test_wrong_sizes_are_refused(scale: Scale) -> None:
    with pytest.raises(InputError, match="has too few held-out tokens"):
        kv_subject.texts(replace(scale, texts=10_000), 0)
    with pytest.raises(InputError, match="not in the new text"):
        replace(scale, copied=40)
    with pytest.raises(InputError, match="reads codes"):
        replace(scale, window=32)
