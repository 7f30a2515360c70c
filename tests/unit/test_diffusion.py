"""Diffusion models: rows at the places of a U-net's feature map, against a denoising by hand."""

import hashlib
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from activations import ActivationStore, CorpusConfig, HarvestConfig, ModelConfig, harvest
from activations.models.config import DenoisingConfig
from activations.models.load import load_model
from activations.recompute.doctor import DoctorConfig, doctor
from saescope.errors import InputError
from tests.damage import assert_same_content
from tests.tiny_raw import make_tiny_pipeline

SITE = "module:down_blocks.1.attentions.0:update"
PROMPTS = ("a river", "the mill", "light", "two schools", "bread", "a winter")
STEPS = (0, 2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("diffusion")
    make_tiny_pipeline(folder / "pipeline")
    lines = [json.dumps({"text": prompt}) for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def make(root: Path, tmp_path: Path) -> Callable[..., HarvestConfig]:
    def build(guidance: float = 0.0, **fields: Any) -> HarvestConfig:
        denoising = DenoisingConfig(steps=4, at=STEPS, guidance=guidance)
        settings: dict[str, Any] = {
            "model": ModelConfig(spec=str(root / "pipeline"), kind="diffusion", dtype="float32",
                                 diffusion=denoising),
            "corpus": CorpusConfig(source=str(root / "prompts.jsonl")),
            "sites": (SITE,), "out": str(tmp_path / "out"), "context": 16, "chunk_rows": 64,
            "window_chunks": 1, "batch_sequences": 2, "held_out_fraction": 0.0, **fields,
        }  # fmt: skip
        return HarvestConfig(**settings)

    return build


def by_hand(root: Path, prompt: str, guidance: float) -> list[Tensor]:
    """The block's update [place, channel] at each step read: the parts of the folder, a loop."""
    diffusers = importlib.import_module("diffusers")
    transformers = importlib.import_module("transformers")
    folder = root / "pipeline"
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    found: list[Tensor] = []
    unet.down_blocks[1].attentions[0].register_forward_hook(
        lambda _module, args, out: found.append((out[0] - args[0])[-1].flatten(1).T)
    )

    def encode(text: str) -> Tensor:
        ids = tokenizer(text, padding="max_length", max_length=16, return_tensors="pt").input_ids
        return encoder(ids)[0]

    seed = int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16)
    x = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
    scheduler.set_timesteps(4)
    with torch.no_grad():
        condition = encode(prompt)
        if guidance > 1:
            condition = torch.cat([encode(""), condition])
        for time in scheduler.timesteps:
            noise = unet(x.expand(len(condition), -1, -1, -1), time, condition).sample
            if guidance > 1:
                noise = noise[:1] + guidance * (noise[1:] - noise[:1])
            x = scheduler.step(noise, time, x).prev_sample
    return [found[step] for step in STEPS]


def rows_of(store: ActivationStore) -> dict[tuple[int, int], Tensor]:
    """Each row by its sequence and position."""
    found = {}
    for chunk in store.chunks("train"):
        x, row_token = store.read_chunk(SITE, chunk.index)
        for row, place in zip(x.float(), row_token.tolist(), strict=True):
            found[divmod(place, store.context)] = row
    return found


@pytest.mark.parametrize("guidance", [0.0, 5.0])
def test_rows_are_the_places_at_each_step(
    make: Callable[..., HarvestConfig], root: Path, guidance: float
) -> None:
    store = harvest(make(guidance))
    rows, document = rows_of(store), store.document[:]
    assert len(rows) == len(PROMPTS) * len(STEPS) * 16
    for number, prompt in enumerate(PROMPTS):
        sequences = (document[:, 0] == number).nonzero()[0].tolist()
        assert len(sequences) == len(STEPS)
        for sequence, expected in zip(sequences, by_hand(root, prompt, guidance), strict=True):
            for position in range(16):
                row = rows[sequence, position]
                assert (row - expected[position]).norm() < 0.02 * expected[position].norm()
    assert store.document_table().num_rows == len(PROMPTS)
    assert store.manifest["corpus"]["train"]["documents"] == len(PROMPTS)
    assert store.manifest["config"]["model"]["diffusion"]["at"] == list(STEPS)


def test_repaired_and_computed_in_other_batches(make: Callable[..., HarvestConfig]) -> None:
    whole = harvest(make())
    assert len(whole.windows) == 3  # of two prompts at two steps each
    again = harvest(make(out=make().out + "-again"))
    (again.path / "activations.zarr" / SITE / "c" / "1" / "0").unlink()
    assert doctor(DoctorConfig(path=str(again.path), repair=True)) == 0
    assert_same_content(again.path, whole.path)
    odd = harvest(make(out=make().out + "-odd", batch_sequences=3))
    here, there = rows_of(odd), rows_of(whole)
    assert here.keys() == there.keys()
    for place, row in here.items():
        torch.testing.assert_close(row, there[place], rtol=0.02, atol=1e-3)


def test_what_cannot_be_harvested(
    make: Callable[..., HarvestConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": "a very long prompt " * 9}))
    for fields, message in (
        ({"context": 64}, "has 16 positions.*given: 64; allowed: 16"),
        ({"corpus": CorpusConfig(source=str(long))}, "long.jsonl:1: a prompt has more tokens"),
        ({"sites": ("module:mid_block:outputs",)}, "no such site"),
    ):
        with pytest.raises(InputError, match=message):
            harvest(make(**fields))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InputError, match=r"pip install 'saescope\[diffusion\]'"):
        harvest(make())
    assert list(tmp_path.iterdir()) == [long]


def test_settings_that_cannot_be() -> None:
    bad: tuple[tuple[dict[str, Any], str], ...] = (
        ({"steps": 2, "at": (0, 2)}, "diffusion.at.*0 to 1"),
        ({"steps": 3, "at": (1, 0)}, "diffusion.at"),
        ({"at": ()}, "diffusion.at"),
        ({"steps": 0}, "steps"),
        ({"guidance": -1.0}, "guidance"),
        ({"pixels": 0}, "pixels"),
    )
    for fields, message in bad:
        with pytest.raises(InputError, match=message):
            DenoisingConfig(**fields)
    with pytest.raises(InputError, match=r"model\.diffusion: is for models of the kind diffusion"):
        ModelConfig(diffusion=DenoisingConfig(steps=2))
    with pytest.raises(InputError, match=r"model\.kind"):
        load_model("smollm2-135m", kind="sound")
