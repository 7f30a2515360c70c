"""The explorer's live text: only with the model and the SAE that the store was made with."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sae
from activations import load_model
from dashboards import find_stores, model_cache
from sae.architectures.abstopk import AbsTopKConfig, AbsTopKSAE
from sae.architectures.topk import TopKConfig, TopKSAE
from saescope.errors import ArtefactError
from store import FeatureStore
from tests.tiny import make_tiny_harvest, make_tiny_model

SITE, TEXT = "blocks.1.hook_resid_post", "The river rose in the night"


def save_sae(folder: Path, seed: int, harvest: Path) -> None:
    torch.manual_seed(seed)
    made = TopKSAE(TopKConfig(d_sae=64, k=6), 32).eval()
    made.metadata = {"site": SITE, "harvest": str(harvest)}
    shutil.rmtree(folder, ignore_errors=True)
    made.save(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a harvest, an SAE and its store."""
    work = tmp_path_factory.mktemp("live")
    harvest = make_tiny_harvest(work, make_tiny_model(work / "model"))
    save_sae(work / "run", 1, harvest)
    sae.index(sae.IndexConfig(run=str(work / "run"), out=str(work / "stores" / "a")))
    return work


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (find_stores.STORES_VARIABLE, find_stores.NAMED_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    model_cache.forget_all()
    yield
    model_cache.forget_all()


def answer(made: Path) -> list[int]:
    with FeatureStore.open(made / "stores" / "a") as store:
        return model_cache.features_of_text(store, TEXT).feature.tolist()


def test_features_are_those_of_the_sae(made: Path) -> None:
    model = load_model(str(made / "model"), dtype="float32")
    wanted = sae.features_of_text(model, sae.load(made / "run"), TEXT)
    assert answer(made) == wanted.feature.tolist()


def test_another_sae_in_its_place_is_refused(made: Path) -> None:
    kept = made / "kept"
    shutil.move(made / "run", kept)
    save_sae(made / "run", 2, made / "harvest")
    with pytest.raises(ArtefactError, match="another SAE than the one that is now in its folder"):
        answer(made)
    shutil.rmtree(made / "run")
    shutil.move(kept, made / "run")
    assert answer(made)


def test_another_model_in_its_place_is_refused(made: Path) -> None:
    weights = made / "model" / "model.safetensors"
    kept = weights.read_bytes()
    content = bytearray(kept)
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ArtefactError, match="not the model that the store was made with"):
        answer(made)
    weights.write_bytes(kept)
    assert answer(made)


def test_attribution_sums_to_the_stores_own_activations(made: Path) -> None:
    with FeatureStore.open(made / "stores" / "a") as store:
        number = int(store.next_live(-1) or 0)
        example = store.examples(number, "top", None)[0]
        found = model_cache.attribution(store, number, example.token_ids, example.index)
    terms = found.sources.sum() + sum(found.components.values()) + sum(found.biases.values())
    assert found.activation == pytest.approx(example.activation, rel=1e-4)
    assert terms == pytest.approx(example.activation, rel=1e-4)
    assert found.site == SITE
    assert found.tokens == example.tokens[: example.index + 1]


def test_the_attribution_of_a_negative_end_has_its_sign(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    signed = AbsTopKSAE(AbsTopKConfig(d_sae=64, k=6), 32).eval()
    model = load_model(str(made / "model"), dtype="float32")
    pair = model_cache.LoadedPair(model, signed, SITE)
    ids = model.tokenize(TEXT)
    wanted = sae.features_of_text(model, signed, TEXT, site=SITE, allow_other_model=True)
    entry = int(wanted.activation.argmin())
    value, number = float(wanted.activation[entry]), int(wanted.feature[entry])
    with FeatureStore.open(made / "stores" / "a") as store, monkeypatch.context() as patch:
        patch.setattr(model_cache, "load", lambda _what: pair)
        found = model_cache.attribution(store, 64 + number, ids, int(wanted.position[entry]))
    assert value < 0
    assert found.activation == pytest.approx(-value, rel=1e-4)
    assert found.sources.sum() + sum(found.components.values()) + sum(
        found.biases.values()
    ) == pytest.approx(-value, rel=1e-4)


def test_in_the_explorer_a_store_from_elsewhere_loads_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloaded = tmp_path / "downloads" / "stranger"
    shutil.copytree(made / "stores" / "a", downloaded)
    monkeypatch.setenv(find_stores.STORES_VARIABLE, str(downloaded))
    with FeatureStore.open(downloaded) as store:
        with pytest.raises(ArtefactError, match=r"nobody has named it.*--model"):
            model_cache.features_of_text(store, TEXT)
        named = {"model": [str(made / "model")], "sae": []}
        monkeypatch.setenv(find_stores.NAMED_VARIABLE, json.dumps(named))
        with pytest.raises(ArtefactError, match=r"nobody has named it.*--sae"):
            model_cache.features_of_text(store, TEXT)
        named["sae"] = [str(made / "run")]
        monkeypatch.setenv(find_stores.NAMED_VARIABLE, json.dumps(named))
        assert model_cache.features_of_text(store, TEXT).feature.tolist() == answer(made)
        for key in ("sae_hash", "model_hash"):
            told, store.meta[key] = store.meta[key], None
            with pytest.raises(ArtefactError, match="does not say which"):
                model_cache.features_of_text(store, TEXT)
            store.meta[key] = told
