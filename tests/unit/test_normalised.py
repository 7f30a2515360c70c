"""The site between a norm and its gain, which Gemma Scope 1's transcoders read."""

from pathlib import Path

import numpy as np
import pytest
import torch

import sae as saescope_sae
from activations import Model, load_model
from sae.formats.load import load
from saescope.errors import InputError
from tests.tiny import D_MODEL, make_tiny_model

SITE = "blocks.1.ln2.hook_normalized"
TOKENS = torch.tensor([[0, 5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    found = load_model(
        str(make_tiny_model(tmp_path_factory.mktemp("m") / "gemma2", "gemma2")), dtype="float32"
    )
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():  # gains that differ
        norm = found.hf.model.layers[1].pre_feedforward_layernorm
        norm.weight.copy_(torch.randn(D_MODEL, generator=g).clamp(-0.9, 3))
    return found


def normalised(model: Model) -> torch.Tensor:
    """x / sqrt(mean x^2 + eps), from the norm's own input."""
    norm = model.hf.model.layers[1].pre_feedforward_layernorm
    seen = {}
    handle = norm.register_forward_pre_hook(lambda _, args: seen.setdefault("x", args[0]))
    model.hf(TOKENS)
    handle.remove()
    x = seen["x"]
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()


def test_it_is_the_norm_without_its_gain(model: Model) -> None:
    found = model.capture(TOKENS, [SITE])[SITE]
    torch.testing.assert_close(found, normalised(model), rtol=1e-5, atol=1e-6)
    assert model.resolve([SITE]) == [SITE]
    every = [SITE.replace("1", str(layer)) for layer in range(3)]
    assert model.resolve(["blocks.*.ln2.hook_normalized"]) == every
    assert model.resolve(["blocks.1-2.ln2.hook_normalized"]) == every[1:]


def test_an_edit_goes_through_the_gain(model: Model) -> None:
    with torch.no_grad():
        plain = model.logits(TOKENS)
        with model.edit({SITE: lambda x, at: x.clone()}):
            torch.testing.assert_close(model.logits(TOKENS), plain, rtol=1e-4, atol=1e-5)
        with model.edit({"blocks.1.ln2.hook_out": lambda x, at: 2 * x}):
            wanted = model.logits(TOKENS)
        with model.edit({SITE: lambda x, at: 2 * x}):
            torch.testing.assert_close(model.logits(TOKENS), wanted, rtol=1e-4, atol=1e-5)


def test_a_norm_that_takes_the_mean_off_has_no_such_site(tmp_path: Path) -> None:
    found = load_model(str(make_tiny_model(tmp_path / "neox", "gpt_neox")), dtype="float32")
    for site in (SITE, "blocks.*.ln2.hook_normalized"):
        with pytest.raises(InputError, match="no such site in this model"):
            found.resolve([site])


def test_a_gain_of_zero_is_said(tmp_path: Path) -> None:
    found = load_model(str(make_tiny_model(tmp_path / "llama")), dtype="float32")
    with torch.no_grad():
        found.hf.model.layers[1].post_attention_layernorm.weight[3] = 0
    with pytest.raises(InputError, match="gain is 0 somewhere"):
        found.resolve([SITE])


def test_gemma_scope_1_transcoders_read_and_write_where_they_were_trained(
    model: Model, tmp_path: Path
) -> None:
    """A dictionary that gives back what the MLP adds, if it is read where the release says."""
    folder = tmp_path / "gemma-scope-2b-pt-transcoders/layer_1/width_16k/average_l0_64"
    folder.mkdir(parents=True)
    x = normalised(model)[0, 1:].detach()
    y = model.capture(TOKENS, ["blocks.1.hook_mlp_out"])["blocks.1.hook_mlp_out"][0, 1:]
    rows = torch.linalg.pinv(x) @ torch.eye(len(x))  # feature i is 1 at position i alone
    arrays = {
        "W_enc": rows,
        "W_dec": y,
        "b_enc": torch.zeros(len(x)),
        "b_dec": torch.zeros(D_MODEL),
        "threshold": torch.full((len(x),), 0.5),
    }
    np.savez(folder / "params.npz", **{n: v.detach().numpy() for n, v in arrays.items()})
    transcoder = load(folder)
    with torch.no_grad():
        plain = model.logits(TOKENS)
        with saescope_sae.splice(model, transcoder):
            torch.testing.assert_close(model.logits(TOKENS), plain, rtol=1e-3, atol=1e-4)
        with saescope_sae.steer(model, transcoder, ablate=[2]):
            assert not torch.allclose(model.logits(TOKENS), plain, atol=1e-3)
