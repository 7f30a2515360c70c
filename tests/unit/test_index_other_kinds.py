"""Feature stores of models that are no language models: pictures, texts of encoders, prompts."""

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
from dashboards.heat_maps import pictures_html
from saescope.__main__ import main
from saescope.config import from_dict
from saescope.errors import ArtefactError, InputError
from store import FeatureStore
from store.pictures import Grid
from tests.tiny import SENTENCES
from tests.tiny_raw import make_pictures, make_tiny_encoder, make_tiny_resnet

STAGE = "module:encoder.stages.1:output"
LAYER = "module:encoder.layer.1:output"
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
