"""Feature stores of models that are no language models: pictures, texts of encoders, prompts."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import torch
from PIL import Image

import sae
from activations import ActivationStore, CorpusConfig, HarvestConfig, ModelConfig, harvest
from activations.models.config import DenoisingConfig
from activations.models.diffusion import DiffusionModel
from activations.models.load import load_model
from dashboards.heat_maps import pictures_html
from sae.indexing.drawn import Strongest
from saescope.__main__ import main
from saescope.config import from_dict
from saescope.errors import ArtefactError, InputError
from store import FeatureStore
from store.pictures import Grid
from tests.tiny import SENTENCES
from tests.tiny_raw import (
    make_pictures,
    make_tiny_encoder,
    make_tiny_pipeline,
    make_tiny_resnet,
)

STAGE = "module:encoder.stages.1:output"
LAYER = "module:encoder.layer.1:output"
BLOCK = "module:down_blocks.1.attentions.0:update"
D_SAE = 24


def trained(root: Path, site: str, batch_size: int = 32) -> Path:
    values = {
        "harvest": str(root / "harvest"),
        "out": str(root / "run"),
        "site": site,
        "passes": 4.0,
        "evaluation_rows": 32,
        "sae": {"kind": "topk", "d_sae": D_SAE, "k": 3},
        "trainer": {"batch_size": batch_size, "lr": 3e-3},
    }
    sae.train(from_dict(sae.TrainConfig.specialise({}), values, "tests"))
    return root / "run"


def pictures_harvest(root: Path, **fields: Any) -> ActivationStore:
    make_tiny_resnet(root / "model")
    make_pictures(root / "pictures")
    settings: dict[str, Any] = {"context": 16, "chunk_rows": 32, "window_chunks": 2, **fields}
    return harvest(
        HarvestConfig(
            model=ModelConfig(spec=str(root / "model"), kind="vision", dtype="float32"),
            corpus=CorpusConfig(source=str(root / "pictures" / "*.png")),
            sites=(STAGE,),
            out=str(root / "harvest"),
            held_out_fraction=0.3,
            **settings,
        )
    )


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vision")
    pictures_harvest(root)
    run = trained(root, STAGE)
    sae.index(sae.IndexConfig(run=str(run), out=str(root / "store")))
    return root


def test_every_position_of_every_picture_is_in_the_store(vision: Path) -> None:
    rows = ActivationStore.open(str(vision / "harvest"))
    autoencoder = sae.load(vision / "run")
    with FeatureStore.open(vision / "store") as store, torch.no_grad():
        assert store.grid == Grid(4, 4)
        assert store.overview().n_documents == 10
        expected: dict[int, dict[int, float]] = {n: {} for n in range(D_SAE)}
        for split in ("train", "held_out"):
            for chunk in rows.chunks(split):
                x, position = rows.read_chunk(STAGE, chunk.index)
                dense = autoencoder.encode(x.float())
                for row, feature in dense.nonzero().tolist():
                    expected[feature][int(position[row])] = float(dense[row, feature])
        for number in range(D_SAE):
            position, activation = store.activations(number)
            found = dict(zip(position.tolist(), activation.tolist(), strict=True))
            assert found == pytest.approx(expected[number], rel=1e-5)
        number = int(np.argmax([len(each) for each in expected.values()]))
        example = store.examples(number)[0]
        assert example.tokens == [f"[{n // 4 + 1},{n % 4 + 1}]" for n in range(16)]
        assert example.activations[example.index] == example.activation
        profile = store.position_profile(number)
        assert profile.counts.sum() == len(expected[number])
        on_map = store.feature_map()
        assert on_map is not None
        assert np.ptp(on_map.x) > 0
        assert on_map.nearest == 10
        assert on_map.kept is not None
        assert on_map.kept > 1.2 * (on_map.by_chance or 1)


def test_without_the_map_all_else_is_the_same(vision: Path, tmp_path: Path) -> None:
    words = ["--no-map", "--neighbours", "20", "--harvest", str(vision / "harvest")]
    assert main(["index", str(vision / "run"), "--out", str(tmp_path / "bare"), *words]) == 0
    with (
        FeatureStore.open(vision / "store") as store,
        FeatureStore.open(tmp_path / "bare") as bare,
    ):
        assert bare.feature_map() is None
        for number in range(3):
            assert len(bare.neighbours(number)) == 20
            assert bare.neighbours(number)[:10] == store.neighbours(number)
            assert bare.examples(number) == store.examples(number)


def test_thumbnails_are_of_their_pictures(vision: Path) -> None:
    with FeatureStore.open(vision / "store") as store:
        table = ActivationStore.open(str(vision / "harvest")).document_table().to_pylist()
        for row in table:
            image = store.picture(row["document"])
            assert image is not None
            with Image.open(io.BytesIO(image)) as shown, Image.open(row["key"]) as original:
                assert shown.format == "JPEG"
                assert shown.size == original.size  # these are small enough as they are
                grey = [np.asarray(each.convert("L"), float).ravel() for each in (shown, original)]
                assert np.corrcoef(grey[0], grey[1])[0, 1] > 0.9
        assert store.picture(10_000) is None


def test_a_picture_that_has_changed_is_said_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures_harvest(tmp_path)
    run = trained(tmp_path, STAGE)
    first, second = sorted((tmp_path / "pictures").glob("*.png"))[:2]
    first.unlink()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(second)
    sae.index(sae.IndexConfig(run=str(run), out=str(tmp_path / "store")))
    assert "2 pictures cannot be shown" in capsys.readouterr().out
    with FeatureStore.open(tmp_path / "store") as store:
        assert sum(store.picture(n) is not None for n in range(10)) == 8


def test_heat_maps_by_hand_and_nothing_from_outside_is_markup(vision: Path) -> None:
    with FeatureStore.open(vision / "store") as store:
        number = int(np.argmax([store.feature(n).n_active for n in range(D_SAE)]))
        example = store.examples(number)[0]
    hostile = type(example)(**{**vars(example), "title": '"><script>alert(1)</script>'})
    html = pictures_html([hostile], {}, Grid(4, 4), 2 * example.activation)
    assert "<script" not in html
    assert html.count("background:rgba(235,110,20") == 16
    assert "rgba(235,110,20,0.375)" in html  # half of the strongest, of 0.75
    assert html.count("outline:2px") == 1


def test_damaged_pictures_and_grids_are_refused(vision: Path, tmp_path: Path) -> None:
    for sql, touched in (
        ("UPDATE picture SET image = '<svg onload=alert(1)>'::BLOB", "picture"),
        ("UPDATE meta SET value = '{\"rows\": 9}' WHERE key = 'grid'", "grid"),
    ):
        copy = tmp_path / f"{touched}.duckdb"
        copy.write_bytes((vision / "store" / "features.duckdb").read_bytes())
        with duckdb.connect(str(copy)) as con:
            con.execute(sql)
        with FeatureStore.open(copy) as store, pytest.raises(ArtefactError, match=touched):
            _ = store.picture(0), store.grid


def test_means_have_one_position(tmp_path: Path) -> None:
    pictures_harvest(tmp_path, rows="mean", context=1, chunk_rows=4)
    run = trained(tmp_path, STAGE, batch_size=4)
    sae.index(sae.IndexConfig(run=str(run), out=str(tmp_path / "store")))
    with FeatureStore.open(tmp_path / "store") as store:
        assert store.grid == Grid(1, 1)
        assert store.overview().n_tokens == 10


def test_texts_of_an_encoder_are_its_tokens(tmp_path: Path) -> None:
    make_tiny_encoder(tmp_path / "model")
    lines = [json.dumps({"text": f"{SENTENCES[n % 7]} {n}"}) for n in range(40)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    harvest(
        HarvestConfig(
            model=ModelConfig(spec=str(tmp_path / "model"), kind="text_encoder", dtype="float32"),
            corpus=CorpusConfig(source=str(tmp_path / "texts.jsonl")),
            sites=(LAYER,),
            out=str(tmp_path / "harvest"),
            context=32,
            chunk_rows=64,
            held_out_fraction=0.3,
        )
    )
    run = trained(tmp_path, LAYER)
    sae.index(sae.IndexConfig(run=str(run), out=str(tmp_path / "store")))
    with FeatureStore.open(tmp_path / "store") as store:
        assert store.grid is None
        number = int(np.argmax([store.feature(n).n_active for n in range(D_SAE)]))
        example = store.examples(number)[0]
        text = "".join(example.tokens)
        assert text.startswith("[CLS]")
        assert any(text[5:].split("[")[0].strip(" 0123456789") in each for each in SENTENCES)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(InputError):
        sae.index(sae.IndexConfig(run=str(run), out=str(tmp_path / "again")))


def test_pictures_of_prompts_are_drawn_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    make_tiny_pipeline(tmp_path / "model")
    prompts = [f"{SENTENCES[n][:9]} {n}" for n in range(6)]
    lines = [json.dumps({"text": each}) for each in prompts]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    denoising = DenoisingConfig(steps=2, at=(0, 1))
    spec = str(tmp_path / "model")
    harvest(
        HarvestConfig(
            model=ModelConfig(spec=spec, kind="diffusion", dtype="float32", diffusion=denoising),
            corpus=CorpusConfig(source=str(tmp_path / "prompts.jsonl")),
            sites=(BLOCK,),
            out=str(tmp_path / "harvest"),
            context=16,
            chunk_rows=32,
            held_out_fraction=0.3,
        )
    )
    run = trained(tmp_path, BLOCK, batch_size=16)
    for name, most in (("store", 1000), ("two", 2), ("none", 0)):
        sae.index(sae.IndexConfig(run=str(run), out=str(tmp_path / name), pictures=most))
    model = load_model(spec, kind="diffusion", dtype="float32", diffusion=denoising)
    assert isinstance(model, DiffusionModel)
    with FeatureStore.open(tmp_path / "store") as store:
        assert store.grid == Grid(4, 4)
        shown = {
            example.document: example.title
            for number in range(D_SAE)
            for example in store.examples(number)
        }
        assert shown
        for document in shown:
            text = prompts[document]
            seed = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
            image = store.picture(document)
            assert image is not None
            with Image.open(io.BytesIO(image)) as found:
                small = np.asarray(found.resize((8, 8), Image.Resampling.BOX), float) / 255
            drawn = model.pictures([(text, seed, 0)])[0].permute(1, 2, 0).numpy()
            assert np.abs(small - drawn).mean() < 0.1
            other = model.pictures([(text, seed + 1, 0)])[0].permute(1, 2, 0).numpy()
            assert np.abs(small - drawn).mean() < np.abs(small - other).mean()
    for name, count in (("two", 2), ("none", 0)):
        with FeatureStore.open(tmp_path / name) as store:
            assert sum(store.picture(n) is not None for n in range(6)) == count
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines[1:] + lines[:1]))
    capsys.readouterr()
    sae.index(sae.IndexConfig(run=str(run), out=str(tmp_path / "store"), replace=True))
    assert "prompts are not what they were" in capsys.readouterr().out
    (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"other")
    sae.index(sae.IndexConfig(run=str(run), out=str(tmp_path / "store"), replace=True))
    assert "pictures: left out, as the model cannot draw them" in capsys.readouterr().out


def test_the_strongest_positions_are_those_of_all_pieces() -> None:
    chance = np.random.default_rng(0)
    position = chance.permutation(4000)
    feature, value = chance.integers(0, 3, 4000), chance.random(4000)
    strongest = Strongest(4)
    for piece in np.array_split(np.arange(4000), 7):
        strongest.add(
            position[piece], feature[piece].astype(np.int32), value[piece].astype(np.float32)
        )
    order = [np.argsort(-np.where(feature == n, value, 0))[:10] for n in range(3)]
    by_rank = [int(position[order[n][rank]]) // 16 for rank in range(10) for n in range(3)]
    assert strongest.sequences(16) == list(dict.fromkeys(by_rank))
