"""Batches that fit into a budget of memory, and models spread over devices."""

from pathlib import Path
from typing import Any

import pytest
import torch

from activations import CorpusConfig, HarvestConfig, Model, ModelConfig, harvest, load_model
from activations.harvesting import plan
from activations.models.forward_memory import _Allocated, fitting_batch, pass_bytes
from saescope.errors import InputError
from tests.tiny import make_tiny_corpus

SITE = "blocks.1.hook_resid_post"
GIB = 2**30


def test_the_bytes_of_a_computation_by_hand() -> None:
    weight = torch.ones(100, 100)
    with _Allocated([weight]) as allocated:
        x = torch.ones(1000)  # 4000 bytes
        y = x + 1  # 8000
        view = y.view(10, 100)
        del x, y  # 4000: the view keeps y's
        z = view @ weight.t()  # 8000
        z.add_(1)
        del view  # 4000
    assert (allocated.peak, allocated.now) == (8000, 4000)


def test_the_batch_fills_the_budget(tiny_model: Model) -> None:
    one, two, nine, ten = (pass_bytes(tiny_model, [SITE], n, 16) for n in (1, 2, 9, 10))
    assert ten - nine == two - one > 0
    assert fitting_batch(nine / GIB, tiny_model, [SITE], 16, 1000) == 9
    assert fitting_batch((ten - 1) / GIB, tiny_model, [SITE], 16, 1000) == 9
    assert fitting_batch(1.0, tiny_model, [SITE], 16, 500) == 500
    with pytest.raises(InputError, match=r"batch_memory: not one sequence fits.*at least"):
        fitting_batch((one - 1) / GIB, tiny_model, [SITE], 16, 1000)


def test_a_harvest_keeps_to_the_batch_it_found(
    tiny_folder: Path, tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = pass_bytes(tiny_model, [SITE], 5, 16) / GIB
    config = HarvestConfig(
        model=ModelConfig(spec=str(tiny_folder), dtype="float32"),
        corpus=CorpusConfig(source=str(make_tiny_corpus(tmp_path / "text", 20))),
        sites=(SITE,), out=str(tmp_path / "out"), context=16, chunk_rows=64, window_chunks=4,
        batch_memory=budget,
    )  # fmt: skip
    sizes: list[int] = []
    original = Model.capture

    def note(self: Model, tokens: torch.Tensor, sites: Any) -> dict[str, torch.Tensor]:
        if tokens.shape[1] == 16:  # not the one token that a width is found with
            sizes.append(len(tokens))
            if len(sizes) == 7:
                raise KeyboardInterrupt
        return original(self, tokens, sites)

    monkeypatch.setattr(Model, "capture", note)
    with pytest.raises(KeyboardInterrupt):
        harvest(config)
    monkeypatch.setattr(plan, "fitting_batch", lambda *_: 7)
    store = harvest(config)  # another machine's budget would not change the batches
    assert sizes[:2] == [1, 3]  # what finding it took
    assert max(sizes[2:]) == 5  # fewer only at the end of a split
    assert store.manifest["batch_sequences"] == 5
    assert store.manifest["sequences_per_window"] == 15


def test_a_model_spread_over_devices(tiny_folder: Path, tiny_model: Model, tmp_path: Path) -> None:
    tokens = torch.arange(5, 25).reshape(2, 10)
    expected = tiny_model.capture(tokens, [SITE])[SITE]
    spread = load_model(str(tiny_folder), dtype="float32", device="auto")
    assert torch.equal(spread.capture(tokens, [SITE])[SITE].cpu(), expected)
    from transformers import AutoModelForCausalLM

    on_disk = {
        "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
        "model.layers.2": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
    }  # fmt: skip
    hf = AutoModelForCausalLM.from_pretrained(
        tiny_folder, dtype=torch.float32, device_map=on_disk, offload_folder=tmp_path
    )
    model = Model(hf, tiny_model.tokenizer, spec="tiny", folder=tiny_folder)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert next(hf.model.layers[1].parameters()).device.type == "meta"
    assert torch.equal(model.capture(tokens, [SITE])[SITE], expected)
    with pytest.raises(InputError, match="text_encoder model is not spread"):
        load_model(str(tiny_folder), kind="text_encoder", device="auto")
