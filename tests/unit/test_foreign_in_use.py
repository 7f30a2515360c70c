"""Other people's SAEs at work: their sites, their models, and what is said where these differ."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import sae as saescope_sae
from activations import Model, load_model
from activations.models.names import hub_name
from sae.commands.evaluate import EvaluateConfig, evaluate
from sae.commands.index import IndexConfig, index
from sae.commands.steer import SteerConfig, steer_text
from sae.data.model_expectations import changes_of
from sae.formats import hub
from sae.formats.load import load
from saescope.errors import InputError
from store import FeatureStore
from tests.tiny import D_MODEL, make_tiny_harvest, make_tiny_model

D_SAE = 48


def saelens(folder: Path, site: str = "blocks.1.hook_resid_post", **metadata: Any) -> Path:
    g = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    save_file(
        {
            "W_enc": torch.randn(D_MODEL, D_SAE, generator=g),
            "b_enc": torch.zeros(D_SAE),
            "W_dec": torch.randn(D_SAE, D_MODEL, generator=g),
            "b_dec": torch.zeros(D_MODEL),
        },
        folder / "sae_weights.safetensors",
    )
    described = {"sae_lens_version": "6.54.12", "hook_name": site, **metadata}
    (folder / "cfg.json").write_text(
        json.dumps(
            {"architecture": "standard", "d_in": D_MODEL, "d_sae": D_SAE, "metadata": described}
        )
    )
    return folder


def transcoder(folder: Path, **more: Any) -> Path:
    """sparsify's, under a name that is no hookpoint."""
    g = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    save_file(
        {
            "encoder.weight": torch.randn(D_SAE, D_MODEL, generator=g),
            "encoder.bias": torch.zeros(D_SAE),
            "b_dec": torch.zeros(D_MODEL),
            "W_dec": torch.randn(D_SAE, D_MODEL, generator=g),
        },
        folder / "sae.safetensors",
    )
    config = {"d_in": D_MODEL, "k": 4, "num_latents": D_SAE, **more}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def harvest(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of what a transcoder of block 1's MLP reads and writes."""
    out = tmp_path_factory.mktemp("harvest") / "h"
    return Path(
        make_tiny_harvest(
            out, llama, documents=40, sites=("blocks.1.ln2.hook_out", "blocks.1.hook_mlp_out")
        )
    )


def quiet(work: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return work()


def test_a_transcoders_sites_can_be_given_to_every_command(
    llama: Path, harvest: Path, tmp_path: Path
) -> None:
    folder = transcoder(tmp_path / "mine", transcode=True)
    sites: dict[str, Any] = {"site": "ln2:1", "target_site": "mlp_out:1"}
    with pytest.raises(InputError, match="give site and target_site"):
        evaluate(EvaluateConfig(run=str(folder), harvest=str(harvest), tokens=0))
    result = evaluate(EvaluateConfig(run=str(folder), harvest=str(harvest), tokens=64, **sites))
    assert result["protocol"]["site"] == "blocks.1.ln2.hook_out"
    assert result["protocol"]["target_site"] == "blocks.1.hook_mlp_out"
    store = index(
        IndexConfig(run=str(folder), harvest=str(harvest), out=str(tmp_path / "store"), **sites)
    )
    with FeatureStore.open(store) as found:
        assert found.meta["site"] == "blocks.1.ln2.hook_out"
        assert found.meta["target_site"] == "blocks.1.hook_mlp_out"
    steered = steer_text(
        SteerConfig(
            run=str(folder),
            model=str(llama),
            prompt="The river",
            add=("3=500",),
            max_new_tokens=4,
            **sites,
        )
    )
    assert steered["steered"] != steered["untouched"]
    out = tmp_path / "ours"
    saescope_sae.convert(saescope_sae.ConvertConfig(source=str(folder), out=str(out), **sites))
    ours = load(out)
    assert (ours.metadata["site"], ours.metadata["target_site"]) == (
        "blocks.1.ln2.hook_out",
        "blocks.1.hook_mlp_out",
    )


def test_sites_that_are_known_are_not_overruled(tmp_path: Path) -> None:
    folder = saelens(tmp_path / "plain")
    with pytest.raises(InputError, match="this SAE is no transcoder"):
        load(folder, target_site="mlp_out:1")
    from sae.architectures.transcoder import Transcoder, TranscoderConfig

    made = Transcoder(TranscoderConfig(d_sae=8, k=2), 4, 4)
    made.metadata = {"site": "blocks.0.ln2.hook_out", "target_site": "blocks.0.hook_mlp_out"}
    made.save(tmp_path / "ours")
    load(tmp_path / "ours", site="ln2:0", target_site="mlp_out:0")
    with pytest.raises(InputError, match="has sites of its own"):
        load(tmp_path / "ours", target_site="mlp_out:1")


@pytest.mark.parametrize("name", ["layers.1.mlp", "layers.1"])
def test_sparsifys_hookpoints_are_the_modules_they_name(
    name: str, llama: Path, tmp_path: Path
) -> None:
    """Against plain hooks on the modules themselves."""
    model = load_model(str(llama), dtype="float32")
    sae = load(transcoder(tmp_path / name, transcode=True))
    tokens = torch.tensor([[0, 5, 6, 7, 8, 9]])
    seen: dict[str, Tensor] = {}

    def hook(_module: Any, args: Any, kwargs: Any, out: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        result = out[0] if isinstance(out, tuple) else out
        seen.update(site=given.clone(), target_site=result.clone())

    module = model.hf.get_submodule(f"model.{name}")
    handle = module.register_forward_hook(hook, with_kwargs=True)
    model.hf(tokens)
    handle.remove()
    for key, wanted in seen.items():
        site = sae.metadata[key]
        torch.testing.assert_close(model.capture(tokens, [site])[site], wanted)


def test_steer_uses_the_model_that_the_files_name_or_the_one_given(
    llama: Path, tmp_path: Path
) -> None:
    named = saelens(tmp_path / "named", model_name=str(llama))
    options: dict[str, Any] = {"prompt": "The river", "add": ("3=8",), "max_new_tokens": 2}
    steer_text(SteerConfig(run=str(named), **options))
    wrong = saelens(tmp_path / "wrong", model_name=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="cannot be had; give --model"):
        steer_text(SteerConfig(run=str(wrong), **options))
    steer_text(SteerConfig(run=str(wrong), model=str(llama), **options))
    unnamed = saelens(tmp_path / "unnamed")
    with pytest.raises(InputError, match="does not name its model; give --model"):
        steer_text(SteerConfig(run=str(unnamed), **options))


def test_short_names_of_models() -> None:
    assert hub_name("pythia-70m-deduped") == "EleutherAI/pythia-70m-deduped"
    assert hub_name("gpt2-small") == "gpt2"
    assert hub_name("someone/gpt2-small") == "someone/gpt2-small"


CENTRED: dict[str, Any] = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}


def test_centred_weights_are_said_where_they_matter(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the mean over the width is taken off"):
        stream = load(saelens(tmp_path / "stream", **CENTRED))
    heads = quiet(lambda: load(saelens(tmp_path / "heads", "blocks.1.attn.hook_z", **CENTRED)))
    assert changes_of(heads) == []
    neox = load_model(str(make_tiny_model(tmp_path / "neox", "gpt_neox")), dtype="float32")
    with pytest.warns(UserWarning, match="the mean over the width is taken off"):
        splice(neox, stream)
    rms = load_model(str(make_tiny_model(tmp_path / "llama")), dtype="float32")
    quiet(lambda: splice(rms, stream))  # TransformerLens centres nothing there


def splice(model: Model, sae: Any) -> None:
    with saescope_sae.splice(model, sae):
        model.logits(torch.tensor([[1, 5, 6, 7]]))


@pytest.mark.parametrize(
    ("version", "kwargs", "site", "changed"),
    [
        ("3.19.2", None, "blocks.1.hook_resid_pre", 1),
        ("3.19.3", None, "blocks.1.hook_resid_pre", 0),
        ("3.19.2", {"center_writing_weights": False}, "blocks.1.hook_resid_pre", 0),
        ("6.0.0", {"center_writing_weights": False}, "blocks.1.hook_resid_pre", 0),
        ("6.0.0", {"fold_ln": True}, "blocks.1.hook_resid_pre", 0),
        ("6.0.0", {"fold_ln": True}, "blocks.1.ln2.hook_normalized", 1),
        ("6.0.0", {"fold_value_biases": True}, "blocks.1.attn.hook_z", 1),
        ("6.0.0", {"center_unembed": True}, "blocks.1.hook_resid_pre", 0),
    ],
)
def test_what_was_done_to_the_model_depends_on_the_version(
    version: str, kwargs: dict | None, site: str, changed: int, tmp_path: Path
) -> None:
    """Before 3.19.3 SAELens loaded models with TransformerLens' own defaults."""
    more = {} if kwargs is None else {"model_from_pretrained_kwargs": kwargs}
    folder = saelens(tmp_path / "sae", site, sae_lens_version=version, model_name="gpt2", **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(changes_of(load(folder))) == changed


@pytest.mark.parametrize("wanted", [True, False])
def test_a_bos_that_the_sae_does_not_expect_is_said(wanted: bool, tmp_path: Path) -> None:
    sae = load(saelens(tmp_path / "sae", prepend_bos=wanted))
    for architecture in ("llama", "gpt_neox"):  # only the first's tokenizer adds a BOS
        folder = make_tiny_model(tmp_path / architecture, architecture)
        model = load_model(str(folder), dtype="float32")
        if wanted == (architecture == "llama"):
            quiet(lambda model=model: splice(model, sae))
        else:
            with pytest.warns(UserWarning, match="sequences begin with(out)? a BOS, and the SAE"):
                splice(model, sae)


def test_a_harvest_without_the_bos_is_said(harvest: Path, tmp_path: Path) -> None:
    folder = saelens(tmp_path / "sae", "blocks.1.hook_mlp_out", prepend_bos=False)
    with pytest.warns(UserWarning, match="sequences begin with a BOS, and the SAE was trained on"):
        evaluate(EvaluateConfig(run=str(folder), harvest=str(harvest), tokens=0))


def test_what_is_measured_of_an_sae_on_the_hub_is_written_here(
    harvest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saelens(tmp_path / "cache", "blocks.1.hook_mlp_out")
    monkeypatch.setattr("sae.formats.load.fetch", lambda place: (folder, "a" * 40))
    monkeypatch.chdir(tmp_path)
    name = "hf://me/saes/layer_1@v1"
    evaluate(EvaluateConfig(run=name, harvest=str(harvest), tokens=0))
    assert (tmp_path / "me--saes--layer_1@v1.evaluation.json").is_file()
    assert not (tmp_path / "hf:").exists()
    assert hub.evaluation_of(name)
    store = index(IndexConfig(run=name, harvest=str(harvest), out="store"))
    with FeatureStore.open(store) as found:
        assert found.meta["sae_path"] == f"hf://me/saes/layer_1@{'a' * 40}"
        assert found.meta["metrics"]["l0"] > 0
