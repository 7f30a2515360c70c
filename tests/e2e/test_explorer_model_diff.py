"""The explorer's page about the two models of a crosscoder, in every state."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import streamlit as st
import torch
from pyarrow import parquet
from streamlit.testing.v1 import AppTest

from dashboards import find_stores
from sae.analysis.model_diff import ModelDiff, Thresholds
from sae.architectures.crosscoder import Crosscoder, CrosscoderConfig
from sae.commands.diff_models import MODEL_DIFF, as_table
from sae.data.provenance import weights_hash
from tests.e2e.test_explorer import open_page, parameter, shown
from tests.tiny_store import META, make_tiny_store

MODELS = "models"
NAN = float("nan")
# feature 0 only A, 1 only B, 2 shared, 3 not only B (its error), 4 between, 5 silent
FOUND = ModelDiff(
    counts=torch.tensor([50, 60, 90, 40, 30, 2]),
    rows=1000,
    norm_difference=torch.tensor([0.03, 0.97, 0.5, 0.95, 0.7, 1.0]),
    error_ratio=torch.tensor([NAN, 0.1, 1.0, 0.8, 0.4, 0.0]),
    reconstruction_ratio=torch.tensor([NAN, 0.2, 0.9, 0.1, 0.5, 0.0]),
    error_ratio_of_a=torch.tensor([0.05, NAN, 1.0, NAN, 3.0, NAN]),
    reconstruction_ratio_of_a=torch.tensor([0.15, NAN, 1.1, NAN, 2.0, NAN]),
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run's folder with a table, and a store of the same SAE."""
    made = Crosscoder(CrosscoderConfig(d_sae=6), 4)
    made.metadata = {"sites": ["base:x", "tuned:x"], "site_widths": [2, 2]}
    folder = tmp_path / "runs" / "both"
    (folder / "sae").mkdir(parents=True)
    (folder / "metrics.jsonl").touch()
    parquet.write_table(as_table(FOUND, made, Thresholds()), folder / MODEL_DIFF)
    monkeypatch.setitem(META, "sae_hash", weights_hash(made))
    make_tiny_store(tmp_path / "stores")
    monkeypatch.setenv(find_stores.STORES_VARIABLE, str(tmp_path / "stores"))
    yield folder
    st.cache_resource.clear()
    st.cache_data.clear()


def numbers(app: AppTest) -> dict[str, str]:
    return {metric.label: metric.value for metric in app.metric}


def chart(app: AppTest) -> dict[str, Any]:
    (found,) = [each for each in app.get("plotly_chart") if each.key == "models_chart"]
    return json.loads(found.proto.spec)


def values(column: Any) -> list[float]:
    """Of a trace, however Plotly writes them."""
    if isinstance(column, list):
        return column
    return np.frombuffer(base64.b64decode(column["bdata"]), column["dtype"]).tolist()


def test_what_each_feature_is(run: Path) -> None:
    app = open_page(MODELS)
    assert numbers(app) == {"only A": "1", "only B": "1", "shared": "1", "silent": "1"}
    said = shown(app).replace("\\", "")
    assert "A is **base:x**, B is **tuned:x**; 1,000 rows" in said
    (points,) = chart(app)["data"]
    assert values(points["x"]) == pytest.approx([0.03, 0.97, 0.5, 0.95, 0.7])
    # of the model that each is written to less
    assert values(points["y"]) == pytest.approx([0.05, 0.1, 1.0, 0.8, 0.4])
    assert len(set(points["marker"]["color"])) == 4
    assert points["marker"]["color"][3] == points["marker"]["color"][4]
    table = app.dataframe[0].value
    assert table["feature"].tolist() == [0]
    assert table["error_ratio"].tolist() == pytest.approx([0.05])
    assert {"label", "tokens"} <= set(table)
    app.selectbox(key="models_class").set_value("not_only_b").run()
    assert app.dataframe[0].value["feature"].tolist() == [3]
    assert parameter(app, "class") == "not_only_b"
    app.segmented_control(key="models_ratio").set_value("reconstruction_ratio").run()
    (points,) = chart(app)["data"]
    assert values(points["y"]) == pytest.approx([0.15, 0.2, 0.9, 0.1, 0.5])
    assert not app.exception


def test_a_link_opens_it_as_it_was(run: Path) -> None:
    app = open_page(MODELS, run="both", ratio="reconstruction_ratio", **{"class": "only_b"})
    assert app.dataframe[0].value["feature"].tolist() == [1]
    assert values(chart(app)["data"][0]["y"])[1] == pytest.approx(0.2)
    app = open_page(MODELS, run="gone", ratio="nonsense", **{"class": "none"})
    assert "gone" in app.warning[0].value
    assert not app.exception


def test_states_without_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / MODEL_DIFF).write_bytes(b"PAR1 torn")
    app = open_page(MODELS)
    assert "damaged table" in app.error[0].value
    assert "saescope diff-models RUN" in shown(app)
    (run / MODEL_DIFF).unlink()
    app = open_page(MODELS)
    assert "saescope join data/A data/B" in app.info[0].value
    assert not app.exception


def test_without_a_store_of_it(run: Path) -> None:
    (run / MODEL_DIFF).unlink()
    other = Crosscoder(CrosscoderConfig(d_sae=6), 4)
    other.metadata = {"sites": ["base:x", "tuned:x"], "site_widths": [2, 2]}
    torch.nn.init.ones_(other.W_dec)
    parquet.write_table(as_table(FOUND, other, Thresholds()), run / MODEL_DIFF)
    app = open_page(MODELS)
    assert "label" not in app.dataframe[0].value
    assert "Index the crosscoder" in shown(app)
