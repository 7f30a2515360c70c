"""Sets of transcoders: one sweep file trains one a layer, and they are loaded together."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from sae.architectures.topk import TopKConfig, TopKSAE
from sae.commands.sweep import SweepConfig, sweep
from sae.formats.load import load
from sae.formats.transcoder_sets import load_transcoders, write_transcoders
from saescope.errors import ArtefactError, InputError
from tests.tiny import make_tiny_harvest, make_tiny_model

LAYERS = range(3)


def read(layer: int) -> str:
    return f"blocks.{layer}.ln2.hook_normalized"


def written(layer: int) -> str:
    return f"blocks.{layer}.hook_mlp_out"


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep that trained a JumpReLU transcoder at every layer of a small model."""
    folder = tmp_path_factory.mktemp("set")
    sites = (*map(read, LAYERS), *map(written, LAYERS))
    harvest = make_tiny_harvest(folder / "data", make_tiny_model(folder / "model"), sites=sites)
    config = SweepConfig(
        harvest=str(harvest),
        out=str(folder / "runs"),
        base={
            "passes": 1.0,
            "site": read(0).replace("0", "{layer}"),
            "target_site": written(0).replace("0", "{layer}"),
            "sae": {"d_sae": 32, "activation": "jumprelu"},
            "trainer": {"batch_size": 64, "target_l0": 4.0},
        },
        grid=({"sae.kind": "skip_transcoder", "layer": "0-2"},),
    )
    sweep(config)
    return folder / "runs"


def test_one_sweep_makes_a_set_in_the_order_of_its_layers(swept: Path) -> None:
    found = load_transcoders(str(swept))
    assert [sae.metadata["site"] for sae in found] == [read(layer) for layer in LAYERS]
    assert [sae.metadata["target_site"] for sae in found] == [written(layer) for layer in LAYERS]
    one = load(swept / "skip_transcoder-layer=2")
    x = torch.randn(5, one.d_in)
    assert torch.equal(found[2](x).x_hat, one(x).x_hat)
    assert found[2].config.activation == "jumprelu"  # type: ignore[attr-defined]


def test_paths_in_any_order(swept: Path) -> None:
    paths = sorted(swept.glob("skip_transcoder-*"), reverse=True)
    found = load_transcoders([paths[0], str(paths[2])])
    assert [sae.metadata["site"] for sae in found] == [read(0), read(2)]


def test_what_is_no_set_is_refused(swept: Path, tmp_path: Path) -> None:
    first = next(iter(sorted(swept.glob("skip_transcoder-*"))))
    with pytest.raises(InputError, match=r"two transcoders of one layer .*given: 'layer 0'"):
        load_transcoders([first, first])
    with pytest.raises(InputError, match="at least one"):
        load_transcoders([])
    with pytest.raises(ArtefactError, match="no runs and no SAEs"):
        load_transcoders(tmp_path)
    TopKSAE(TopKConfig(d_sae=8, k=2), 4).save(tmp_path / "topk")
    with pytest.raises(InputError, match=r"no transcoder of one layer .*given: 'topk'"):
        load_transcoders(tmp_path)
    other = load(first)
    other.metadata |= {"site": read(1), "target_site": written(1), "model": "another"}
    other.save(tmp_path / "other")
    with pytest.raises(InputError, match=r"different models .*given: 'another'"):
        load_transcoders([first, tmp_path / "other"])
    other.metadata["target_site"] = written(2)
    other.save(tmp_path / "apart")
    with pytest.raises(InputError, match="sites of one block"):
        load_transcoders([tmp_path / "apart"])


# ---- circuit-tracer's layout ----------------------------------------------------------------


def theirs(folder: Path, *, jump: bool, skip: bool, config: dict[str, Any] | None = None) -> Path:
    """A set as the library writes it: `SingleLayerTranscoder.to_safetensors`, config.yaml."""
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    for layer in LAYERS:
        tensors = {
            "W_enc": torch.randn(12, 5, generator=g),
            "W_dec": torch.randn(12, 5, generator=g),
            "b_enc": torch.randn(12, generator=g),
            "b_dec": torch.randn(5, generator=g),
        }
        if jump:
            tensors["activation_function.threshold"] = torch.rand(12, generator=g)
        if skip:
            tensors["W_skip"] = torch.randn(5, 5, generator=g)
        save_file(tensors, folder / f"layer_{layer}.safetensors")
    values = {
        "model_name": "meta-llama/Llama-3.2-1B",
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
        **(config or {}),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("rule", ["relu", "jumprelu", "topk"])
def test_a_set_of_circuit_tracer_is_read_by_its_own_formula(
    rule: str, skip: bool, tmp_path: Path
) -> None:
    given = {"activation": "topk", "k": 3} if rule == "topk" else {}
    folder = theirs(tmp_path / "set", jump=rule == "jumprelu", skip=skip, config=given)
    found = load_transcoders(folder)
    assert found[1].metadata == {
        "format": "circuit_tracer",
        "model": "meta-llama/Llama-3.2-1B",
        "site": "blocks.1.mlp.hook_in",
        "target_site": "blocks.1.mlp.hook_out",
    }
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    for layer, sae in enumerate(found):
        w = load_file(folder / f"layer_{layer}.safetensors")
        pre = x @ w["W_enc"].T + w["b_enc"]
        f = pre * (pre > w.get("activation_function.threshold", torch.zeros(())))
        if rule == "topk":
            f = torch.zeros_like(f).scatter(1, f.topk(3).indices, f.topk(3).values)
        y = f @ w["W_dec"] + w["b_dec"]
        y = y + x @ w["W_skip"].T if skip else y
        torch.testing.assert_close(sae.encode(x), f, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae(x).x_hat.detach(), y, rtol=1e-5, atol=1e-5)
    write_transcoders(found, tmp_path / "again")
    assert yaml.safe_load((tmp_path / "again/config.yaml").read_text()) == {
        "model_name": "meta-llama/Llama-3.2-1B",
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
        **given,
    }
    for layer in LAYERS:
        name = f"layer_{layer}.safetensors"
        one, two = load_file(folder / name), load_file(tmp_path / "again" / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_trained_set_comes_back(swept: Path, tmp_path: Path) -> None:
    ours = load_transcoders(swept)
    write_transcoders(ours, tmp_path / "set")
    again = load_transcoders(tmp_path / "set")
    x = torch.randn(40, ours[0].d_in)
    for one, two in zip(ours, again, strict=True):
        assert two.metadata["site"] == one.metadata["site"]
        torch.testing.assert_close(two.encode(x), one.encode(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(two(x).x_hat, one(x).x_hat, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="already"):
        write_transcoders(ours, tmp_path / "set")
    write_transcoders(ours, tmp_path / "set", replace=True)
    (tmp_path / "set/notes.txt").write_text("mine")
    with pytest.raises(InputError):
        write_transcoders(ours, tmp_path / "set", replace=True)
    with pytest.raises(InputError, match=r"every layer.*given: 'layer 1'; allowed: layer 0"):
        write_transcoders(ours[1:], tmp_path / "part")
    with pytest.raises(InputError, match=r"a set of transcoders.*sae\.load_transcoders reads it"):
        load(tmp_path / "set")


def test_listed_files_and_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a.safetensors", "hf://me/others/deep/b.safetensors?revision=v2"]
    hub = theirs(tmp_path / "hub", jump=True, skip=False, config={"transcoders": names})
    other = tmp_path / "others/deep"
    other.mkdir(parents=True)
    (hub / "layer_0.safetensors").rename(hub / "a.safetensors")
    (hub / "layer_1.safetensors").rename(other / "b.safetensors")
    asked = []

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, allow_patterns))
        return str(hub if repo == "me/transcoders" else tmp_path / "others")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = load_transcoders("hf://me/transcoders")
    assert asked == [
        ("me/transcoders", None, ["config.yaml", "layer_*.safetensors"]),
        ("me/others", "v2", ["deep/b.safetensors"]),
    ]
    assert [sae.metadata["site"] for sae in found] == [f"blocks.{n}.mlp.hook_in" for n in (0, 1)]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_kind": "cross_layer_transcoder"}, r"no set of transcoders.*given: 'cross_layer"),
        ({"activation": "gelu"}, "activation function that saescope has not"),
        ({"transcoders": "layer_0.safetensors"}, "no list of files"),
        ({"feature_input_hook": 3}, "feature_input_hook is not a text"),
    ],
)
def test_wrong_sets(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = theirs(tmp_path / "set", jump=True, skip=False, config=config)
    with pytest.raises((InputError, ArtefactError), match=message):
        load_transcoders(folder)


def test_damaged_sets(tmp_path: Path) -> None:
    folder = theirs(tmp_path / "set", jump=True, skip=False)
    (folder / "layer_1.safetensors").rename(tmp_path / "kept")
    with pytest.raises(ArtefactError, match=r"layers are missing.*layers \[0, 2\]"):
        load_transcoders(folder)
    (tmp_path / "kept").rename(folder / "layer_1.safetensors")
    (folder / "config.yaml").write_text("a: [")
    with pytest.raises(ArtefactError, match="damaged configuration"):
        load_transcoders(folder)
    (folder / "config.yaml").write_text("- a")
    with pytest.raises(ArtefactError, match=r"no configuration.*given: 'list'"):
        load_transcoders(folder)
    negative = theirs(tmp_path / "negative", jump=True, skip=False)
    w = load_file(negative / "layer_2.safetensors")
    w["activation_function.threshold"][3] = -0.5
    save_file(w, negative / "layer_2.safetensors")
    with pytest.raises(InputError, match="thresholds below 0 let features be negative"):
        load_transcoders(negative)
