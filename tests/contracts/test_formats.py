"""What each format must do, for each architecture it holds; the registries decide who is tested."""

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from sae.architectures import architecture, list_architectures
from sae.core.base import SparseAutoencoder
from sae.core.normaliser import Normaliser, NormaliserKind
from sae.formats import format_named, formats, recognise
from sae.formats.load import load
from saescope.errors import ArtefactError, InputError

D_IN, D_OUT, D_SAE, K = 8, 6, 24, 4
FOREIGN = sorted(set(formats()) - {"saescope"})
HELD = [
    (name, kind)
    for name in formats()
    for kind in format_named(name).writes
    if kind in list_architectures()
]
OF_ONE_SITE = [name for name in formats() if {"relu", "topk"} & set(format_named(name).writes)]
ONLY_FOLDED = ("gemma_scope", "sparsify", "dictionary_learning")
"""formats without a per-vector normaliser"""


def rows(n: int = 60, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, D_IN, generator=generator) + 2


@torch.no_grad()
def make(kind: str, normaliser: NormaliserKind = "unit_mean_square", **options: Any) -> Any:
    """An SAE whose every weight, bias and threshold matters, under a normaliser fitted on rows."""
    torch.manual_seed(0)
    cls = architecture(kind)
    known = {field.name for field in dataclasses.fields(cls.Config)}
    for name, value in {"k": K, "n_candidates": D_SAE, "activation": "relu"}.items():
        if name in known and not (name == "activation" and kind == "crosscoder"):
            options.setdefault(name, value)
    transcodes = "transcoder" in kind
    sae = cls(cls.Config(d_sae=D_SAE, **options), D_IN, D_OUT if transcodes else None)
    for name, value in sae.state_dict().items():
        if name == "threshold":
            value.copy_(0.1 + 0.05 * torch.rand_like(value))
        elif name in ("b_enc", "b_dec", "b_gate", "b_mag", "r_mag", "W_skip"):
            value.copy_(0.2 * torch.randn_like(value))
        elif name in ("W_dec", "decoders.0") and transcodes:
            value.copy_(torch.randn_like(value))
    x = rows(500)
    moments = {"mean": x.double().mean(0), "mean_square": float(x.double().square().sum(1).mean())}
    sae.normaliser = Normaliser.fit(normaliser, **moments, sample=x)
    if transcodes:
        sae.output_normaliser = Normaliser.identity(D_OUT)
    sae.metadata = {"site": "blocks.3.hook_resid_post", "model": "gpt2", "context": 64}
    if kind == "cross_layer_transcoder":  # of a single layer
        read, written = "blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out"
        sae.metadata |= {"sites": [read], "target_sites": [written]}
    return sae.eval()


def same(ours: SparseAutoencoder, again: SparseAutoencoder, x: torch.Tensor) -> None:
    """The same features and reconstructions, to 1e-5."""
    with torch.no_grad():
        one, two = ours(x), again(x)
    assert one.codes.dense().any()
    torch.testing.assert_close(two.codes.dense(), one.codes.dense(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(two.x_hat, one.x_hat, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("normaliser", get_args(NormaliserKind))
@pytest.mark.parametrize(("name", "kind"), HELD)
def test_written_and_read_has_the_same_features(
    name: str, kind: str, normaliser: NormaliserKind, tmp_path: Path
) -> None:
    if normaliser == "standardised" and ("transcoder" in kind or kind == "crosscoder"):
        pytest.skip("these have no per-vector normaliser")
    options = {"activation": "topk"} if name == "sparsify" and "transcoder" in kind else {}
    sae = make(kind, normaliser, **options)
    if normaliser == "standardised" and name in ONLY_FOLDED:
        with pytest.raises(InputError, match=f"{name}: cannot hold .*allowed:"):
            format_named(name).write(sae, tmp_path / "out")
        assert not list(tmp_path.iterdir())
        return
    format_named(name).write(sae, tmp_path / "out")
    assert recognise(tmp_path / "out").name == name
    again = load(tmp_path / "out")
    assert not again.training
    same(sae, again, rows())


@pytest.mark.parametrize("name", FOREIGN)
def test_what_it_cannot_hold_is_one_clear_error(name: str, tmp_path: Path) -> None:
    cannot = sorted(set(list_architectures()) - set(format_named(name).writes))
    assert cannot
    for kind in cannot:
        cls = architecture(kind)
        sae = cls(cls.Config(d_sae=D_SAE, **({"k": K} if _has_k(cls) else {})), D_IN)
        with pytest.raises(InputError, match=rf"{name}: cannot hold this architecture .*{kind}"):
            format_named(name).write(sae, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def _has_k(cls: type[SparseAutoencoder]) -> bool:
    return "k" in {field.name for field in dataclasses.fields(cls.Config)}


@pytest.mark.parametrize("name", FOREIGN)
def test_every_folder_is_of_one_format_only(name: str, tmp_path: Path) -> None:
    kind = next(kind for kind in format_named(name).writes if kind in list_architectures())
    format_named(name).write(make(kind), tmp_path / "out")
    assert [n for n, each in formats().items() if each.recognise(tmp_path / "out")] == [name]


@pytest.mark.parametrize("name", sorted(formats()))
def test_truncated_weights_are_refused(name: str, tmp_path: Path) -> None:
    kind = next(kind for kind in format_named(name).writes if kind in list_architectures())
    format_named(name).write(make(kind), tmp_path / "out")
    weights = max((tmp_path / "out").iterdir(), key=lambda path: path.stat().st_size)
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtefactError, match="damaged weights"):
        load(tmp_path / "out")


@pytest.mark.parametrize("name", OF_ONE_SITE)
def test_a_scale_that_was_lost_can_be_given(name: str, tmp_path: Path) -> None:
    """Weights of an SAE that sees s x: with input_scale = s it reconstructs x itself."""
    kind = next(kind for kind in ("relu", "topk") if kind in format_named(name).writes)
    sae, s = make(kind, "none"), 0.25
    format_named(name).write(sae, tmp_path / "out")
    again = load(tmp_path / "out", input_scale=s)
    x = rows()
    with torch.no_grad():
        torch.testing.assert_close(again(x).x_hat, sae(s * x).x_hat / s, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("name", OF_ONE_SITE)
def test_an_sae_of_several_sites_is_written_one_at_a_time(name: str, tmp_path: Path) -> None:
    kind = next(kind for kind in ("relu", "topk") if kind in format_named(name).writes)
    sae = make(kind)
    sae.site_normalisers = {"a": make(kind).normaliser, "b": Normaliser.identity(D_IN)}
    if name == "saescope":
        format_named(name).write(sae, tmp_path / "out")
        assert set(load(tmp_path / "out").site_normalisers) == {"a", "b"}
        return
    with pytest.raises(InputError, match="one site at a time"):
        format_named(name).write(sae, tmp_path / "out")
    format_named(name).write(sae.at("b"), tmp_path / "out")
    same(sae.at("b"), load(tmp_path / "out"), rows())


def test_no_sae_says_what_each_format_has(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"no SAE here.*saelens: cfg.json \+ sae_weights"):
        load(tmp_path)


def test_unknown_format_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"given: 'npz'; allowed: .*gemma_scope.*saelens"):
        format_named("npz")


def test_metadata_goes_along(tmp_path: Path) -> None:
    format_named("saelens").write(make("relu"), tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.metadata["site"] == "blocks.3.hook_resid_post"
    assert again.metadata["model"] == "gpt2"
    assert again.metadata["context"] == 64
