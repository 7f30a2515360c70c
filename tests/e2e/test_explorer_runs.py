"""The explorer's Home and Training pages: stores and runs beside each other, and their curves."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from dashboards import catalogue, figures, find_stores
from dashboards.run_folders import find_runs
from sae.training.telemetry import MetricsLog
from tests.e2e.test_explorer import open_page, parameter, shown
from tests.tiny_store import make_tiny_store

TRAINING = "training"


def make_run(
    folder: Path, *, finished: bool = True, evaluated: bool = True, fvu: float = 0.25
) -> Path:
    """A run's folder with three measurements, written as training writes them."""
    folder.mkdir(parents=True)
    config = {"sites": ["blocks.1.hook_resid_post"], "sae": {"kind": "topk", "d_sae": 48}}
    (folder / "manifest.json").write_text(json.dumps({"config": config}))
    log = MetricsLog(folder / "metrics.jsonl")
    for step in (10, 20, 30):
        log.append(
            step,
            tokens=step * 100,
            train={
                "loss": 1 / step,
                "fvu": fvu + 1 / step,
                "dead": None if step == 10 else step,
                "lr": 1e-3,
            },
            held_out={"fvu": fvu + 2 / step, "l0": 4.0},
        )
    if finished:
        (folder / "sae").mkdir()
    if evaluated:
        values = {
            "reconstruction": {"l0": 8.0, "fvu": fvu, "fvu_interval": 0.01},
            "downstream": {"delta_ce": 0.5, "delta_ce_interval": None},
            "protocol_hash": "f00d",
        }
        (folder / "evaluation.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_store(tmp_path_factory.mktemp("made")).parent


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with stores/tiny in it; runs go beside."""
    shutil.copytree(made, tmp_path / "stores" / "tiny")
    monkeypatch.setenv(find_stores.STORES_VARIABLE, str(tmp_path / "stores"))
    yield tmp_path
    st.cache_resource.clear()
    st.cache_data.clear()


def chart(app: AppTest, key: str) -> dict[str, Any]:
    (found,) = [each for each in app.get("plotly_chart") if each.key == key]
    return json.loads(found.proto.spec)


def old(path: Path) -> None:
    """As if nothing had been written for an hour."""
    then = path.stat().st_mtime - 3600
    os.utime(path, (then, then))


def test_runs_are_found_with_their_state(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "a")
    make_run(tmp_path / "runs" / "sweep" / "a", finished=False, evaluated=False)
    old(make_run(tmp_path / "runs" / "sweep" / "b", finished=False) / "metrics.jsonl")
    (tmp_path / "runs" / "sweep" / "b" / "manifest.json").write_text("{ torn")
    found = {run.name: run for run in find_runs(tmp_path)}
    assert {name: run.state for name, run in found.items()} == {
        "runs/a": "finished",
        "runs/sweep/a": "running",
        "b": "stopped",
    }
    assert found["runs/a"].sites == "blocks.1.hook_resid_post"
    assert found["runs/a"].metrics() == {
        "l0": 8.0,
        "fvu": 0.25,
        "fvu_interval": 0.01,
        "delta_ce": 0.5,
        "delta_ce_interval": None,
    }
    assert found["b"].config == {}, "one that cannot be read says nothing"


def test_home_lists_stores_and_runs(folder: Path) -> None:
    make_run(folder / "runs" / "good")
    make_run(folder / "runs" / "raw", evaluated=False)
    old(make_run(folder / "runs" / "half", finished=False, evaluated=False) / "metrics.jsonl")
    app = open_page()
    table = app.dataframe[0].value.set_index("SAE")
    assert table["is"].to_dict() == {
        "tiny": "indexed",
        "good": "finished",
        "half": "stopped",
        "raw": "finished",
    }
    assert table.loc["good", "FVU"] == "0.2500 ± 0.0100"
    assert table.loc["good", "delta CE (nats)"] == "0.5000 ± unknown: too few documents"
    assert table.loc["tiny", "FVU"] == "0.1875"
    assert table.loc["raw", "FVU"] == ""
    assert table["features"].tolist() == [64, 48, 48, 48]
    commands = [code.value for code in app.code]
    assert commands == [
        f"saescope index {folder}/runs/good --out stores/good",
        "call the same saescope train again",
        f"saescope eval {folder}/runs/raw",
    ]
    traces = chart(app, "pareto_fvu")["data"]
    points = sorted((x, y) for t in traces for x, y in zip(t["x"], t["y"], strict=True))
    assert points == [(4.25, 0.1875), (8.0, 0.25)]
    assert "do not compare" in shown(app), "they were measured under two protocols"


def test_a_run_with_a_store_is_listed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(folder / "runs" / "tiny")
    overview = catalogue.queries.open_store(folder / "stores" / "tiny" / "features.duckdb")
    monkeypatch.setitem(overview.meta, "sae_path", str(run))
    assert [entry.name for entry in catalogue.entries()] == ["tiny"]


def test_a_damaged_store_is_a_row_with_a_reason(folder: Path) -> None:
    broken = folder / "stores" / "broken"
    broken.mkdir()
    (broken / "features.duckdb").write_bytes(b"no database")
    app = open_page(sae="tiny")
    assert "broken" in app.error[0].value
    assert app.dataframe[0].value.set_index("SAE").loc["broken", "is"] == "damaged"


def test_pareto_by_hand() -> None:
    points = pd.DataFrame(
        {
            "name": ["a<", "b"],
            "protocol": ["p", "q"],
            "l0": [8.0, 32.0],
            "fvu": [0.5, 0.25],
            "half": [0.125, float("nan")],
        }
    )
    figure = figures.pareto(points, "fvu", {"l0": "L0", "fvu": "FVU"}).to_dict()
    first, second = figure["data"]
    assert list(first["error_y"]["array"]) == [0.125]
    assert first["text"] == [" a&lt; "]
    assert first["textposition"] == ["middle right"]
    assert second["textposition"] == ["middle left"]
    assert first["marker"]["color"] != second["marker"]["color"]
    assert figure["layout"]["showlegend"]


def test_curves_of_several_runs(folder: Path) -> None:
    make_run(folder / "runs" / "a", fvu=0.25)
    make_run(folder / "runs" / "b", fvu=0.5, finished=False)
    app = open_page(TRAINING, runs="a,b,gone")
    assert parameter(app, "runs") == "a,b"
    first, second = chart(app, "curve_held_out_fvu")["data"]
    assert (first["name"], second["name"]) == ("a", "b")
    assert first["x"] == [1000, 2000, 3000]
    assert first["y"] == pytest.approx([0.25 + 2 / step for step in (10, 20, 30)])
    (dead, _) = chart(app, "curve_train_dead")["data"]
    assert (dead["x"], dead["y"]) == ([2000, 3000], [20, 30]), "not known at the first"
    assert "curve_train_penalty" not in [each.key for each in app.get("plotly_chart")]
    text = shown(app)
    assert "**a** · finished · 30 steps · FVU 0.3167 · L0 4.00" in text
    assert "again every 5 s" in text, "b goes on"
    # a further measurement is there at the next reading
    MetricsLog(folder / "runs" / "b" / "metrics.jsonl", resume_step=30).append(
        40, tokens=4000, train={}, held_out={"fvu": 0.5, "l0": 4.0}
    )
    app.run()
    assert chart(app, "curve_held_out_fvu")["data"][1]["y"][-1] == 0.5


def test_training_without_runs_or_measurements(folder: Path) -> None:
    app = open_page(TRAINING)
    assert "No training run is beside the stores" in app.info[0].value
    run = make_run(folder / "runs" / "a", finished=False)
    (run / "metrics.jsonl").write_text("")
    assert "Nothing has been measured yet" in open_page(TRAINING).info[0].value
    (run / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    app = open_page(TRAINING)
    assert "line 2 is damaged" in app.error[0].value
    assert not app.exception
