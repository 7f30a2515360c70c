"""The Training page's features as they emerge from a run's snapshots."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import streamlit as st
import torch
from streamlit.testing.v1 import AppTest

import sae
from dashboards import find_stores
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.data.provenance import weights_hash
from sae.training.snapshots import find_snapshots
from tests.e2e.test_explorer import links, open_page, parameter, shown
from tests.renumbered_store import make_renumbered_store
from tests.tiny_store import D_SAE, META, make_tiny_store
from tests.unit.test_train_rows import SETTINGS, X

TRAINING = "training"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with four snapshots, and a store of its SAE."""
    root = tmp_path_factory.mktemp("made")
    settings = {**SETTINGS, "d_sae": D_SAE, "passes": 12}
    trained = sae.train(X, "topk", k=3, **settings, lr=3e-3, snapshots=4, out=root / "runs" / "a")
    make_store_of(root / "stores", weights_hash(trained), root / "runs" / "a")
    return root


def make_store_of(folder: Path, sae_hash: str, run: Path = Path("runs/tiny")) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(META, "sae_hash", sae_hash)
        patch.setitem(META, "sae_path", str(run))
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


def find_it(app: AppTest) -> AppTest:
    (button,) = [each for each in app.button if each.label == "Find it in 4 snapshots"]
    return button.click().run(timeout=60)


def test_a_features_page_shows_what_it_was_in_each_snapshot(folder: Path) -> None:
    run = folder / "runs" / "a"
    own, random = cosines(run)
    loaded = [each.tokens for each in find_snapshots(run)]
    trained = sae.load(run).metadata["tokens_trained"]
    emerged = 4 - np.logical_and.accumulate((own >= 0.7)[::-1], axis=0).sum(0)
    app = find_it(open_page("feature", feature="7"))
    mine, null = chart(app, "genealogy")["data"]
    assert mine["x"] == [*loaded, trained]
    assert mine["y"] == pytest.approx([*own[:, 7], 1.0], abs=1e-5)
    assert null["y"] == pytest.approx(random.mean(1))
    (table,) = [each.value for each in app.dataframe if "nearest" in each.value]
    assert table["snapshot"].tolist() == loaded
    assert table["cosine"].tolist() == pytest.approx(own[:, 7].tolist(), abs=1e-5)
    assert table["random"].tolist() == pytest.approx(random.mean(1).tolist())
    said = {0: "Every snapshot, from the first", 4: "by the end of training"}
    for feature in {int(np.flatnonzero(emerged == when)[0]) for when in set(emerged.tolist())}:
        app = find_it(open_page("feature", feature=str(feature)))
        when = int(emerged[feature])
        at = said.get(when) or f"It emerged at {loaded[when]:,} tokens"
        assert at in shown(app)
        app.button[[each.label for each in app.button].index("Next")].click().run()
        assert "genealogy" in [each.key for each in app.get("plotly_chart")], "asked once"
        assert not app.exception


def test_a_feature_whose_run_cannot_be_followed_says_why(folder: Path) -> None:
    run = folder / "runs" / "a"
    (run / "sae" / "config.json").rename(run / "sae" / "moved")
    assert "Its run has not ended" in shown(open_page("feature", feature="7"))
    (run / "sae" / "moved").rename(run / "sae" / "config.json")
    damaged = find_snapshots(run)[0].path / "weights.safetensors"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-4])
    app = find_it(open_page("feature", feature="7"))
    assert "weights" in app.error[0].value
    damaged.write_bytes(whole)
    shutil.rmtree(folder / "stores")
    make_store_of(folder / "stores", "another", run)
    st.cache_resource.clear()
    app = find_it(open_page("feature", feature="7"))
    assert "is not the one that this store was made with" in shown(app)
    shutil.rmtree(run / "checkpoints")
    assert "--trainer.snapshots 12" in shown(open_page("feature", feature="7"))
    shutil.rmtree(run)
    assert "is not beside the stores" in shown(open_page("feature", feature="7"))


def save_planted(run: Path) -> dict[str, Path]:
    """A run with a snapshot, whose feature 10 becomes 10 and 11, whose 12 and 13 become 12, and
    which has all others of the trained SAE but 0 to 9."""
    rng = torch.Generator().manual_seed(0)
    late, new, noise = (torch.randn(D_SAE, 32, generator=rng) for _ in range(3))
    late[11] = late[10] + 0.3 * noise[10]
    early = late.clone()
    early[:10], early[11], early[13] = new[:10], new[11], late[12] + 0.3 * noise[12]
    late[13] = new[13]
    paths = {"early": run / "checkpoints" / f"tokens-{1000:012}", "late": run / "sae"}
    for path, directions in zip(paths.values(), (early, late), strict=True):
        planted = TopKSAE(TopKConfig(d_sae=D_SAE, k=3), 32)
        with torch.no_grad():
            planted.W_dec.copy_(directions)
        planted.save(path)
    return paths


def test_two_snapshots_of_one_run_are_compared_as_one_lineage(folder: Path) -> None:
    for name, path in save_planted(folder / "runs" / "b").items():
        make_renumbered_store(
            folder / "stores",
            np.arange(D_SAE),
            name=name,
            harvest=name,
            sae_path=str(path),
            sae_hash=weights_hash(sae.load(path)),
            tokens_trained={"early": 1000, "late": 20_000}[name],
        )
    for a, b, older, newer in (("late", "early", "B", "A"), ("early", "late", "A", "B")):
        app = open_page("compare", sae=a, other=b, by="decoder")
        assert not app.exception
        assert f"##### One run: {older} became {newer}" in [each.value for each in app.markdown]
        # new are 0 to 9, and 13
        assert (
            f"From 1,000 to 20,000 tokens of training. 82.8 % of the features of {newer} were "
            f"there in {older}, and 11 features came after. 1 split, 1 merge."
        ) in shown(app)
        (events,) = [each.value for each in app.dataframe if "what" in each.value]
        assert events.to_dict("records") == [
            {"what": "split", f"in {older}": "10", f"in {newer}": "10 11"},
            {"what": "merge", f"in {older}": "12 13", f"in {newer}": "12"},
        ]
    app = open_page("compare", sae="late", other="tiny", by="decoder")
    assert "One run" not in "".join(each.value for each in app.markdown)
