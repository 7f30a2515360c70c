"""Variants of one activation, computed together, against one plain edited run each."""

from pathlib import Path

import pytest
import torch

from activations import Model, load_model
from activations.models.variants import Variants
from tests.tiny import ARCHITECTURES, make_tiny_model

TOKENS = [1, 20, 33, 47, 52, 61, 75, 80, 91, 102, 110, 125, 131, 140, 152, 160, 171, 180, 190, 201]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = Path(tmp_path_factory.mktemp(request.param)) / "model"
    return load_model(str(make_tiny_model(folder, request.param)), dtype="float32")


@pytest.mark.parametrize(
    "site", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"]
)
def test_each_variant_is_as_a_run_by_itself(model: Model, site: str) -> None:
    variants = Variants(model, site)
    assert variants.shares
    text = variants.text(TOKENS)
    torch.manual_seed(0)
    for at in (1, 7, len(TOKENS) - 1):
        change = torch.randn(5, model.d_in(site))
        change[2] = 0
        found = variants.logits(text.after(at, change))
        for row in range(5):

            def edit(
                h: torch.Tensor,
                _: torch.Tensor,
                row: int = row,
                at: int = at,
                change: torch.Tensor = change,
            ) -> torch.Tensor:
                h = h.clone()
                h[:, at] += change[row]
                return h

            with model.edit({site: edit}):
                expected = model.logits(torch.tensor([TOKENS]))[0, at]
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)
        own = variants.logits(text.residual[at])
        torch.testing.assert_close(found[2], own, rtol=1e-4, atol=1e-4)
    own = model.capture(torch.tensor([TOKENS]), [site])[site][0]
    torch.testing.assert_close(text.activation, own)


def test_asking_leaves_the_text_as_it_was(model: Model) -> None:
    text = Variants(model, "blocks.0.hook_resid_post").text(TOKENS)
    change = torch.randn(3, model.d_model)
    first = text.after(5, change)
    text.after(9, change)
    assert torch.equal(text.after(5, change), first)


def test_a_model_that_does_not_share_is_run_plainly(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = Variants(model, "blocks.0.hook_resid_post")
    change = torch.randn(3, model.d_model)
    shared = variants.text(TOKENS).after(6, change)
    monkeypatch.setattr(
        "activations.models.variants._shared", lambda cache, _length: cache
    )  # a cache of one row, which grows
    plain = Variants(model, "blocks.0.hook_resid_post")
    assert not plain.shares
    torch.testing.assert_close(plain.text(TOKENS).after(6, change), shared, rtol=1e-4, atol=1e-4)


def test_variants_at_several_positions_run_together(model: Model) -> None:
    variants = Variants(model, "blocks.1.hook_resid_pre")
    assert variants.mixes
    text = variants.text(TOKENS)
    at = torch.tensor([3, 9, 3, 14, len(TOKENS) - 1, 1])
    change = torch.randn(len(at), model.d_model)
    found = text.after_each(at, change)
    for row, position in enumerate(at.tolist()):
        expected = text.after(position, change[row : row + 1])[0]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)
