"""The Training page's features as they emerge from a run's snapshots."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

import sae
from dashboards import find_stores
from sae.data.provenance import weights_hash
from sae.training.snapshots import find_snapshots
from tests.e2e.test_explorer import links, open_page, parameter, shown
from tests.tiny_store import D_SAE, META, make_tiny_store
from tests.unit.test_train_rows import SETTINGS, X

TRAINING = "training"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with four snapshots, and a store of its SAE."""
    root = tmp_path_factory.mktemp("made")
    settings = {**SETTINGS, "d_sae": D_SAE, "passes": 12}
    trained = sae.train(X, "topk", k=3, **settings, lr=3e-3, snapshots=4, out=root / "runs" / "a")
    make_store_of(root / "stores", weights_hash(trained))
    return root


def make_store_of(folder: Path, sae_hash: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(META, "sae_hash", sae_hash)
        make_tiny_store(folder)


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    shutil.copytree(made, tmp_path / "all")
    monkeypatch.setenv(find_stores.STORES_VARIABLE, str(tmp_path / "all" / "stores"))
    yield tmp_path / "all"
    st.cache_resource.clear()
    st.cache_data.clear()


def chart(app: AppTest, key: str) -> dict[str, Any]:
    (found,) = [each for each in app.get("plotly_chart") if each.key == key]
    return json.loads(found.proto.spec)


def cosines(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """The largest with any feature of each snapshot, of the run's features and of random directions
    [versions, features]."""
    loaded = [sae.load(each.path) for each in find_snapshots(run)] + [sae.load(run)]
    rows = [each.W_dec.detach().double().numpy() for each in loaded]
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in rows]
    random = np.random.default_rng(0).standard_normal(unit[-1].shape)
    random /= np.linalg.norm(random, axis=1, keepdims=True)
    own, null = (np.stack([(a @ b.T).max(1) for b in unit[:-1]]) for a in (unit[-1], random))
    return own, null


def test_features_are_found_where_their_cosines_say(folder: Path) -> None:
    app = open_page(TRAINING, runs="a")
    assert "emergence_share" not in [each.key for each in app.get("plotly_chart")]
    (button,) = [each for each in app.button if "Find its features in 4 snapshots" in each.label]
    button.click().run(timeout=60)
    assert parameter(app, "emerged") == "a"
    wanted, random = cosines(folder / "runs" / "a")
    tokens = [each.tokens for each in find_snapshots(folder / "runs" / "a")]
    share, null = chart(app, "emergence_share")["data"]
    assert share["x"] == [*tokens, sae.load(folder / "runs" / "a").metadata["tokens_trained"]]
    assert share["y"] == pytest.approx([*(wanted >= 0.7).mean(1), 1.0])
    assert null["name"] == "random directions"
    assert null["y"] == pytest.approx((random >= 0.7).mean(1))
    emerged = 4 - np.logical_and.accumulate((wanted >= 0.7)[::-1], axis=0).sum(0)
    table = app.dataframe[-1].value
    assert table["feature"].tolist() == np.argsort(emerged, kind="stable").tolist()
    names = [f"{each:,} tokens" for each in tokens] + ["only at the end"]
    assert table["emerged at"].tolist() == [names[n] for n in np.sort(emerged)]
    text = f"Of {D_SAE} features {(emerged == 0).sum()} are in the first snapshot"
    assert text in shown(app)
    lines = chart(app, "emergence_lines")["data"]
    first = int(table["feature"].tolist()[0])
    assert lines[0]["name"] == f"feature {first}"
    assert lines[0]["y"] == pytest.approx([*wanted[:, first], 1.0], abs=1e-5)
    assert lines[-1]["name"] == "random direction, mean"
    # one time alone
    app.selectbox(key="emergence_when").set_value(4).run()
    late = app.dataframe[-1].value if (emerged == 4).any() else None
    if late is not None:
        assert late["feature"].tolist() == np.flatnonzero(emerged == 4).tolist()
    assert not app.exception


def test_the_address_opens_it_and_labels_are_of_this_very_sae(folder: Path) -> None:
    app = open_page(TRAINING, runs="a", emerged="a")
    assert "about" in app.dataframe[-1].value
    shutil.rmtree(folder / "stores")
    make_store_of(folder / "stores", "another")
    st.cache_resource.clear()
    app = open_page(TRAINING, runs="a", emerged="a")
    assert "about" not in app.dataframe[-1].value, "the store is of another SAE"
    assert not links(app)


def test_states_without_it(folder: Path) -> None:
    run = folder / "runs" / "a"
    damaged = find_snapshots(run)[0].path / "weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4])
    app = open_page(TRAINING, runs="a", emerged="a")
    assert "weights" in app.error[0].value
    assert "saescope doctor" in shown(app)
    shutil.rmtree(run / "checkpoints")
    app = open_page(TRAINING, runs="a", emerged="a")
    assert "--trainer.snapshots" in shown(app)
    assert not app.exception
