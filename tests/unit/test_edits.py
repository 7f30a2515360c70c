"""What an edit does to a model's activations, each by its definition computed densely here."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sae as sae_package
from activations import Model
from sae.core.base import SparseAutoencoder
from sae.data.provenance import weights_hash
from sae.steering.edits import Arithmetic
from saescope.errors import InputError
from store import FeatureStore
from tests.unit.test_steering import PROMPT, SITE, a_live_feature, activation, edited, tokens

AFTER = "blocks.2.hook_resid_pre"


@pytest.fixture
def features(tiny_model: Model, sae: SparseAutoencoder) -> list[int]:
    """Two features that are active on the prompt, and one that is not."""
    f = sae.encode(activation(tiny_model)[0, 1:])
    counts = (f > 0).sum(0)
    return [*counts.argsort(descending=True)[:2].tolist(), int(counts.argmin())]


def by_definition(sae: SparseAutoencoder, h: Tensor, f_edited: Tensor) -> Tensor:
    """decode(f') + (h - decode(f)) at all positions but the first."""
    out = h.clone()
    out[1:] = (sae.decode(f_edited) + h - sae.decode(sae.encode(h)))[1:]
    return out.detach()


@pytest.mark.parametrize(
    ("edit", "change"),
    [
        ({"at_least": 0.7}, lambda f: f.clamp(min=0.7)),
        ({"at_most": 0.2}, lambda f: f.clamp(max=0.2)),
        ({"at_least": 0.1, "at_most": 0.3}, lambda f: f.clamp(0.1, 0.3)),
        ({"clamp": -2.0, "only_active": True}, lambda f: torch.where(f > 0, -2.0, f)),
        ({"add": 3.0, "only_active": True}, lambda f: torch.where(f > 0, f + 3.0, f)),
        ({"at_least": 9.0, "only_active": True}, lambda f: torch.where(f > 0, f.clamp(min=9), f)),
    ],
)
def test_bounds_and_edits_where_it_is_active(
    tiny_model: Model, sae: SparseAutoencoder, features: list[int], edit: dict, change
) -> None:
    h = activation(tiny_model)[0]
    f = sae.encode(h)
    for feature in features:
        given = {k: v if k == "only_active" else {feature: v} for k, v in edit.items()}
        wanted = f.clone()
        wanted[:, feature] = change(f[:, feature])
        found = edited(tiny_model, sae, **given)[0]
        torch.testing.assert_close(found, by_definition(sae, h, wanted), rtol=1e-4, atol=1e-5)
    assert (f[1:, features[0]] > 0).any()
    assert not (f[1:, features[2]] > 0).all()


def test_an_edit_where_another_feature_is_active(
    tiny_model: Model, sae: SparseAutoencoder, features: list[int]
) -> None:
    h, (a, b, c) = activation(tiny_model)[0], features
    f = sae.encode(h).detach()
    level = float(f[1:, b].sort().values[len(f) // 2])
    expected = h.clone()
    here = f[:, b] > level
    here[0] = False
    assert 0 < here.sum() < len(f) - 1
    expected[here] += 4.0 * sae.W_dec[c].detach()
    found = edited(tiny_model, sae, add={c: 4.0}, when={b: level})[0]
    torch.testing.assert_close(found, expected)
    both = edited(tiny_model, sae, add={c: 4.0}, when={b: level, a: 1e9})[0]
    assert torch.equal(both, h)


def test_the_part_along_directions_is_scaled_or_capped(
    tiny_model: Model, sae: SparseAutoencoder, features: list[int]
) -> None:
    """Exact for directions that are not orthogonal, and nothing outside their span changes."""
    h, (a, b, c) = activation(tiny_model)[0], features
    with torch.no_grad():
        sae.W_dec[b] = 0.6 * sae.W_dec[a] + 0.8 * sae.W_dec[b]
    unit = torch.nn.functional.normalize(sae.W_dec[[a, b, c]].detach(), dim=1)
    before = h @ unit.T
    limit = float(before[1:, 2].median())
    found = edited(tiny_model, sae, project={a: 0.0, b: 1.5}, cap={c: limit})[0]
    after = found @ unit.T
    torch.testing.assert_close(after[1:, 0], torch.zeros(len(h) - 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(after[1:, 1], 1.5 * before[1:, 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after[1:, 2], before[1:, 2].clamp(max=limit), rtol=1e-4, atol=1e-5)
    moved = (found - h)[1:]
    outside = moved - moved @ torch.linalg.pinv(unit) @ unit
    assert float(outside.abs().max()) < 1e-5
    assert float(moved.abs().max()) > 0.01
    one = edited(tiny_model, sae, project={a: 0.0})[0]
    torch.testing.assert_close(one[1:], (h - (h @ unit[0])[:, None] * unit[0])[1:])
    assert torch.equal(edited(tiny_model, sae, project={a: 1.0}, cap={c: 1e6})[0], h)


def test_features_are_edited_before_directions(
    tiny_model: Model, sae: SparseAutoencoder, features: list[int]
) -> None:
    a, _, c = features
    unit = torch.nn.functional.normalize(sae.W_dec[a].detach(), dim=0)
    found = edited(tiny_model, sae, add={c: 50.0}, project={a: 0.0})[0]
    torch.testing.assert_close(found[1:] @ unit, torch.zeros(len(found) - 1), rtol=0, atol=1e-4)


def test_directions_that_depend_on_each_other(tiny_model: Model, sae: SparseAutoencoder) -> None:
    with torch.no_grad():
        sae.W_dec[4] = -2 * sae.W_dec[3]
    with pytest.raises(InputError, match="directions of these features depend on each other"):
        edited(tiny_model, sae, project={3: 0.0, 4: 0.5})


def test_a_batch_of_strengths_is_one_by_one(
    tiny_model: Model, sae: SparseAutoencoder, features: list[int]
) -> None:
    a, b, c = features
    strengths = [0.0, 2.0, -3.0, 8.0]
    batch = tokens(tiny_model).expand(4, -1)

    def run(rows: Tensor, **edits) -> Tensor:
        with sae_package.steer(tiny_model, sae, **edits):
            return tiny_model.capture(rows, [AFTER])[AFTER]

    for name in ("add", "clamp", "scale", "at_least", "project", "cap"):
        alone = [run(batch[:1], **{name: {a: s, c: 0.5}})[0] for s in strengths]
        found = run(batch, **{name: {a: np.array(strengths), c: 0.5}})
        torch.testing.assert_close(found, torch.stack(alone), rtol=1e-5, atol=1e-6)
        assert any(not torch.equal(found[0], each) for each in found[1:]), name
    with pytest.raises(InputError, match=r"another number of texts \(given: 3; allowed: 4\)"):
        run(batch[:3], add={c: strengths})
    with pytest.raises(InputError, match=r"lists of \[2, 4\]"):
        run(batch, add={c: strengths, b: [1.0, 2.0]})


def test_several_saes_at_one_site_and_at_two(
    tiny_model: Model, sae: SparseAutoencoder, features: list[int]
) -> None:
    """In the order given: the second reads what the first left."""
    h, (a, b, _) = activation(tiny_model)[0], features
    first, second = sae_package.Edit(add={a: 5.0}), sae_package.Edit(ablate=[b])
    with sae_package.steer(tiny_model, (sae, first), (sae, second)):
        found = tiny_model.capture(tokens(tiny_model), [AFTER])[AFTER][0]
    between = h.clone()
    between[1:] += 5.0 * sae.W_dec[a].detach()
    wanted = sae.encode(between)
    wanted[:, b] = 0
    expected = sae.decode(wanted) + between - sae.decode(sae.encode(between))
    torch.testing.assert_close(found[1:], expected.detach()[1:], rtol=1e-4, atol=1e-5)
    early = "blocks.0.hook_resid_post"
    with sae_package.steer(
        tiny_model,
        (sae, sae_package.Edit(add={a: 5.0}, site=early)),
        (sae, sae_package.Edit(add={b: 2.0})),
    ):
        changed = tiny_model.capture(tokens(tiny_model), ["blocks.1.hook_resid_pre", AFTER])
    own = tiny_model.capture(tokens(tiny_model), [early])[early][0]
    torch.testing.assert_close(
        changed["blocks.1.hook_resid_pre"][0, 1:], own[1:] + 5.0 * sae.W_dec[a].detach()
    )
    assert torch.equal(activation(tiny_model)[0], h)


def test_several_saes_are_spliced(tiny_model: Model, sae: SparseAutoencoder) -> None:
    h = activation(tiny_model)[0]
    with sae_package.splice(tiny_model, sae, sae):
        found = tiny_model.capture(tokens(tiny_model), [AFTER])[AFTER][0]
    torch.testing.assert_close(found[1:], sae(sae(h[1:]).x_hat).x_hat.detach())


@pytest.mark.parametrize("cache", [True, False])
def test_the_prompt_or_what_is_generated(
    tiny_model: Model, sae: SparseAutoencoder, cache: bool
) -> None:
    """The last token of the prompt decides the first that is generated."""
    prompt = tiny_model.tokenize(PROMPT)
    options = {"max_new_tokens": 10, "stop_at_eos": False, "use_cache": cache}
    plain = tiny_model.generate_ids(PROMPT, **options)
    where: dict[Any, slice] = {
        "prompt": slice(1, len(prompt)),
        "generated": slice(len(prompt), None),
    }
    found = {}
    for word, positions in where.items():
        for given in (word, positions):
            with sae_package.steer(tiny_model, sae, add={5: 200.0}, positions=given):
                found[str(given)] = tiny_model.generate_ids(PROMPT, **options)
        assert found[word] == found[str(positions)] != plain
    assert found["generated"][len(prompt)] == plain[len(prompt)]
    ids = torch.tensor([prompt, prompt])
    padded = torch.cat([torch.zeros(2, 2, dtype=torch.long), ids], 1)
    mask = (torch.arange(padded.shape[1]) >= 2).long().expand(2, -1)
    limits = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "use_cache": cache}
    for word in where:
        with sae_package.steer(tiny_model, sae, add={5: 200.0}, positions=word):
            theirs = tiny_model.hf.generate(padded, attention_mask=mask, **limits)
            assert tiny_model.hf.generate(ids[:1], **limits)[0].tolist() == found[word]
        assert theirs[0, 2:].tolist() == found[word]
        assert "generate" not in vars(tiny_model.hf)


def test_a_mask_of_tokens(tiny_model: Model, sae: SparseAutoencoder) -> None:
    h = activation(tiny_model)
    mask = torch.zeros(h.shape[1] - 1, dtype=torch.bool)
    mask[[0, 2]] = True
    for given in (mask, mask[None], mask.numpy()):
        changed = (edited(tiny_model, sae, add={5: 8.0}, positions=given) != h).any(-1)[0]
        assert changed.nonzero()[:, 0].tolist() == [0, 2]
    with pytest.raises(InputError, match=r"another number of texts \(given: 1; allowed: 2\)"):
        edited(tiny_model, sae, add={5: 8.0}, positions=mask.expand(2, -1))
    with pytest.raises(InputError, match=r"a mask is \[pos\] or \[batch, pos\]"):
        edited(tiny_model, sae, add={5: 8.0}, positions=mask[None, None])


def test_a_row_of_a_mask_for_each_text_of_a_padded_batch(
    tiny_model: Model, sae: SparseAutoencoder
) -> None:
    ids = tokens(tiny_model)[0]
    padded = torch.stack([torch.cat([ids[:2] * 0, ids]), torch.cat([ids, ids[:2] * 0])])
    real = torch.ones_like(padded)
    real[0, :2] = real[1, -2:] = 0
    mask = torch.zeros(2, len(ids), dtype=torch.bool)
    mask[0, 1] = mask[1, 3] = True
    before = tiny_model.capture(padded, [AFTER], attention_mask=real)[AFTER]
    with sae_package.steer(tiny_model, sae, add={5: 8.0}, positions=mask):
        after = tiny_model.capture(padded, [AFTER], attention_mask=real)[AFTER]
    assert (after != before).any(-1).nonzero().tolist() == [[0, 3], [1, 3]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": {5: "2x"}}, r"scale\[5\]: not a finite number .*allowed: a number\)"),
        ({"add": {5: "2x"}}, "the largest activation is known from a feature store: give store"),
        ({"add": {5: "x"}}, r"add\[5\]: not a finite number"),
        ({"add": {5: []}}, r"add\[5\]: no amounts"),
        ({"add": [5]}, "add: is not a mapping of features to amounts"),
        ({"at_least": {5: 2.0}, "at_most": {5: 1.0}}, "at_least: is above at_most"),
        ({"scale": {5: 2.0}, "at_most": {5: 1.0}}, "feature 5 is in both scale and at_most"),
        ({"project": {5: 2.0}, "cap": {5: 1.0}}, "feature 5 is in both project and cap"),
        ({"add": {5: 1.0}, "when": {64: 1.0}}, "when: no such feature"),
        ({"add": {5: 1.0}, "when": {6: "1x"}}, r"when\[6\]: not a finite number"),
    ],
)
def test_wrong_edits(
    tiny_model: Model, sae: SparseAutoencoder, arguments: dict, message: str
) -> None:
    with (
        pytest.raises(InputError, match=message),
        sae_package.steer(tiny_model, sae, **arguments),
    ):
        pytest.fail("must not be entered")


def test_whose_an_edit_is_must_be_said(tiny_model: Model, sae: SparseAutoencoder) -> None:
    edit = sae_package.Edit(add={5: 1.0})
    strange: list[list[Any]] = [[], [sae, sae], [(sae, {"add": {5: 1.0}})], [sae, (sae, edit)]]
    for what in strange:
        with (
            pytest.raises(InputError, match="one SAE and its edit as arguments, or pairs"),
            sae_package.steer(tiny_model, *what),
        ):
            pytest.fail("must not be entered")
    with (
        pytest.raises(InputError, match=r"the edit of each pair is in its sae\.Edit"),
        sae_package.steer(tiny_model, (sae, edit), add={5: 1.0}),
    ):
        pytest.fail("must not be entered")


def test_what_float16_cannot_hold(tiny_model: Model, sae: SparseAutoencoder) -> None:
    arithmetic = Arithmetic(sae, sae_package.Edit(add={5: 1e9}), None)
    h = activation(tiny_model)[0].half()
    with pytest.raises(InputError, match="too large for the model's precision"):
        arithmetic(h.float(), h, torch.zeros(len(h), dtype=torch.int64))


def test_amounts_in_units_of_the_largest_activation(
    tiny_model: Model, sae: SparseAutoencoder
) -> None:
    """Asked of the store, which must be this SAE's."""

    class Store:
        path = Path("here.duckdb")

        def __init__(self) -> None:
            self.meta = {"sae_hash": weights_hash(sae), "site": SITE}

        def feature(self, number: int):
            return type("Feature", (), {"max": 4.0 + number})

    store: FeatureStore = Store()  # pyright: ignore[reportAssignmentType]
    feature = a_live_feature(tiny_model, sae)
    found = edited(tiny_model, sae, add={feature: "1.5x"}, store=store)
    expected = edited(tiny_model, sae, add={feature: 1.5 * (4.0 + feature)})
    assert torch.equal(found, expected)
    store.meta["sae_hash"] = "another"
    with pytest.raises(InputError, match="store: is of another SAE"):
        edited(tiny_model, sae, add={feature: "2x"}, store=store)
