"""Steering: exact arithmetic, error term, positions, KV cache, edits that change nothing."""

import numpy as np
import pytest
import torch
from torch import Tensor

import sae as sae_package
from activations import Model
from sae.architectures.crosscoder import Crosscoder, CrosscoderConfig
from sae.architectures.skip_transcoder import SkipTranscoder, SkipTranscoderConfig
from sae.core.base import SparseAutoencoder
from sae.core.normaliser import Normaliser, NormaliserKind
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
    "edits",
    [
        {"add": {np.int32(5): np.float32(8)}},
        {"clamp": {torch.tensor(5): torch.tensor(8.0)}},
        {"scale": {np.uint8(5): 8}},
        {"ablate": np.array([5])},
        {"ablate": torch.tensor([5])},
    ],
    ids=lambda edits: next(iter(edits)),
)
def test_features_and_strengths_of_any_library(
    tiny_model: Model, sae: SparseAutoencoder, edits: dict
) -> None:
    plain = {name: [5] if name == "ablate" else {5: 8.0} for name in edits}
    expected = edited(tiny_model, sae, **plain)
    assert torch.equal(edited(tiny_model, sae, **edits), expected)


def test_what_is_found_in_a_text_can_be_steered(tiny_model: Model, sae: SparseAutoencoder) -> None:
    found = sae_package.features_of_text(tiny_model, sae, PROMPT)
    best = found.feature[found.activation.argmax()]
    steered = edited(tiny_model, sae, add={best: 8.0}, positions=found.position[:1])
    changed = (steered != activation(tiny_model)).any(-1).nonzero()
    assert changed.tolist() == [[0, int(found.position[0])]]


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"add": {5.0: 1.0}}, "add: is not a whole number"),
        ({"add": {True: 1.0}}, "add: is not a whole number"),
        ({"ablate": np.array([True])}, "ablate: is not a whole number"),
        ({"ablate": 5}, "ablate: is not a list of whole numbers"),
        ({"add": {5: "8"}}, r"add\[5\]: not a finite number .*allowed: a number, or a multiple"),
        ({"add": {torch.tensor(5): 1.0, torch.tensor([5])[0]: 2.0}}, "feature 5 is in both"),
        ({"add": {5: 1.0}, "positions": [1.5]}, "positions: is not a whole number"),
        ({"add": {5: 1.0}, "positions": slice(0, 4, 0)}, "forwards from the start"),
    ],
)
def test_what_is_no_number_of_a_feature(
    tiny_model: Model, sae: SparseAutoencoder, edits: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        edited(tiny_model, sae, **edits)


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
        (np.array([0, 3]), lambda p: p in (0, 3)),
        (torch.tensor([0, 3]), lambda p: p in (0, 3)),
        (slice(np.int64(1), torch.tensor(4), np.int32(2)), lambda p: p in (1, 3)),
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


def normalised(model: Model, sae: SparseAutoencoder, kind: NormaliserKind) -> SparseAutoencoder:
    """The SAE as it is in training, not folded."""
    x = activation(model)[0].double()
    mean_square = float(x.square().sum(1).mean())
    sae.normaliser = Normaliser.fit(kind, mean=x.mean(0), mean_square=mean_square, sample=x)
    with torch.no_grad():
        sae.b_dec.normal_(std=0.1)
    return sae


@pytest.mark.parametrize("kind", ["unit_mean_square", "centred", "standardised"])
def test_edits_are_in_the_models_units_whatever_the_normaliser(
    tiny_model: Model, sae: SparseAutoencoder, kind: NormaliserKind
) -> None:
    sae = normalised(tiny_model, sae, kind)
    h = activation(tiny_model)[0]
    feature = a_live_feature(tiny_model, sae)
    f = sae.encode(h)
    clamped = f.clone()
    clamped[1:, feature] = 3.0
    expected = sae.decode(clamped, like=h) + (h - sae.decode(f, like=h))
    found = edited(tiny_model, sae, clamp={feature: 3.0})[0]
    torch.testing.assert_close(found[1:], expected.detach()[1:], rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0], h[0])
    same = edited(tiny_model, sae, scale={feature: 1.0})[0]
    assert torch.equal(same, h)


MLP_IN, MLP_OUT = "module:model.layers.1.mlp:input", "blocks.1.hook_mlp_out"


@pytest.fixture
def transcoder(tiny_model: Model) -> SparseAutoencoder:
    """A random skip transcoder of an MLP, as it is in training."""
    torch.manual_seed(0)
    made = SkipTranscoder(SkipTranscoderConfig(d_sae=64, k=8), tiny_model.d_model).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, t = (captured(tiny_model, site)[0].double() for site in (MLP_IN, MLP_OUT))
    made.normaliser, made.output_normaliser = (
        Normaliser.fit("centred", mean=r.mean(0), mean_square=float(r.square().sum(1).mean()))
        for r in (x, t)
    )
    made.metadata = {"site": MLP_IN, "target_site": MLP_OUT}
    return made


def captured(model: Model, site: str, tokens_: Tensor | None = None) -> Tensor:
    return model.capture(tokens(model) if tokens_ is None else tokens_, [site])[site]


def test_a_transcoder_reads_the_input_and_changes_the_output(
    tiny_model: Model, transcoder: SparseAutoencoder
) -> None:
    """h' = h_out + sum (f' - f) W_dec, with f of the input site; the input stays as it is."""
    x, h = captured(tiny_model, MLP_IN), captured(tiny_model, MLP_OUT)
    f = transcoder.encode(x[0])
    feature = int((f[1:] > 0).sum(0).argmax())
    other = (feature + 1) % 64
    directions = transcoder.fold().W_dec
    change = (3.0 - f[1:, feature, None]) * directions[feature] + 5.0 * directions[other]
    with sae_package.steer(tiny_model, transcoder, clamp={feature: 3.0}, add={other: 5.0}):
        logits = tiny_model.logits(tokens(tiny_model))
        found = captured(tiny_model, "blocks.1.hook_resid_post")
        assert torch.equal(captured(tiny_model, MLP_IN), x)
    expected = captured(tiny_model, "blocks.1.hook_resid_post").clone()
    expected[0, 1:] += change.detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    clean = tiny_model.logits(tokens(tiny_model))
    assert not torch.equal(logits, clean)
    with sae_package.steer(tiny_model, transcoder, scale={feature: 1.0}, add={other: 0.0}):
        assert torch.equal(tiny_model.logits(tokens(tiny_model)), clean)
    with sae_package.splice(tiny_model, transcoder):
        spliced = captured(tiny_model, "blocks.1.hook_resid_post")
    expected = captured(tiny_model, "blocks.1.hook_resid_post").clone()
    expected[0, 1:] += (transcoder(x[0, 1:]).x_hat - h[0, 1:]).detach()
    torch.testing.assert_close(spliced, expected, rtol=1e-4, atol=1e-5)


def test_a_transcoder_steers_the_same_with_and_without_cache(
    tiny_model: Model, transcoder: SparseAutoencoder
) -> None:
    options = {"max_new_tokens": 10, "stop_at_eos": False}
    plain = tiny_model.generate_ids(PROMPT, **options)
    with sae_package.steer(tiny_model, transcoder, clamp={7: 40.0}, scale={9: 3.0}):
        cached = tiny_model.generate_ids(PROMPT, **options)
        assert cached == tiny_model.generate_ids(PROMPT, **options, use_cache=False)
    assert cached != plain
    assert tiny_model.generate_ids(PROMPT, **options) == plain


def test_a_transcoder_must_read_before_it_writes(
    tiny_model: Model, transcoder: SparseAutoencoder
) -> None:
    transcoder.metadata = {"site": MLP_OUT, "target_site": MLP_IN}
    with (
        sae_package.steer(tiny_model, transcoder, add={3: 1.0}),
        pytest.raises(InputError, match="is computed before what its features are read from"),
    ):
        tiny_model.logits(tokens(tiny_model))
    transcoder.metadata = {"site": MLP_IN}
    with (
        pytest.raises(InputError, match="does not say which sites"),
        sae_package.steer(tiny_model, transcoder, add={3: 1.0}),
    ):
        pytest.fail("must not be entered")


def test_a_crosscoder_cannot_steer_but_its_features_can_be_read(tiny_model: Model) -> None:
    torch.manual_seed(0)
    sites = ["blocks.0.hook_resid_post", SITE]
    sae = Crosscoder(CrosscoderConfig(d_sae=48), 64).eval()
    sae.metadata = {"site": sites[0], "sites": sites, "site_widths": [32, 32]}
    for use in (sae_package.steer, sae_package.splice):
        with (
            pytest.raises(InputError, match="a crosscoder's features are known only after"),
            use(tiny_model, sae),
        ):
            pytest.fail("must not be entered")
    found = sae_package.features_of_text(tiny_model, sae, PROMPT)
    ids = torch.tensor([found.token_ids])
    both = torch.cat([captured(tiny_model, site, ids)[0] for site in sites], dim=-1)
    kept = torch.tensor(found.keep)
    dense = torch.zeros(len(kept), 48)
    dense[torch.from_numpy(found.position).long(), torch.from_numpy(found.feature).long()] = (
        torch.from_numpy(found.activation)
    )
    torch.testing.assert_close(dense[kept], sae.encode(both[kept]).detach())
    with pytest.raises(InputError, match="reads sites of its own"):
        sae_package.features_of_text(tiny_model, sae, PROMPT, site=SITE)


def test_an_sae_of_several_layers_is_used_at_one(tiny_model: Model, sae: SparseAutoencoder) -> None:
    sites = ["blocks.0.hook_resid_post", SITE]
    for scale, site in enumerate(sites, start=2):
        sae.site_normalisers[site] = Normaliser(
            "unit_mean_square", torch.zeros(32), torch.tensor(float(scale)), 1.0
        )
    sae.metadata = {"site": sites[0], "sites": sites, "site_widths": [32, 32]}
    with pytest.raises(InputError, match="of several layers: choose one"):
        edited(tiny_model, sae, add={5: 8.0})
    h = activation(tiny_model)
    found = edited(tiny_model, sae, add={5: 6.0}, site=SITE)
    expected = h.clone()
    expected[:, 1:] += 6.0 * sae.at(SITE).W_dec[5].detach()
    torch.testing.assert_close(found, expected)
    features = sae_package.features_of_text(tiny_model, sae, PROMPT, site=SITE)
    dense = sae.at(SITE).encode(h[0, 1:])
    assert len(features.feature) == int((dense > 0).sum())


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
