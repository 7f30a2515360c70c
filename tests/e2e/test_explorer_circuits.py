"""The explorer's Circuits page on a graph made by hand, without a browser."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from dashboards import find_stores, model_cache
from sae.circuits.files import save
from sae.circuits.pruning import prune, with_influence
from sae.circuits.subgraphs import Subgraph, load_subgraph, save_subgraph
from store import Annotations, FeatureStore
from store.machine_labels import MachineLabel
from tests.e2e.test_explorer import open_page, parameter, shown
from tests.hand_graphs import hand_graph
from tests.tiny_store import make_tiny_store

CIRCUITS = "circuits"
EARLY = ("0_3_1", "0_9_2")
PINNED = Subgraph(pinned=(*EARLY, "1_5_3", "1_11_3"), supernodes={"early": EARLY})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny store's folder, made once."""
    return make_tiny_store(tmp_path_factory.mktemp("made")).parent


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a store named tiny, of the graph's second site, and the graph."""
    shutil.copytree(made, tmp_path / "stores" / "tiny")
    (tmp_path / "graphs" / "more").mkdir(parents=True)
    save(with_influence(hand_graph()), tmp_path / "graphs" / "two.npz")
    monkeypatch.setenv(find_stores.STORES_VARIABLE, str(tmp_path / "stores"))
    yield tmp_path
    st.cache_resource.clear()
    st.cache_data.clear()


def drawn(app: AppTest) -> dict[str, Any]:
    """What the picture was given to draw."""
    (element,) = app.get("bidi_component")
    return json.loads(element.proto.json)


def press(app: AppTest, label: str) -> AppTest:
    (button,) = [b for b in app.button if b.label == label]
    button.click().run()
    assert not app.exception, app.exception
    return app


def words(app: AppTest) -> str:
    """All that the page says, without the escapes of Markdown."""
    said = [shown(app), *(each.value for each in (*app.info, *app.error))]
    return "\n".join(said).replace("\\", "")


def scores(app: AppTest) -> dict[str, tuple[str, str]]:
    return {each.label: (each.value, each.delta) for each in app.metric}


def test_without_a_graph_the_page_says_where_they_are_looked_for(project: Path) -> None:
    (project / "graphs" / "two.npz").rename(project / "two.npz")
    (project / "graphs" / "other.json").write_text("{}")
    app = open_page(CIRCUITS)
    assert str(project / "graphs") in words(app)
    assert not app.get("bidi_component")


def test_a_graph_is_pruned_scored_and_named(project: Path) -> None:
    with Annotations.open(project / "stores" / "tiny", sae_hash="5ae") as notes:
        notes.set_label(5, "my <b>label</b>")
        notes.set_machine_labels(
            [MachineLabel(feature=11, method="token", label="a machine's", score=0.9)]
        )
    app = open_page(CIRCUITS, graph="two.npz", keep="100", edges="100", node="1_5_3")
    data = drawn(app)
    names = {node["id"]: node["name"] for node in data["nodes"]}
    assert len(names) == 12
    assert names["1_5_3"] == "my <b>label</b>"
    assert names["1_11_3"] == "a machine's"
    assert names["0_3_1"] == "feature 3", "no store is of its SAE"
    urls = {node["id"]: node["url"] for node in data["nodes"]}
    assert urls["1_5_3"] == "feature?sae=tiny&feature=5"
    assert urls["0_3_1"] == urls["E_8_1"] == ""
    assert data["selected"] == "1_5_3"
    whole = scores(app)
    assert whole["Nodes"] == ("12", "of 12")
    assert whole["Links"] == ("10", "of 10")
    assert whole["Replacement score"][0] == "0.917"
    assert "all 0.917" in whole["Replacement score"][1]
    app.slider(key="circuits_keep").set_value(60).run()
    assert {node["id"] for node in drawn(app)["nodes"]} < set(names)
    pruned = scores(app)
    assert float(pruned["Replacement score"][0]) < 0.917
    assert "random" in pruned["Completeness score"][1]
    assert parameter(app, "keep") == "60"
    assert parameter(app, "node") == "1_5_3"


def test_a_link_says_it_all_and_what_is_wrong_with_it_is_said(project: Path) -> None:
    groups = json.dumps({"early": list(EARLY)})
    link = {"graph": "two.npz", "pinned": ",".join(PINNED.pinned), "supernodes": groups}
    app = open_page(CIRCUITS, **link)
    assert drawn(app)["pinned"] == list(PINNED.pinned)
    assert drawn(app)["subgraph"]["boxes"][0]["name"] == "early"
    assert parameter(app, "pinned") == link["pinned"]
    assert json.loads(parameter(app, "supernodes")) == {"early": list(EARLY)}
    bad = {"graph": "x", "keep": "1", "edges": "²", "node": "9_9_9", "pinned": "9_9_9"}
    app = open_page(CIRCUITS, **bad, supernodes="{", subgraph="../x")
    said = app.warning[0].value
    for name in (*bad, "supernodes", "subgraph"):
        assert name in said
    assert drawn(app)["pinned"] == []


def test_nodes_are_grouped_saved_and_opened_again(project: Path) -> None:
    file = project / "graphs" / "two.npz"
    app = open_page(CIRCUITS, pinned=",".join(PINNED.pinned))
    app.multiselect[0].set_value(list(EARLY))
    press(app, "Group")
    assert "nodes, and type a name" in app.warning[0].value
    app.multiselect[0].set_value(list(EARLY))
    next(t for t in app.text_input if t.label == "under the name").set_value("early")
    press(app, "Group")
    boxes = drawn(app)["subgraph"]["boxes"]
    assert [box["members"] for box in boxes] == [list(EARLY), ["1_5_3"], ["1_11_3"]]
    name = next(t for t in app.text_input if t.label == "Save what is pinned as")
    name.set_value("No Name")
    press(app, "Save")
    assert "part of a file's name" in words(app)
    next(t for t in app.text_input if t.label == "Save what is pinned as").set_value("first")
    press(app, "Save")
    assert load_subgraph(file, "first") == PINNED
    assert parameter(app, "subgraph") == "first"
    assert "pinned" not in app.query_params
    save_subgraph(Subgraph(pinned=("3_20_3",)), file, "other")
    app = open_page(CIRCUITS, subgraph="first")
    assert drawn(app)["pinned"] == list(PINNED.pinned)
    press(app, "Ungroup")
    assert "subgraph" not in app.query_params, "it is not the saved one any more"
    app.selectbox[-1].set_value("other")
    press(app, "Open")
    assert drawn(app)["pinned"] == ["3_20_3"]
    save_subgraph(Subgraph(pinned=("8_8_8",)), file, "of-another")
    app = open_page(CIRCUITS, subgraph="of-another")
    assert "subgraph" in app.warning[0].value, "it names nodes that are not there"


def test_what_is_pinned_leads_to_the_steer_page(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = open_page(CIRCUITS, pinned=",".join([*PINNED.pinned, "3_20_3"]))
    said = words(app)
    for word in (
        "feature 3 · blocks.0.hook_resid_post",
        "no store beside these is of its SAE",
        "only features can be steered",
        "does not say which model and SAE made it",
    ):
        assert word in said
    assert not [x for x in app.get("page_link") if "Steer" in x.proto.label]
    monkeypatch.setattr(model_cache, "origin_of", lambda _: None)
    app = open_page(CIRCUITS, pinned=",".join(PINNED.pinned))

    def edits() -> str:
        (link,) = [x for x in app.get("page_link") if "Steer" in x.proto.label]
        assert link.proto.label == "Steer 2 features of tiny"
        found = parse_qs(link.proto.query_string)
        assert found["prompt"] == [hand_graph().prompt]
        assert found["sae"] == ["tiny"]
        return found["edits"][0]

    assert edits() == "ablate:5,ablate:11"
    with FeatureStore.open(project / "stores" / "tiny") as store:
        strongest = [store.feature(number).max for number in (5, 11)]
    for way, wanted in (
        ("scale", "scale:5:2,scale:11:2"),
        ("add", ",".join(f"add:{f}:{m:g}" for f, m in zip((5, 11), strongest, strict=True))),
    ):
        app.button_group(key="circuits_way").set_value(way).run()
        assert edits() == wanted


def test_the_store_is_the_one_whose_hash_the_graph_records(project: Path) -> None:
    for hashes, url in ((["", "5ae"], "feature?sae=tiny&feature=5"), (["", "other"], "")):
        facts = {"sae_hashes": hashes}
        graph = with_influence(hand_graph(facts=facts, saes=["a", "b"]))
        save(graph, project / "graphs" / "two.npz", replace=True)
        data = drawn(open_page(CIRCUITS, keep="100"))
        assert {node["id"]: node["url"] for node in data["nodes"]}["1_5_3"] == url


def test_what_a_graph_is_not_is_said(project: Path) -> None:
    """A pruned one has no scores of the whole; links of one by gradients are estimates."""
    pruned = prune(with_influence(hand_graph()), nodes=0.7)
    pruned.facts["scores"] = {"replacement": 0.1234, "completeness": 0.5}
    save(pruned, project / "graphs" / "pruned.json")
    app = open_page(CIRCUITS, graph="pruned.json")
    assert "pruned, to 70% of the influence, before it was written" in words(app)
    assert "replacement 0.1234, completeness 0.5" in words(app)
    assert app.slider(key="circuits_keep").value == 100, "not pruned twice"
    assert "straight from the source" in words(app)
    save(hand_graph(method="gradient", influence=range(12)), project / "graphs" / "by.json")
    said = words(open_page(CIRCUITS, graph="by.json"))
    assert "straight from the source" not in said
    assert "gradient times activation" in said
