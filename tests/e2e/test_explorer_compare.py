"""The explorer's page about two SAEs, in every state."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import streamlit as st
import torch
from streamlit.testing.v1 import AppTest

from dashboards import find_stores
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.data.provenance import weights_hash
from store import Annotations
from store.matching import expected_max_cosine
from tests.e2e.test_explorer import links, open_page, parameter, shown
from tests.renumbered_store import make_renumbered_store
from tests.tiny_store import D_SAE, META, make_rows, make_tiny_store

COMPARE = "compare"
ORDER = np.random.default_rng(6).permutation(D_SAE)
METRICS = {**META["metrics"], "l0": 6.5, "fvu": 0.125}  # type: ignore[dict-item]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of stores with one in it, named tiny."""
    stores = tmp_path / "stores"
    make_tiny_store(stores)
    monkeypatch.setenv(find_stores.STORES_VARIABLE, str(stores))
    yield stores
    st.cache_resource.clear()
    st.cache_data.clear()


def numbers(app: AppTest) -> dict[str, str]:
    return {metric.label: metric.value for metric in app.metric}


def chart(app: AppTest, index: int) -> Any:
    return json.loads(app.get("plotly_chart")[index].proto.spec)


def test_one_store_alone(folder: Path) -> None:
    app = open_page(COMPARE)
    assert "Two SAEs are compared here, and there is one" in app.info[0].value
    assert "saescope index RUN" in app.info[0].value
    assert [label for label, _ in links(app)] == ["All features"]
    assert not app.metric


def test_stores_of_one_harvest_by_activations(folder: Path) -> None:
    make_renumbered_store(folder, ORDER, sae_hash="b", metrics=METRICS)
    with Annotations.open(folder / "other", sae_hash="b") as notes:
        notes.set_label(int(ORDER[5]), "the <b>fifth</b>")
    live = np.unique(make_rows().feature)
    app = open_page(COMPARE, sae="tiny")
    assert parameter(app, "other") == "other"
    assert parameter(app, "by") == "activations"
    dead = D_SAE - len(live)
    assert numbers(app) == {
        "matched pairs": f"{len(live)}",
        "only in A": f"{dead}",
        "only in B": f"{dead}",
        "mean max similarity, A": f"{len(live) / D_SAE:.3f}",
        "mean max similarity, B": f"{len(live) / D_SAE:.3f}",
    }
    assert f"correlation of activations over {make_rows().keep.sum()} positions" in shown(app)
    assert f"A has {dead} of {D_SAE}, B {dead} of {D_SAE}" in shown(app)
    frame = app.dataframe[0].value
    assert sorted(frame["feature_a"]) == live.tolist()
    assert (ORDER[frame["feature_a"]] == frame["feature_b"]).all()
    about = dict(zip(frame["feature_a"], frame["about_b"], strict=True))
    assert about[5] == "the <b>fifth</b>", "a table shows it as text"
    pareto = chart(app, 1)
    said = [text for trace in pareto["data"] for text in trace["hovertext"]]
    assert sorted(said) == ["other<br>L0 6.50, FVU 0.1250", "tiny<br>L0 4.25, FVU 0.1875"]


def test_features_that_only_one_has(folder: Path) -> None:
    make_renumbered_store(folder, ORDER)
    dead = sorted(set(range(D_SAE)) - set(make_rows().feature.tolist()))
    app = open_page(COMPARE, sae="tiny", show="a")
    frame = app.dataframe[0].value
    assert frame["feature_a"].tolist() == dead
    assert set(frame["similarity"]) == {0}
    app = open_page(COMPARE, sae="tiny", show="b")
    assert sorted(app.dataframe[0].value["feature_b"]) == sorted(ORDER[dead])


def saved(folder: Path, name: str, seed: int, d_in: int = 32) -> dict[str, str]:
    """An SAE beside the stores; what a store of it says."""
    torch.manual_seed(seed)
    made = TopKSAE(TopKConfig(d_sae=D_SAE, k=4), d_in).eval()
    made.metadata = {"site": META["site"]}
    made.save(folder.parent / "runs" / name)
    return {"sae_path": str(folder.parent / "runs" / name), "sae_hash": weights_hash(made)}


def test_decoders_of_stores_of_two_harvests(folder: Path) -> None:
    one, two = saved(folder, "one", 1), saved(folder, "two", 2)
    make_renumbered_store(folder, ORDER, name="one", harvest="h1", **one)
    make_renumbered_store(folder, ORDER, name="two", harvest="h2", **two)
    app = open_page(COMPARE, sae="one", other="two", by="activations")
    assert "only over one harvest" in app.warning[0].value
    assert parameter(app, "by") == "decoder"
    assert numbers(app)["matched pairs"] == "0"
    chance = expected_max_cosine(32, D_SAE)
    assert float(numbers(app)["mean max similarity, A"]) == pytest.approx(chance, abs=0.05)
    assert f"Random directions would have {chance:.3f}" in shown(app)
    assert "There are none." in app.info[0].value
    assert chart(app, 0)["layout"]["shapes"][0]["x0"] == chance
    again = saved(folder, "again", 1)
    make_renumbered_store(folder, ORDER, name="again", harvest="h2", **again)
    app = open_page(COMPARE, sae="one", other="again")
    assert numbers(app)["matched pairs"] == f"{D_SAE}"
    assert numbers(app)["mean max similarity, B"] == "1.000"


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"sae_path": ""}, "does not say where its SAE is"),
        ({"sae_path": "/elsewhere/run"}, "is not beside the stores"),
        ({"sae_hash": "stale"}, "is about another SAE than the one that is now in its folder"),
    ],
)
def test_saes_that_cannot_be_loaded(folder: Path, meta: dict[str, str], message: str) -> None:
    make_renumbered_store(folder, ORDER, name="one", **saved(folder, "one", 1))
    make_renumbered_store(folder, ORDER, name="two", **{**saved(folder, "two", 2), **meta})
    app = open_page(COMPARE, sae="one", other="two", by="decoder")
    assert message in app.error[0].value.replace("\\", "")
    assert "another way to compare" in shown(app)
    assert not app.dataframe
    app.segmented_control(key="compare_by").set_value("activations").run()
    assert not app.error
    assert numbers(app)["matched pairs"] != "0"


def test_decoders_of_two_widths(folder: Path) -> None:
    make_renumbered_store(folder, ORDER, name="one", **saved(folder, "one", 1))
    make_renumbered_store(folder, ORDER, name="two", **saved(folder, "two", 2, d_in=16))
    app = open_page(COMPARE, sae="one", other="two", by="decoder")
    assert "different widths" in app.error[0].value


def test_metrics_that_cannot_be_compared(folder: Path) -> None:
    make_renumbered_store(folder, ORDER, name="other", protocol="another")
    make_renumbered_store(folder, ORDER, name="unmeasured", metrics={})
    app = open_page(COMPARE, sae="tiny", other="other")
    assert "measured under different protocols" in shown(app)
    assert len(app.get("plotly_chart")) == 1
    app = open_page(COMPARE, sae="tiny", other="unmeasured")
    assert "Not measured: unmeasured." in shown(app)


def test_a_damaged_store_beside_them_is_left_out(folder: Path) -> None:
    make_renumbered_store(folder, ORDER)
    (folder / "damaged").mkdir()
    (folder / "damaged" / "features.duckdb").write_bytes(b"nothing")
    app = open_page(COMPARE, sae="tiny", other="other")
    assert app.dataframe
    assert "1 more was not measured" in shown(app)
    app = open_page(COMPARE, sae="tiny", other="damaged")
    assert "damaged" in app.error[0].value
    assert not app.exception


def test_wrong_parameters_are_said_and_replaced(folder: Path) -> None:
    make_renumbered_store(folder, ORDER)
    app = open_page(COMPARE, sae="tiny", other="gone", by="luck", show="all", x="1")
    said = [w.value.replace("\\", "") for w in app.warning]
    assert len(said) == 3
    for part in ("no other SAE named 'gone'", "'luck' is no way", "'all' is no table"):
        assert any(part in each for each in said), part
    assert parameter(app, "show") == "matched"
    assert "x" not in app.query_params
