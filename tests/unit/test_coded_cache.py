"""A KV cache that holds codes: what attention reads, when it is coded, and what it takes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from activations import Model, load_model
from activations.models.coded_cache import (
    Coded,
    CodedCache,
    Unrotated,
    keys_and_values,
    losses,
    rotated,
)
from sae.analysis.cache_codecs import Grouped
from saescope.errors import InputError
from tests.tiny import make_tiny_model

GROUP, WINDOW = 8, 8
KIVI = (Grouped(2, "channel", GROUP), Grouped(2, "token", 4))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(str(make_tiny_model(tmp_path_factory.mktemp("tiny"))), dtype="float32")


@pytest.fixture(scope="module")
def tokens(model: Model) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.d_vocab, (2, 44), generator=generator)


def cache(model: Model, keys: object = KIVI[0], values: object = KIVI[1]) -> CodedCache:
    codecs = [(keys, values)] * model.n_layers
    return CodedCache(codecs, window=WINDOW, group=GROUP)  # type: ignore[arg-type]


def plain(model: Model, tokens: Tensor) -> Tensor:
    logits = model.logits(tokens)[:, :-1]
    return torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")


def test_a_group_at_a_time_is_token_by_token(model: Model, tokens: Tensor) -> None:
    one, many = cache(model), cache(model)
    by_one = losses(model, tokens, one, step=1)
    torch.testing.assert_close(by_one, losses(model, tokens, many), rtol=1e-4, atol=1e-5)
    # the last token read the groups that end at or before 43 - 8; those after it are as they were
    assert [layer.coded for layer in one.layers] == [32] * model.n_layers
    assert (one.bits, one.bits_a_number) == (many.bits, many.bits_a_number)
    # and codes make a difference from the first token that reads them, not before
    difference = (by_one - plain(model, tokens)).abs()
    assert difference[:, : WINDOW + GROUP].max() < 1e-2
    assert difference[:, WINDOW + GROUP :].mean() > 10 * difference[:, : WINDOW + GROUP].mean()


def test_attention_reads_the_codes_of_old_tokens_and_new_ones_as_they_are(
    model: Model, tokens: Tensor
) -> None:
    """A cache that is filled by hand, coded by hand, and read by one more token."""
    held = tokens[:, :24]
    ours, by_hand = cache(model), DynamicCache()
    losses(model, held, ours)
    with torch.no_grad():
        found = model.hf(input_ids=tokens[:, 24:25], past_key_values=ours).logits
        # what ours was filled with: each group's tokens read the codes that there were then
        filled = cache(model, *[lambda x, first: Coded(x, 0)] * 2)
        for first in range(0, 24, GROUP):
            own = held[:, first : first + GROUP]
            for layer, coded in zip(filled.layers, ours.layers, strict=True):
                if first:
                    layer.keys[:, :, : coded_at(first)] = coded.keys[:, :, : coded_at(first)]
                    layer.values[:, :, : coded_at(first)] = coded.values[:, :, : coded_at(first)]
            model.hf(input_ids=own, past_key_values=filled)
        for number, layer in enumerate(filled.layers):
            keys, values = layer.keys.clone(), layer.values.clone()
            keys[:, :, 8:16] = KIVI[0](keys[:, :, 8:16], 8).x_hat
            values[:, :, 8:16] = KIVI[1](values[:, :, 8:16], 8).x_hat
            keys[:, :, :8] = ours.layers[number].keys[:, :, :8]
            values[:, :, :8] = ours.layers[number].values[:, :, :8]
            by_hand.update(keys, values, number)
        wanted = model.hf(input_ids=tokens[:, 24:25], past_key_values=by_hand).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert (found - model.logits(tokens[:, :25])[:, -1:]).abs().max() > 1e-2


def coded_at(now: int) -> int:
    return max(0, now - WINDOW) // GROUP * GROUP


def test_without_anything_old_enough_nothing_is_coded(model: Model, tokens: Tensor) -> None:
    whole = CodedCache([KIVI] * model.n_layers, window=64, group=GROUP)
    found = losses(model, tokens, whole)
    torch.testing.assert_close(found, plain(model, tokens), rtol=1e-2, atol=1e-2)
    assert whole.bits_a_number == 16
    # 16 bits are what is counted, so 16 bits are what is held
    held = whole.layers[0].keys
    assert torch.equal(held, held.half().float())


def test_bits_are_those_of_codes_and_of_what_is_not_coded(model: Model, tokens: Tensor) -> None:
    seen: list[tuple[int, int]] = []

    def ones(x: Tensor, first: int) -> Coded:
        seen.append((first, x.shape[2]))
        return Coded(x, x.numel())

    held = cache(model, ones, ones)
    losses(model, tokens, held)
    assert sorted(set(seen)) == [(first, GROUP) for first in (0, 8, 16, 24)]
    assert held.bits_a_number == pytest.approx((32 * 1 + 12 * 16) / 44)


def test_keys_are_coded_as_they_were_before_their_rotation(model: Model, tokens: Tensor) -> None:
    seen: dict[int, Tensor] = {}

    def keep(x: Tensor, first: int) -> Coded:
        seen.setdefault(first, x.clone())
        return Coded(x, 0)

    kept = cache(model, Unrotated(model, keep), lambda x, first: Coded(x, 0))
    found = losses(model, tokens, kept)
    torch.testing.assert_close(found, plain(model, tokens), rtol=1e-2, atol=1e-2)
    site = "module:model.layers.0.self_attn.k_proj:output"
    before = model.capture(tokens, [site])[site]
    heads = before.unflatten(-1, (-1, seen[8].shape[-1])).transpose(1, 2)
    torch.testing.assert_close(seen[8], heads[:, :, 8:16], rtol=1e-2, atol=1e-2)
    keys = keys_and_values(model, tokens)[0][0]
    back = rotated(model.hf.base_model.rotary_emb, keys, 0, back=True)
    torch.testing.assert_close(back, heads, rtol=1e-4, atol=1e-4)


def test_wrong_steps_windows_and_models_are_refused(
    model: Model, tokens: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="cross groups"):
        losses(model, tokens, cache(model), step=3)
    with pytest.raises(InputError, match="window"):
        CodedCache([KIVI], window=-1)
    with pytest.raises(InputError, match="group"):
        CodedCache([KIVI], group=0)
    other = load_model(str(make_tiny_model(tmp_path / "gpt2", "gpt2")), dtype="float32")
    with pytest.raises(InputError, match="not rotated"):
        Unrotated(other, lambda x, first: Coded(x, 0))
