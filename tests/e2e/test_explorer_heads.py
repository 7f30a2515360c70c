"""The explorer's page about attention heads, in every state."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from benchmarks.attention import page_lines, rows
from dashboards import find_stores, head_figures
from sae.analysis.attention.results_file import ATTENTION_FILE
from saescope.artefact import write_json
from saescope.seals import sealed
from tests.e2e.test_explorer import links, open_page, parameter, shown
from tests.tiny_store import META, make_tiny_store

HEADS, Z = "heads", "blocks.1.attn.hook_z"
NAMES = ("induction", "local", "middle", "long-range", "mixed")


def curve(effect: float, verdict: str) -> dict[str, Any]:
    return {
        "lengths": [1, 2], "repeated": [0.1, 0.1 + effect], "shuffled": [0.1, 0.1],
        "effect": [0.0, effect], "half_width": [0.01, 0.02],
        "half_length": None if verdict == "none" else 2, "verdict": verdict,
    }  # fmt: skip


def head(number: int, features: int, induction: float) -> dict[str, Any]:
    shares = dict.fromkeys(NAMES, 0.0) | {"induction": induction, "local": 1 - induction}
    named = features > 0
    return {
        "layer": 1, "head": number, "features": features, "top": [3, 2],
        "shares": shares if named else {},
        "intervals": {name: [s / 2, (1 + s) / 2] for name, s in shares.items()} if named else {},
        "random": {"induction": 0.05, "local": 0.95} if named else {},
        "effective": 1.75 if named else None,
        "effective_interval": [1.5, 2.0] if named else None,
        "others": [2.25, 3.0] if named else None,
    }  # fmt: skip


def measured(**changes: Any) -> dict[str, Any]:
    share = {name: [0.125, 0.25, 0.5] for name in ("first", *NAMES[:4])}
    return {
        "kind": "attention", "schema": 1, "sae_hash": META["sae_hash"], "site": Z, "layer": 1,
        "protocol": {"texts": 16, "tokens": 1234, "least": 10, "seed": 0},
        "random_top_share": 0.3, "outside": 0.0, "unique": True,
        "heads": [head(0, 1, 0.25), head(1, 2, 0.75), head(2, 0, 0.0)],
        "features": {
            "feature": [1, 2, 3], "head": [0, 1, 1], "head_share": [0.5, 0.4, 0.9],
            "firings": [10, 20, 30], "family": ["local", "induction", "mixed"],
            "random_family": ["local", "local", "middle"], "read_token": [5, 6, 7],
            "shares": share, "random_shares": {n: [0.1, 0.2, 0.3] for n in share},
        },
        "prefix": [
            {"chosen": "induction", "feature": 2, "next_token": 6, "text": " <b>",
             "activation": curve(4.5, "short-prefix"), "log_prob": curve(1.0, "none")},
            {"chosen": "other", "feature": 1, "next_token": 5, "text": " x",
             "activation": curve(0.0, "none"), "log_prob": curve(0.0, "none")},
        ],
        "prefix_heads": [
            {"head": n, **curve(e, v)}
            for n, (e, v) in enumerate([(0.0, "none"), (0.625, "long-prefix"), (0.0, "none")])
        ],
        **changes,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run's folder with what was measured, and a store of its SAE."""
    folder = tmp_path / "runs" / "mine"
    (folder / "sae").mkdir(parents=True)
    (folder / "metrics.jsonl").touch()
    write_json(folder / ATTENTION_FILE, sealed(measured()))
    monkeypatch.setitem(META, "site", Z)
    monkeypatch.setitem(META, "sae_path", str(folder / "sae"))
    make_tiny_store(tmp_path / "stores")
    monkeypatch.setenv(find_stores.STORES_VARIABLE, str(tmp_path / "stores"))
    yield folder
    st.cache_resource.clear()
    st.cache_data.clear()


def numbers(app: AppTest) -> dict[str, str]:
    return {metric.label: metric.value for metric in app.metric}


def chart(app: AppTest, key: str) -> dict[str, Any]:
    (found,) = [each for each in app.get("plotly_chart") if each.key == key]
    return json.loads(found.proto.spec)


def test_the_head_with_most_features_beside_its_nulls(run: Path) -> None:
    app = open_page(HEADS)
    assert "Layer 1, blocks" in shown(app)
    assert "16 texts" in shown(app)
    every, own, tests = (each.value for each in app.dataframe)
    assert every["head"].tolist() == [0, 1, 2]
    assert every["induction"].tolist() == ["25% [12, 62] · 5%", "75% [38, 88] · 5%", ""]
    assert every["families"].tolist() == ["1.75 (2.25 to 3.00)"] * 2 + [""]
    assert every["repeats"].tolist() == ["none", "long-prefix", "none"]
    assert parameter(app, "head") == "1"
    assert numbers(app) == {
        "features": "2",
        "effective families": "1.75",
        "on repeats": "long-prefix",
        "attention above null": "0.62 ± 0.02",
    }
    assert own["feature"].tolist() == [3, 2]
    assert own["null"].tolist() == [0.3, 0.2]
    bars, marks = chart(app, "heads_families_1")["data"]
    assert bars["y"][:2] == [75.0, 25.0]
    assert bars["error_y"]["array"][0] == pytest.approx(12.5)
    assert bars["error_y"]["arrayminus"][0] == pytest.approx(37.5)
    assert marks["y"][:2] == [5.0, 95.0]
    shuffled, repeated = chart(app, "heads_repeats_1")["data"]
    assert repeated["y"] == [0.1, 0.725]
    assert shuffled["y"] == [0.1, 0.1]
    assert tests["feature"].tolist() == [2, 1]
    assert tests["effect"].tolist() == [4.5, 0.0]
    assert tests["before"].tolist()[0] == " <b>"
    assert any("feature=2" in query for _, query in links(app))


def test_another_head_by_choice_and_by_address(run: Path) -> None:
    app = open_page(HEADS)
    (box,) = [each for each in app.selectbox if each.label == "Head"]
    box.set_value(0).run()
    assert numbers(app)["features"] == "1"
    assert parameter(app, "head") == "0"
    app = open_page(HEADS, head="2")
    assert numbers(app)["effective families"] == "none"
    assert "No feature has most of its decoder in this head" in app.info[0].value
    app = open_page(HEADS, head="7")
    assert "head" in app.warning[0].value
    assert numbers(app)["features"] == "2"


def test_states_without_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run / ATTENTION_FILE
    write_json(path, sealed(measured(sae_hash="another")))
    assert "about another SAE" in open_page(HEADS).error[0].value
    write_json(path, {**sealed(measured()), "layer": 2})
    app = open_page(HEADS)
    assert "does not match its own sha256" in app.error[0].value
    path.unlink()
    app = open_page(HEADS)
    assert "have not been measured" in app.info[0].value
    assert f"saescope attention {run}" in app.code[0].value


def test_an_sae_elsewhere_has_no_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_store(tmp_path / "stores")
    monkeypatch.setenv(find_stores.STORES_VARIABLE, str(tmp_path / "stores"))
    app = open_page(HEADS)
    assert "Attention heads have features" in app.info[0].value
    assert not app.metric
    st.cache_resource.clear()
    st.cache_data.clear()


def test_the_reports_tables() -> None:
    made = [
        {"site": Z, "sae_hash": "a", "texts": "16", "tokens": "1234", "seed": "0",
         "date": "2026-01-02T03", "threads": "1", "null_to": "", "features": "", **row}
        for row in rows(measured())
    ]  # fmt: skip
    lines = page_lines(made)
    assert lines[0] == f"`{Z}`: 16 texts, 1,234 tokens, seed 0; 2026-01-02, 1 thread(s)."
    assert "| 1.1 | 2 | 75 [38, 88], null 5 | 25 [12, 62], null 95 |" in "\n".join(lines)
    assert "1.75 [1.5, 2], null 2.25 to 3 |" in "\n".join(lines)
    assert "| 1.1 | 0.1 ± 0.01 (null 0.1) | 0.725 ± 0.02 (null 0.1) |" in lines
    assert (
        "| 2 (induction) before ' <b>' | 0.1 ± 0.01 (null 0.1) | 4.6 ± 0.02 (null 0.1) |" in lines
    )
    assert not [line for line in lines if line.startswith("| 1.2 | 0 ")]
    table = head_figures.tests_of_features(measured())
    assert table["null"].tolist() == [0.1, 0.1]
