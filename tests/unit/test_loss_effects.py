"""Effects of a text's features on the loss, against real ablations."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import sae
from activations import load_model
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.steering.loss_effects import LONGEST, loss_effects
from saescope.errors import InputError
from tests.tiny import make_tiny_model

SITE = "blocks.0.hook_resid_post"
TEXT = "The river rose in the night and the bridge was closed to all"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    model = load_model(
        str(make_tiny_model(tmp_path_factory.mktemp("m") / "model")), dtype="float32"
    )
    torch.manual_seed(3)
    made = TopKSAE(TopKConfig(d_sae=64, k=6), 32).eval()
    # so small that the first order is all there is
    with torch.no_grad():
        made.W_dec.mul_(1e-2)
    return model, made


def loss_at(model, made, ids: list[int], position: int, edits: dict) -> float:
    with sae.steer(model, made, **edits, site=SITE, positions=[position], allow_other_model=True):
        logits = model.logits(torch.tensor([ids]))[0, position].double()
    return float(cross_entropy(logits[None], torch.tensor([ids[position + 1]])))


def test_they_are_what_a_real_ablation_does(pair: tuple) -> None:
    model, made = pair
    found = sae.features_of_text(model, made, TEXT, site=SITE, allow_other_model=True)
    effects = loss_effects(model, made, found, site=SITE, allow_other_model=True)
    assert effects.shape == found.feature.shape
    last = found.position == len(found.token_ids) - 1
    assert np.array_equal(np.isnan(effects), last), "nothing follows the last token"
    real = []
    for position, feature in zip(found.position[~last], found.feature[~last], strict=True):
        at = int(position)
        with_it, without = (
            loss_at(model, made, found.token_ids, at, edits)
            for edits in ({}, {"ablate": [int(feature)]})
        )
        real.append(without - with_it)
    assert np.abs(real).max() > 1e-4
    assert np.corrcoef(real, effects[~last])[0, 1] > 0.999
    assert np.allclose(real, effects[~last], atol=0.03 * np.abs(real).max())


def test_long_texts_are_refused(pair: tuple) -> None:
    model, made = pair
    found = sae.features_of_text(model, made, TEXT, site=SITE, allow_other_model=True)
    found = replace(found, token_ids=[1] * (LONGEST + 1))
    with pytest.raises(InputError, match=rf"one pass .* allowed: up to {LONGEST}"):
        loss_effects(model, made, found, site=SITE, allow_other_model=True)
