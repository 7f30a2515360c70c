"""An SAE belongs to one model, and a store to one SAE: others are told by their hashes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import sae
from activations import Model, load_model
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.commands.steer import SteerConfig, steer_text
from sae.core.base import SparseAutoencoder
from sae.data.provenance import check_indexed, check_trained_on, weights_hash
from saescope.errors import ArtefactError, InputError
from store import FeatureStore
from tests.tiny import D_MODEL, make_tiny_harvest, make_tiny_model

SITE = "blocks.1.hook_resid_post"
TEXT = "The river rose in the night"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture and tokenizer, other weights."""
    return make_tiny_model(tmp_path_factory.mktemp("tuned") / "model", seed=1)


@pytest.fixture(scope="module")
def harvest(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_harvest(tmp_path_factory.mktemp("harvest"), base, documents=20)


@pytest.fixture(scope="module")
def other_harvest(tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_harvest(tmp_path_factory.mktemp("other"), tuned, documents=20)


def made(model: Model, seed: int = 0, **more: Any) -> SparseAutoencoder:
    torch.manual_seed(seed)
    made = TopKSAE(TopKConfig(d_sae=48, k=4), D_MODEL).eval()
    made.metadata = {
        "site": SITE, "model": model.name, "model_spec": model.spec,
        "weights_hash": model.weights_hash, "tokenizer_hash": model.tokenizer_hash, **more,
    }  # fmt: skip
    return made


def test_steering_another_model_is_refused_unless_it_is_meant(
    base: Path, tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, other = load_model(str(base)), load_model(str(tuned))
    found = made(own)
    with sae.steer(own, found, add={3: 5.0}), sae.splice(own, found):
        expected = own.generate(TEXT, max_new_tokens=2)
    assert expected
    said = rf"steer: the SAE was trained on another model: its weights differ.*{tuned}.*{base}"
    with pytest.raises(InputError, match=said), sae.steer(other, found, add={3: 5.0}):
        pass
    with pytest.raises(InputError, match="splice: the SAE was"), sae.splice(other, found):
        pass
    with pytest.raises(InputError, match="trained on another model"):
        sae.features_of_text(other, found, TEXT)
    assert "used all the same" not in capsys.readouterr().out
    with sae.steer(other, found, add={3: 5.0}, allow_other_model=True):
        assert other.generate(TEXT, max_new_tokens=2)
    with sae.splice(other, found, allow_other_model=True):
        pass
    sae.features_of_text(other, found, TEXT, allow_other_model=True)
    assert capsys.readouterr().out.count("it is used all the same") == 3


def test_another_tokenizer_is_another_model(base: Path) -> None:
    own = load_model(str(base))
    with pytest.raises(InputError, match="its tokenizer differ"):
        check_trained_on(own, made(own, tokenizer_hash="0" * 64), where="x")


def test_an_sae_that_names_no_hashes_is_taken(base: Path, tuned: Path) -> None:
    """Those of other libraries do not."""
    found = made(load_model(str(base)))
    del found.metadata["weights_hash"], found.metadata["tokenizer_hash"]
    with sae.steer(load_model(str(tuned)), found, add={3: 5.0}):
        pass


def test_the_steer_command(base: Path, tuned: Path, tmp_path: Path) -> None:
    """What the SAE's model_spec names has other weights by now."""
    shutil.copytree(base, tmp_path / "model")
    made(load_model(str(tmp_path / "model"))).save(tmp_path / "sae")
    config: dict[str, Any] = {"run": str(tmp_path / "sae"), "add": ("3=5",), "max_new_tokens": 2}
    steer_text(SteerConfig(**config))
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(tuned, tmp_path / "model")
    with pytest.raises(InputError, match="the SAE was trained on another model"):
        steer_text(SteerConfig(**config))
    assert steer_text(SteerConfig(**config, allow_other_model=True))["steered"]


def test_a_harvest_of_another_model(
    base: Path, harvest: Path, other_harvest: Path, tmp_path: Path
) -> None:
    made(load_model(str(base)), harvest=str(harvest)).save(tmp_path / "sae")
    run: dict[str, Any] = {"run": str(tmp_path / "sae"), "harvest": str(other_harvest)}
    with pytest.raises(InputError, match="the SAE was trained on another model"):
        sae.evaluate(sae.EvaluateConfig(**run, tokens=64))
    with pytest.raises(InputError, match="the SAE was trained on another model"):
        sae.index(sae.IndexConfig(**run, out=str(tmp_path / "store")))
    assert not (tmp_path / "store").exists()
    measured = sae.evaluate(sae.EvaluateConfig(**run, tokens=64, allow_other_model=True))
    assert measured["reconstruction"]["rows"] > 0
    path = sae.index(sae.IndexConfig(**run, out=str(tmp_path / "store"), allow_other_model=True))
    with FeatureStore.open(path) as store:
        assert store.meta["allow_other_model"] is True
        check_indexed(sae.load(tmp_path / "sae"), store.meta, where="x")


def test_a_damaged_evaluation_is_not_indexed(base: Path, harvest: Path, tmp_path: Path) -> None:
    made(load_model(str(base)), harvest=str(harvest)).save(tmp_path / "sae")
    run = str(tmp_path / "sae")
    measured = sae.evaluate(sae.EvaluateConfig(run=run, tokens=0))
    path = tmp_path / "sae" / "evaluation.json"
    written = json.loads(path.read_text())
    assert {k: v for k, v in written.items() if k != "sha256"} == measured
    path.write_text(path.read_text().replace('"rows": ', '"rows": 1', 1))
    with pytest.raises(ArtefactError, match=r"evaluation\.json: its content does not match"):
        sae.index(sae.IndexConfig(run=run, out=str(tmp_path / "store")))
    # of an older version
    old = {k: v for k, v in written.items() if k not in ("sha256", "schema")}
    path.write_text(json.dumps(old))
    sae.index(sae.IndexConfig(run=run, out=str(tmp_path / "store")))


def test_a_store_is_about_one_sae(base: Path, harvest: Path, tmp_path: Path) -> None:
    model = load_model(str(base))
    made(model, harvest=str(harvest)).save(tmp_path / "sae")
    path = sae.index(sae.IndexConfig(run=str(tmp_path / "sae"), out=str(tmp_path / "store")))
    with FeatureStore.open(path) as store:
        check_indexed(sae.load(tmp_path / "sae"), store.meta, where=str(path))
        other = made(model, seed=1)
        assert weights_hash(other) != store.meta["sae_hash"]
        with pytest.raises(ArtefactError, match="is about another SAE than the one that is now"):
            check_indexed(other, store.meta, where=str(path))
