"""Code that comes with a model is not run, and nobody is asked, unless it is trusted explicitly."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from activations import (
    ActivationStore,
    CorpusConfig,
    HarvestConfig,
    ModelConfig,
    harvest,
    load_model,
)
from activations.harvesting.command import HarvestCommand, run
from activations.recompute.window import config_of
from saescope.artefact import MANIFEST
from saescope.errors import InputError
from tests.tiny import make_tiny_corpus, make_tiny_model

RAN = "from pathlib import Path\nPath({marker!r}).touch()\n"


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """A model of a kind that transformers does not know, which brings its classes."""
    folder = make_tiny_model(tmp_path / "strange")
    code = RAN.format(marker=str(tmp_path / "marker")) + (
        "import transformers\n"
        "class StrangeConfig(transformers.LlamaConfig):\n    model_type = 'strange'\n"
        "class LlamaForCausalLM(transformers.LlamaForCausalLM):\n    config_class = StrangeConfig\n"
    )
    (folder / "strange.py").write_text(code)
    names = {"AutoConfig": "StrangeConfig", "AutoModelForCausalLM": "LlamaForCausalLM"}
    auto_map = {auto: f"strange.{name}" for auto, name in names.items()}
    change(folder / "config.json", model_type="strange", auto_map=auto_map)
    return folder


def harvest_config(model: Path, out: Path, **fields: Any) -> dict[str, Any]:
    return {
        "model": ModelConfig(spec=str(model), dtype="float32"),
        "corpus": CorpusConfig(source=str(make_tiny_corpus(out.parent / "text"))),
        "sites": ("blocks.1.hook_resid_post",), "out": str(out), "context": 16,
        "chunk_rows": 128, "held_out_fraction": 0.2, **fields,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["language", "text_encoder", "vision"])
def test_a_models_own_code_is_not_run(strange: Path, tmp_path: Path, kind: str) -> None:
    with pytest.raises(InputError, match=r"code of its own.*--trust-remote-code") as caught:
        load_model(str(strange), dtype="float32", kind=kind)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "marker").exists()


def test_it_is_run_where_it_is_trusted(strange: Path, tmp_path: Path) -> None:
    model = load_model(str(strange), dtype="float32", trust_remote_code=True)
    assert (tmp_path / "marker").exists()
    assert model.code_hash is not None
    plain = load_model(str(make_tiny_model(tmp_path / "plain")), dtype="float32")
    tokens = torch.tensor([[0, 9, 10]])
    assert torch.equal(model.logits(tokens), plain.logits(tokens))
    assert plain.code_hash is None


def test_a_tokenizers_own_code_is_not_run(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    (folder / "words.py").write_text(RAN.format(marker=str(tmp_path / "marker")))
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="Words",
        auto_map={"AutoTokenizer": [None, "words.Words"]},
    )
    with pytest.raises(InputError, match=r"code of its own.*--trust-remote-code"):
        load_model(str(folder), dtype="float32")
    assert not (tmp_path / "marker").exists()


def test_code_that_is_not_needed_does_no_harm(tmp_path: Path) -> None:
    """Many folders bring code for a model that transformers has by now."""
    folder = make_tiny_model(tmp_path / "model")
    (folder / "code.py").write_text(RAN.format(marker=str(tmp_path / "marker")))
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "code.LlamaForCausalLM"})
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        RAN.format(marker=str(tmp_path / "marker"))
    )
    model = load_model(str(folder), dtype="float32")
    model.hf.generate(torch.tensor([[0, 9]]), max_new_tokens=1)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("value", ["someone/kernel", {"": "sdpa", "vision": "someone/kernel:f"}])
def test_kernels_of_the_hub_are_code(tmp_path: Path, value: Any) -> None:
    folder = make_tiny_model(tmp_path / "model")
    change(folder / "config.json", attn_implementation=value)
    with pytest.raises(InputError, match="names code of the hub, 'someone/kernel"):
        load_model(str(folder), dtype="float32")


def test_pickled_weights_run_nothing(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    model = load_model(str(folder), dtype="float32")
    (folder / "model.safetensors").unlink()
    torch.save(model.hf.state_dict(), folder / "pytorch_model.bin")
    again = load_model(str(folder), dtype="float32")
    tokens = torch.tensor([[0, 9, 10]])
    assert torch.equal(again.logits(tokens), model.logits(tokens))

    class Bomb:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "marker",)

    for protocol in (2, 5):
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Bomb()}, protocol))
        with pytest.raises(InputError, match="cannot be loaded as a causal language model"):
            load_model(str(folder), dtype="float32")
        assert not (tmp_path / "marker").exists()


def test_a_pipelines_parts_bring_no_code(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    (folder / "text_encoder").mkdir(parents=True)
    (folder / "model_index.json").write_text(
        json.dumps(
            {"_class_name": "StableDiffusionPipeline",
             "text_encoder": ["transformers", "AutoModel"]}
        )
    )  # fmt: skip
    (folder / "text_encoder" / "config.json").write_text(
        json.dumps({"model_type": "strange", "auto_map": {"AutoConfig": "strange.Config"}})
    )
    with pytest.raises(InputError, match=r"its text_encoder brings code.*--trust-remote-code"):
        load_model(str(folder), dtype="float32", kind="diffusion")


@pytest.mark.parametrize("of", ["pipeline", "part"])
def test_a_pipeline_brings_no_code_of_its_own(tmp_path: Path, of: str) -> None:
    folder = tmp_path / "pipeline"
    (folder / "unet").mkdir(parents=True)
    own = {"pipeline": {"_class_name": ["own", "Pipeline"]}, "part": {"unet": ["own", "UNet"]}}[of]
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.36.0", **own}
    (folder / "model_index.json").write_text(json.dumps(index))
    for place in (folder, folder / "unet"):
        (place / "own.py").write_text(RAN.format(marker=str(tmp_path / "marker")))
    with pytest.raises(InputError, match=r"--trust-remote-code"):
        load_model(str(folder), dtype="float32", kind="diffusion")
    assert not (tmp_path / "marker").exists()


def test_trust_is_given_to_a_command_and_never_stored(strange: Path, tmp_path: Path) -> None:
    settings = harvest_config(strange, tmp_path / "out")
    with pytest.raises(InputError, match="code of its own"):
        run(HarvestCommand(**settings))
    assert not (tmp_path / "out").exists()
    store = run(HarvestCommand(**settings, trust_remote_code=True))
    assert isinstance(store, ActivationStore)
    assert "trust_remote_code" not in (tmp_path / "out" / MANIFEST).read_text()
    # the field does the same, and the harvest that is there is the same one
    trusted = ModelConfig(spec=str(strange), dtype="float32", trust_remote_code=True)
    assert harvest(HarvestConfig(**{**settings, "model": trusted})).complete
    forged = store.manifest["config"] | {
        "model": {**store.manifest["config"]["model"], "trust_remote_code": True}
    }
    store.manifest["config"] = forged
    assert not config_of(store).model.trust_remote_code
