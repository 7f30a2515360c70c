"""SAEs attached to a model as SAELens' users know it, against splices and definitions."""

from typing import Any

import pytest
import torch

import sae as sae_package
from activations import Model
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.core.base import SparseAutoencoder
from saescope.errors import InputError
from tests.unit.test_steering import PROMPT, SITE, activation, tokens

EARLY = "blocks.0.hook_resid_post"


@pytest.fixture
def early(tiny_model: Model) -> SparseAutoencoder:
    torch.manual_seed(1)
    made = TopKSAE(TopKConfig(d_sae=48, k=4), tiny_model.d_model).eval()
    made.metadata = {"site": EARLY}
    return made


def test_the_model_goes_through_saes(
    tiny_model: Model, sae: SparseAutoencoder, early: SparseAutoencoder
) -> None:
    ids = tokens(tiny_model)
    clean = tiny_model.logits(ids)
    with sae_package.splice(tiny_model, early, sae):
        expected = tiny_model.logits(ids)
        text = tiny_model.generate(PROMPT, max_new_tokens=4)
    with sae_package.saes(tiny_model, [early, sae]):
        assert torch.equal(tiny_model.logits(ids), expected)
        assert tiny_model.generate(PROMPT, max_new_tokens=4) == text
    found = sae_package.run_with_saes(tiny_model, ids, [early, sae])
    assert torch.equal(found, expected)
    assert torch.equal(sae_package.run_with_saes(tiny_model, PROMPT, [early, sae]), expected)
    kept = sae_package.run_with_saes(tiny_model, ids, sae, use_error_term=True)
    assert torch.equal(kept, clean), "with the error term no bit changes"
    assert not torch.equal(expected, clean)
    everywhere = sae_package.run_with_saes(tiny_model, ids, sae, positions="all")
    with sae_package.splice(tiny_model, sae, positions="all"):
        assert torch.equal(tiny_model.logits(ids), everywhere)
    assert torch.equal(tiny_model.logits(ids), clean)


@pytest.mark.parametrize("use_error_term", [True, False])
def test_what_saes_had_at_their_sites(
    tiny_model: Model, sae: SparseAutoencoder, early: SparseAutoencoder, use_error_term: bool
) -> None:
    ids = tokens(tiny_model)
    with sae_package.saes(tiny_model, early, use_error_term=use_error_term):
        h = activation(tiny_model)
    logits, cache = sae_package.run_with_cache_with_saes(
        tiny_model, ids, [early, sae], use_error_term=use_error_term
    )
    options: dict[str, Any] = {"use_error_term": use_error_term}
    assert torch.equal(logits, sae_package.run_with_saes(tiny_model, ids, [early, sae], **options))
    assert len(cache) == 10
    assert cache[f"{EARLY}.hook_sae_acts_post"].shape == (1, ids.shape[1], 48)

    def of(name: str) -> torch.Tensor:
        found = cache[f"{SITE}.hook_sae_{name}"]
        assert not found[:, 0].any(), "the first token is left alone"
        return found[0, 1:]

    assert torch.equal(of("input"), h[0, 1:])
    torch.testing.assert_close(of("acts_post"), sae.encode(h[0, 1:]).detach())
    torch.testing.assert_close(of("recons"), sae(h[0, 1:]).x_hat.detach())
    torch.testing.assert_close(of("recons") + of("error"), of("input"))
    assert torch.equal(of("output"), of("input") if use_error_term else of("recons"))


def test_models_that_were_loaded_elsewhere(tiny_model: Model, sae: SparseAutoencoder) -> None:
    ids = tokens(tiny_model)
    expected = sae_package.run_with_saes(tiny_model, ids, [sae])
    assert torch.equal(sae_package.run_with_saes(tiny_model.hf, ids, [sae]), expected)
    found = sae_package.run_with_saes(tiny_model.bridge, ids, [sae])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"wants tokens \[batch, pos\]"):
        sae_package.run_with_saes(tiny_model.bridge, PROMPT, [sae])


def test_two_at_one_site_cannot_be_told_apart(tiny_model: Model, sae: SparseAutoencoder) -> None:
    ids = tokens(tiny_model)
    with sae_package.splice(tiny_model, sae, sae):
        expected = tiny_model.logits(ids)
    assert torch.equal(sae_package.run_with_saes(tiny_model, ids, [sae, sae]), expected)
    with pytest.raises(InputError, match="cache: two SAEs are at one site"):
        sae_package.run_with_cache_with_saes(tiny_model, ids, [sae, sae])
