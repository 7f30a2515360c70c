"""Steering: exact arithmetic, error term, positions, KV cache, edits that change nothing."""

import pytest
import torch
from torch import Tensor

import sae as sae_package
from activations import Model
from sae.base import SparseAutoencoder
from sae.steering import FeatureEdits
from saescope.errors import InputError

SITE = "blocks.1.hook_resid_post"
PROMPT = "The river runs"


def tokens(model: Model) -> Tensor:
    return torch.tensor([model.tokenize(PROMPT)])


def activation(model: Model) -> Tensor:
    return model.capture(tokens(model), [SITE])[SITE]


def edited(model: Model, sae: SparseAutoencoder, **edits) -> Tensor:
    """What the next block receives while steering."""
    after = "blocks.2.hook_resid_pre"
    with sae_package.steer(model, sae, **edits):
        return model.capture(tokens(model), [after])[after]


def a_live_feature(model: Model, sae: SparseAutoencoder) -> int:
    dense = sae.encode(activation(model)[0, 1:])
    return int((dense > 0).sum(0).argmax())


def test_add_adds_the_decoder_row(tiny_model: Model, sae: SparseAutoencoder) -> None:
    h = activation(tiny_model)
    expected = h.clone()
    expected[:, 1:] += 8.0 * sae.W_dec[5].detach()
    torch.testing.assert_close(edited(tiny_model, sae, add={5: 8.0}), expected)


@pytest.mark.parametrize(
    ("edits", "change"),
    [
        ("clamp", lambda f: torch.full_like(f, 3.0)),
        ("ablate", torch.zeros_like),
        ("scale", lambda f: 2.5 * f),
    ],
)
def test_edits_keep_the_error_term(
    tiny_model: Model, sae: SparseAutoencoder, edits: str, change
) -> None:
    """decode(f') + (h - decode(f)), computed here by the definition, densely."""
    h = activation(tiny_model)[0]
    feature = a_live_feature(tiny_model, sae)
    f = sae.encode(h)
    f_edited = f.clone()
    f_edited[1:, feature] = change(f[1:, feature])
    expected = sae.decode(f_edited) + (h - sae.decode(f))
    expected[0] = h[0]
    given = {"clamp": {feature: 3.0}, "ablate": [feature], "scale": {feature: 2.5}}[edits]
    found = edited(tiny_model, sae, **{edits: given})[0]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)
    assert not torch.equal(found, h)


@pytest.mark.parametrize("edits", [{}, {"add": {}}, {"ablate": []}, {"scale": {}, "clamp": {}}])
def test_an_empty_edit_changes_no_bit(
    tiny_model: Model, sae: SparseAutoencoder, edits: dict
) -> None:
    clean = tiny_model.logits(tokens(tiny_model))
    with sae_package.steer(tiny_model, sae, **edits):
        assert torch.equal(tiny_model.logits(tokens(tiny_model)), clean)


def test_edits_that_come_to_nothing_change_no_bit(
    tiny_model: Model, sae: SparseAutoencoder
) -> None:
    h = activation(tiny_model)
    assert torch.equal(edited(tiny_model, sae, scale={a_live_feature(tiny_model, sae): 1.0}), h)
    assert torch.equal(edited(tiny_model, sae, add={3: 0.0}), h)


@pytest.mark.parametrize(
    ("positions", "chosen"),
    [
        ("all", lambda p: True),
        ("kept", lambda p: p > 0),
        (slice(2, None), lambda p: p >= 2),
        (slice(1, 4, 2), lambda p: p in (1, 3)),
        ([0, 3], lambda p: p in (0, 3)),
    ],
)
def test_positions(tiny_model: Model, sae: SparseAutoencoder, positions, chosen) -> None:
    h = activation(tiny_model)[0]
    found = edited(tiny_model, sae, add={5: 8.0}, positions=positions)[0]
    changed = (found != h).any(-1).tolist()
    assert changed == [bool(chosen(p)) for p in range(len(h))]


@pytest.mark.parametrize(
    "edits",
    [
        {"add": {5: 3.0}},
        {"clamp": {7: 5.0}, "scale": {9: 2.0}},
        {"add": {5: 3.0}, "positions": slice(6, None)},
        {"add": {5: 6.0}, "positions": [2, 9]},
    ],
)
def test_same_tokens_with_and_without_cache(
    tiny_model: Model, sae: SparseAutoencoder, edits: dict
) -> None:
    """Generated tokens are steered too: a hook that looks only at the prompt gives other tokens."""
    plain = tiny_model.generate_ids(PROMPT, max_new_tokens=12, stop_at_eos=False)
    with sae_package.steer(tiny_model, sae, **edits):
        cached = tiny_model.generate_ids(PROMPT, max_new_tokens=12, stop_at_eos=False)
        whole = tiny_model.generate_ids(
            PROMPT, max_new_tokens=12, stop_at_eos=False, use_cache=False
        )
    assert cached == whole
    after = tiny_model.generate_ids(PROMPT, max_new_tokens=12, stop_at_eos=False)
    assert after == plain


def test_strong_steering_changes_the_tokens(tiny_model: Model, sae: SparseAutoencoder) -> None:
    plain = tiny_model.generate_ids(PROMPT, max_new_tokens=12, stop_at_eos=False)
    with sae_package.steer(tiny_model, sae, add={5: 200.0}):
        steered = tiny_model.generate_ids(PROMPT, max_new_tokens=12, stop_at_eos=False)
    assert steered != plain


def test_the_model_is_as_before_after_an_error(tiny_model: Model, sae: SparseAutoencoder) -> None:
    clean = tiny_model.logits(tokens(tiny_model))
    with pytest.raises(KeyError), sae_package.steer(tiny_model, sae, add={5: 50.0}):
        raise KeyError
    assert torch.equal(tiny_model.logits(tokens(tiny_model)), clean)


def test_splice_puts_the_reconstruction(tiny_model: Model, sae: SparseAutoencoder) -> None:
    h = activation(tiny_model)[0]
    after = "blocks.2.hook_resid_pre"
    with sae_package.splice(tiny_model, sae):
        found = tiny_model.capture(tokens(tiny_model), [after])[after][0]
    assert torch.equal(found[0], h[0])
    torch.testing.assert_close(found[1:], sae(h[1:]).x_hat.detach())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"add": {64: 1.0}}, r"add: no such feature \(given: 64; allowed: 0 to 63\)"),
        ({"ablate": [-1]}, "ablate: no such feature"),
        ({"clamp": {3: float("nan")}}, r"clamp\[3\]: not a finite number"),
        ({"add": {3: 1.0}, "ablate": [3]}, "feature 3 is in both add and ablate"),
        ({"add": {3: 1.0}, "positions": "some"}, "positions: no such choice"),
        ({"add": {3: 1.0}, "positions": [-1]}, "whole numbers from 0"),
        ({"add": {3: 1.0}, "positions": slice(-2, None)}, "forwards from the start"),
        ({"add": {3: 1.0}, "site": "blocks.9.hook_resid_post"}, "blocks.9.hook_resid_post"),
    ],
)
def test_wrong_input(
    tiny_model: Model, sae: SparseAutoencoder, arguments: dict, message: str
) -> None:
    with (
        pytest.raises(InputError, match=message),
        sae_package.steer(tiny_model, sae, **arguments),
    ):
        pytest.fail("must not be entered")


def test_an_sae_without_a_site_asks_for_one(tiny_model: Model, sae: SparseAutoencoder) -> None:
    sae.metadata = {}
    with pytest.raises(InputError, match="give site"), sae_package.steer(tiny_model, sae):
        pytest.fail("must not be entered")


def test_edits_are_collected() -> None:
    edits = FeatureEdits.make(10, {1: 2.0}, {2: 3.0}, [4], {5: 0.5})
    assert (edits.add, edits.clamp, edits.scale) == ({1: 2.0}, {2: 3.0, 4: 0.0}, {5: 0.5})
    assert not FeatureEdits.make(10, None, None, None, None)
