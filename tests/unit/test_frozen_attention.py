"""Attention whose patterns are frozen, against patterns and values taken apart by hand."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import sae as sae_package
from activations import Model, load_model
from activations.models.attention import run_with_patterns
from activations.models.frozen_attention import frozen_attention
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.core.base import SparseAutoencoder
from saescope.errors import InputError
from tests.tiny import ARCHITECTURES, D_MODEL, make_tiny_model

SITE, NORM, Z = "blocks.0.hook_resid_post", "blocks.1.ln1.hook_out", "blocks.1.attn.hook_z"
V, OUT = "blocks.1.attn.hook_v", "blocks.1.hook_attn_out"
PROMPT = "A sparse code uses few of many features"


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = make_tiny_model(tmp_path_factory.mktemp("frozen"), request.param)
    return load_model(str(folder), dtype="float32")


@pytest.fixture(scope="module")
def sae() -> SparseAutoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = TopKSAE(TopKConfig(d_sae=64, k=8), D_MODEL).eval()
    made.metadata = {"site": SITE}
    return made


def frozen(model: Any, sae: SparseAutoencoder, **edits: Any) -> AbstractContextManager[None]:
    return sae_package.steer(model, sae, freeze_attention=True, **edits)


def hooks(hf: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules()]


def prompt(model: Model) -> Tensor:
    return torch.tensor([model.tokenize(PROMPT)])


def heads(x: Tensor, count: int) -> Tensor:
    """[pos, heads * d_head] as [head, pos, d_head]."""
    return x.unflatten(-1, (count, -1)).transpose(0, 1)


def mixed(model: Model, pattern: Tensor, values: Tensor) -> Tensor:
    """What heads with these patterns [head, to, from] make of values: z [pos, heads * d_head]."""
    config = model.hf.config
    of_heads = heads(values, getattr(config, "num_key_value_heads", None) or len(pattern))
    of_heads = of_heads.repeat_interleave(len(pattern) // len(of_heads), 0)
    return (pattern @ of_heads).transpose(0, 1).flatten(1)


def test_heads_read_new_values_where_they_read_old_ones(
    model: Model, sae: SparseAutoencoder
) -> None:
    ids = prompt(model)
    patterns = run_with_patterns(model, ids[0].tolist(), [SITE]).pattern[1]
    for freeze in (True, False):
        with sae_package.steer(model, sae, add={5: 20.0}, freeze_attention=freeze):
            found = {k: x[0].double() for k, x in model.capture(ids, [V, Z]).items()}
        of_old = mixed(model, patterns, found[V])
        close = torch.allclose(found[Z], of_old, rtol=1e-4, atol=1e-5)
        assert close == freeze


def test_a_model_that_has_not_run_yet(model: Model, sae: SparseAutoencoder) -> None:
    """Which sites it has is found out by a pass, which must be made once."""
    import copy

    ids = prompt(model)
    with frozen(model, sae, add={5: 20.0}):
        expected = model.logits(ids)
    hf = copy.deepcopy(model.hf)
    with frozen(hf, sae, add={5: 20.0}), torch.no_grad():
        assert torch.equal(hf(input_ids=ids, use_cache=False).logits, expected)


def test_with_norms_held_too_the_effect_is_linear(model: Model, sae: SparseAutoencoder) -> None:
    """An edit of what the norm gave: the effect on the heads' outputs adds up, and doubles."""
    ids = prompt(model)

    def effect(freeze: bool = True, **edits: Any) -> Tensor:
        with sae_package.steer(model, sae, site=NORM, freeze_attention=freeze, **edits):
            return model.capture(ids, [Z])[Z][0] - plain

    plain = model.capture(ids, [Z])[Z][0]
    at: dict[str, Any] = {"positions": [2, 3]}
    one, other = effect(add={5: 2.0}, **at), effect(add={7: -3.0}, **at)
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(effect(add={5: 2.0, 7: -3.0}, **at), one + other, **close)
    torch.testing.assert_close(effect(add={5: 200.0}, **at), 100 * one, rtol=1e-3, atol=1e-4)
    free = effect(freeze=False, add={5: 200.0}, **at)
    assert not torch.allclose(free, 100 * effect(freeze=False, add={5: 2.0}, **at), rtol=0.1)
    values = model.capture(ids, [V])[V][0]
    with frozen(model, sae, site=NORM, add={5: 2.0}, **at):
        moved = model.capture(ids, [V])[V][0] - values
    pattern = run_with_patterns(model, ids[0].tolist(), [SITE]).pattern[1].float()
    torch.testing.assert_close(one, mixed(model, pattern, moved), **close)
    assert float(one.abs().max()) > 1e-3


def test_a_pass_without_an_effect_keeps_every_bit(model: Model, sae: SparseAutoencoder) -> None:
    ids = prompt(model)
    logits, own, before = model.logits(ids), model.hf.config._attn_implementation, hooks(model.hf)
    text = model.generate_ids(PROMPT, max_new_tokens=5)
    nothing: list[dict[str, Any]] = [{}, {"add": {5: 0.0}}, {"scale": {5: 1.0}}]
    for edits in nothing:
        with frozen(model, sae, **edits):
            assert torch.equal(model.logits(ids), logits)
            assert model.generate_ids(PROMPT, max_new_tokens=5) == text
        assert model.hf.config._attn_implementation == own
    with frozen_attention(model), frozen_attention(model):
        assert torch.equal(model.logits(ids), logits)
    assert hooks(model.hf) == before


def test_generation_with_the_cache_and_without_it(model: Model, sae: SparseAutoencoder) -> None:
    options: dict[str, Any] = {"max_new_tokens": 10, "stop_at_eos": False}
    with frozen(model, sae, add={5: 20.0}):
        cached = model.generate_ids(PROMPT, **options)
        assert model.generate_ids(PROMPT, **options, use_cache=False) == cached
        again = torch.tensor([cached])
        logits = model.logits(again)  # in one pass over the same tokens
    start = len(prompt(model)[0])
    assert logits[0, start - 1 : -1].argmax(-1).tolist() == cached[start:]
    plain = model.generate_ids(PROMPT, **options)
    assert cached != plain


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generate_of_transformers(
    model: Model, sae: SparseAutoencoder, options: dict[str, Any]
) -> None:
    """Also where beams change places in the cache, and in a batch that is padded on the left."""
    long, eos = model.tokenize(PROMPT), model.eos_token_id
    short = long[:5]
    pad = [eos] * (len(long) - len(short))
    ids = torch.tensor([long, pad + short])
    mask = torch.ones_like(ids)
    mask[1, : len(pad)] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": eos, "eos_token_id": None}

    def run(tokens: Tensor, attention_mask: Tensor, **more: Any) -> Tensor:
        given = {"input_ids": tokens, "attention_mask": attention_mask, **settings, **more}
        return model.hf.generate(**given)[:, tokens.shape[1] :]

    plain = run(ids, mask, **options)
    with frozen(model, sae, add={5: 20.0}):
        found = run(ids, mask, **options)
        without = {**options, "use_cache": False}
        without.pop("cache_implementation", None)
        assert torch.equal(run(ids, mask, **without), found)
        alone = torch.tensor([short])
        assert torch.equal(run(alone, torch.ones_like(alone), **options)[0], found[1])
    assert not torch.equal(found, plain)


def test_a_text_that_was_begun_before(model: Model, sae: SparseAutoencoder) -> None:
    ids = prompt(model)
    cache = model.hf(input_ids=ids, use_cache=True).past_key_values
    with (
        frozen(model, sae, add={5: 20.0}),
        pytest.raises(InputError, match="begin the text within the block"),
    ):
        model.hf(input_ids=ids[:, :1], past_key_values=cache)
    with frozen(model, sae, add={5: 20.0}):
        cache = model.hf(input_ids=ids, use_cache=True).past_key_values
        model.hf(input_ids=ids[:, :1], past_key_values=cache)
        assert "crop" in vars(cache)
    assert "crop" not in vars(cache)


def test_the_model_is_as_before_after_an_error(model: Model, sae: SparseAutoencoder) -> None:
    ids = prompt(model)
    logits = model.logits(ids)
    with frozen(model, sae, add={5: 20.0}):
        expected = model.logits(ids[:, :5])
        with pytest.raises(RuntimeError):
            model.hf(input_ids=ids.float())
        model.capture(ids, [SITE])  # ends in the middle of the pass
        assert torch.equal(model.logits(ids[:, :5]), expected)
    assert torch.equal(model.logits(ids), logits)


def falcon() -> nn.Module:
    return transformers.FalconForCausalLM(
        transformers.FalconConfig(
            vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
        )
    ).eval()


def mamba() -> nn.Module:
    config = transformers.MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2)
    return transformers.MambaForCausalLM(config).eval()


@pytest.mark.parametrize("make", [falcon, mamba])
def test_attention_that_cannot_be_frozen(
    make: Callable[[], nn.Module], sae: SparseAutoencoder
) -> None:
    hf: Any = make()
    own, before = hf.config._attn_implementation, hooks(hf)
    with (
        pytest.raises(InputError, match="freeze_attention: the attention of this model cannot be"),
        frozen(hf, sae, add={5: 20.0}),
    ):
        pytest.fail("must not be entered")
    assert hf.config._attn_implementation == own
    assert hooks(hf) == before


def test_a_bridge_cannot_be_frozen(tiny_model: Model, sae: SparseAutoencoder) -> None:
    with (
        pytest.raises(InputError, match=r"freeze_attention.*allowed: a language model"),
        frozen(tiny_model.bridge, sae, add={5: 20.0}),
    ):
        pytest.fail("must not be entered")
