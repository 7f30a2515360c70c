"""Finding and loading a model: folders, hub names, precision, and what is said when it fails."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from activations import ModelConfig, load_model
from activations.models.devices import resolve_dtype
from saescope.errors import InputError
from tests.tiny import make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def test_missing_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for spec, message in (
        ("nobody/no-such-model", "smollm2-135m.*HF_TOKEN"),
        ("./no/such/folder", "no such model folder"),
        (str(tmp_path), "config.json is missing"),
    ):
        with pytest.raises(InputError, match=message):
            load_model(spec)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(str(tmp_path))


def test_a_hub_name_is_found_in_the_hubs_layout(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny-llama"
    shutil.copytree(tiny, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = load_model("someone/tiny-llama", dtype="float32")
    assert (model.name, model.revision) == ("someone/tiny-llama", commit)
    assert model.weights_hash == load_model(str(tiny)).weights_hash


def test_precision_and_device() -> None:
    assert resolve_dtype("auto", torch.device("cuda")) == "bfloat16"
    assert resolve_dtype("auto", torch.device("cpu")) in ("bfloat16", "float32")
    assert resolve_dtype("float16", torch.device("cpu")) == "float16"
    with pytest.raises(InputError, match="float32"):
        ModelConfig(dtype="float64")
    with pytest.raises(InputError, match="no such device"):
        load_model("smollm2-135m", device="abacus")


def test_bfloat16_is_near_float32(tiny: Path) -> None:
    full, half = (load_model(str(tiny), dtype=dtype) for dtype in ("float32", "bfloat16"))
    site, tokens = "blocks.2.hook_resid_post", torch.arange(5, 45).reshape(2, 20)
    assert half.dtype == torch.bfloat16
    x, rounded = (model.capture(tokens, [site])[site].float() for model in (full, half))
    assert (rounded - x).norm() < 0.03 * x.norm()
    assert half.weights_hash == full.weights_hash
