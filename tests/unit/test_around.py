"""Steering models that were loaded elsewhere: of transformers, and TransformerBridge."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sae as sae_package
from activations import Model, model_around
from activations.models.around import BridgedModel, LoadedModel
from sae.core.base import SparseAutoencoder
from saescope.errors import InputError
from tests.unit.test_steering import PROMPT, tokens


def bare(hf: Any) -> Any:
    """As somebody has it who made it in memory: of no folder."""
    hf.config.name_or_path = ""
    return hf


@pytest.fixture
def hf(tiny_model: Model) -> Any:
    import copy

    return bare(copy.deepcopy(tiny_model.hf))


@pytest.fixture
def bridge(tiny_model: Model) -> Any:
    return tiny_model.bridge


def steered(model: Any, sae: SparseAutoencoder, run: Callable[[], Tensor], **edits) -> Tensor:
    with sae_package.steer(model, sae, **edits), torch.no_grad():
        return run()


EDITS = [
    {"add": {5: 8.0}},
    {"clamp": {7: 5.0}, "scale": {9: 2.0}, "project": {3: 0.0}},
    {"add": {5: 8.0}, "positions": [2]},
]


@pytest.mark.parametrize("edits", EDITS)
def test_a_model_of_transformers_is_steered_as_one_of_ours(
    tiny_model: Model, hf: Any, sae: SparseAutoencoder, edits: dict
) -> None:
    ids = tokens(tiny_model)
    expected = steered(tiny_model, sae, lambda: tiny_model.logits(ids), **edits)
    found = steered(hf, sae, lambda: hf(input_ids=ids, use_cache=False).logits, **edits)
    assert torch.equal(found, expected)
    clean = hf(input_ids=ids, use_cache=False).logits
    assert torch.equal(clean, tiny_model.logits(ids))
    assert not torch.equal(found, clean)


@pytest.mark.parametrize("edits", EDITS)
def test_a_bridge_is_steered_as_one_of_ours(
    tiny_model: Model, bridge: Any, sae: SparseAutoencoder, edits: dict
) -> None:
    """The bridge puts BOS in front of texts, so it is given tokens."""
    ids = tokens(tiny_model)
    expected = steered(tiny_model, sae, lambda: tiny_model.logits(ids), **edits)
    found = steered(bridge, sae, lambda: bridge(ids), **edits)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(bridge(ids), found, atol=1e-3)
    with sae_package.splice(tiny_model, sae):
        spliced = tiny_model.logits(ids)
    with sae_package.splice(bridge, sae), torch.no_grad():
        torch.testing.assert_close(bridge(ids), spliced, rtol=1e-4, atol=1e-5)


def test_generated_tokens_are_steered(
    tiny_model: Model, hf: Any, bridge: Any, sae: SparseAutoencoder
) -> None:
    ids = tokens(tiny_model)
    for positions in ("kept", "prompt", "generated"):
        with sae_package.steer(tiny_model, sae, add={5: 200.0}, positions=positions):
            expected = tiny_model.generate_ids(PROMPT, max_new_tokens=8, stop_at_eos=False)
        for cache in (True, False):
            options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
            with sae_package.steer(hf, sae, add={5: 200.0}, positions=positions):
                found = hf.generate(ids, min_new_tokens=8, use_cache=cache, **options)
            assert found[0].tolist() == expected
            with sae_package.steer(bridge, sae, add={5: 200.0}, positions=positions):
                found = bridge.generate(
                    ids, use_past_kv_cache=cache, stop_at_eos=False, verbose=False, **options
                )
            assert found[0].tolist() == expected, (positions, cache)


def test_what_is_said_of_a_model_that_was_loaded_elsewhere(tiny_model: Model, hf: Any) -> None:
    assert model_around(tiny_model) is tiny_model
    own = model_around(hf)
    assert isinstance(own, LoadedModel)
    assert model_around(hf) is own
    assert (own.weights_hash, own.tokenizer_hash, own.tokenizer) == ("", "", None)
    named = model_around(hf, tiny_model.tokenizer)
    assert named.special_token_ids == tiny_model.special_token_ids
    assert model_around(hf) is named
    assert isinstance(model_around(tiny_model.bridge), BridgedModel)


def test_what_is_no_model(tiny_model: Model, sae: SparseAutoencoder) -> None:
    for what in ("gpt2", nn.Linear(2, 2)):
        with (
            pytest.raises(InputError, match="model: is no language model"),
            sae_package.steer(what, sae, add={5: 1.0}),  # pyright: ignore[reportArgumentType]
        ):
            pytest.fail("must not be entered")
    with (
        pytest.raises(InputError, match=r"blocks\.9\.hook_resid_post"),
        sae_package.steer(tiny_model.bridge, sae, add={5: 1.0}, site="blocks.9.hook_resid_post"),
    ):
        pytest.fail("must not be entered")
