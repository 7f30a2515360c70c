"""The picture of an attribution graph, its sums, scores and files, against what is on paper."""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dashboards.circuits.drawing import MOST_NODES, Texts, groups_drawn, layout, node_name, picture
from dashboards.circuits.export import neuronpedia, page, slug
from dashboards.circuits.saved import with_nodes
from sae.circuits.graph import ERROR, FEATURE
from sae.circuits.pruning import completeness_score, prune, replacement_score, with_influence
from sae.circuits.subgraphs import (
    KeptScores,
    Scores,
    Subgraph,
    load_subgraph,
    save_subgraph,
    saved_subgraphs,
    subgraph_file,
    summed,
)
from saescope.errors import ArtefactError, InputError
from tests.hand_graphs import hand_graph

EARLY = ("0_3_1", "0_9_2")
PINNED = Subgraph(pinned=(*EARLY, "1_5_3", "3_20_3"), supernodes={"early": EARLY})


def test_layers_by_tokens() -> None:
    graph = with_influence(hand_graph())
    found = layout(graph)
    assert found.columns == [1, 1, 1, 3], "as wide as the fullest cell: two features and an error"
    assert found.rows == [("output", 1), ("L1", 1), ("L0", 1), ("tokens", 1)]
    assert found.row == [2, 2, 2, 1, 1, 1, 3, 3, 3, 3, 0, 0]
    # feature 5 has more influence than 11; the error stands last
    assert found.slot == [0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 1]
    several = ["blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"]
    assert [name for name, _ in layout(hand_graph(sites=several)).rows[1:3]] == [
        "L1 mlp_out",
        "L1 attn_out",
    ]


def test_a_full_cell_goes_into_further_lines() -> None:
    graph = hand_graph(position=[3] * 12, influence=np.arange(12))
    found = layout(graph)
    assert found.columns == [1, 1, 1, 4], "four tokens side by side"
    many = hand_graph(
        position=[3] * 12, kind=[FEATURE] * 9 + [ERROR] * 3, site=[0] * 12, layer=[0] * 12,
        influence=np.arange(12),
    )  # fmt: skip
    found = layout(many)
    assert found.columns[3] == 6
    assert found.rows == [("L0", 2)]
    assert (found.slot[8], found.line[8]) == (0, 0), "the most influential feature is first"
    assert (found.slot[0], found.line[0]) == (2, 1)
    assert (found.slot[11], found.line[11]) == (3, 1), "errors come after all features"


def test_links_of_supernodes_are_sums() -> None:
    found = summed(hand_graph(), PINNED.groups())
    # early, feature 5, output 0: -1 + 2 into feature 5, and that's 6 into the output
    assert found.tolist() == [[0, 0, 0], [1, 0, 0], [0, 6, 0]]
    inner = Subgraph(pinned=("0_3_1", "1_5_3"), supernodes={"all": ("0_3_1", "1_5_3")})
    assert not summed(hand_graph(), inner.groups()).any(), "a group's own links are within it"
    drawn = groups_drawn(hand_graph(), PINNED, {name: name for name in hand_graph().ids})
    assert drawn is not None
    assert [(box["name"], box["kind"], box["level"]) for box in drawn["boxes"]] == [
        ("early", "supernode", 2),
        ("1_5_3", "feature", 1),
        ("3_20_3", "logit", 0),
    ]
    assert drawn["links"] == [
        {"source": 0, "target": 1, "weight": 1.0},
        {"source": 1, "target": 2, "weight": 6.0},
    ]
    with pytest.raises(InputError, match="no such node"):
        summed(hand_graph(), {"x": ("9_9_9",)})


def test_scores_of_what_is_kept() -> None:
    graph = hand_graph()
    scores = KeptScores(graph)
    full = scores.of(np.ones(len(graph), bool))
    assert full.replacement == pytest.approx(replacement_score(graph), rel=1e-6)
    assert full.completeness == pytest.approx(completeness_score(graph), rel=1e-6)
    # with features 5 and 3 (of token 1) alone: output 0 splits 6:2:1 over features 5, 11 and the
    # error, feature 5 1:2 over features 3 and 9; output 1 has feature 3 of token 3, left out
    keep = np.isin(graph.ids, ["1_5_3", "0_3_1"])
    to_5, to_3 = 0.75 * 6 / 9, 0.75 * 6 / 9 / 3
    lost = 0.75 * 3 / 9 + to_5 * 2 / 3 + 0.25
    counted = [0.75, 0.25, to_5, to_3, to_3, lost]  # outputs, features, token 1, what is left out
    found = scores.of(keep)
    assert found.replacement == pytest.approx(to_3 / (to_3 + lost), rel=1e-6)
    assert found.completeness == pytest.approx(1 - lost / sum(counted), rel=1e-6)
    drawn = scores.of_random(keep, draws=3)
    assert len(drawn) == 3
    assert scores.of_random(keep, draws=3) == drawn, "the same draws again"
    assert scores.of_random(np.ones(12, bool), draws=1) == [full], "as many features as are kept"
    nothing = KeptScores(hand_graph(adjacency=np.zeros((12, 12)))).of(keep)
    assert isinstance(nothing, Scores)
    assert np.isnan([nothing.replacement, nothing.completeness]).all()


def test_what_is_pinned_is_kept_with_its_links() -> None:
    whole = with_influence(hand_graph())
    pruned = prune(whole, nodes=0.3)
    assert "0_3_3" not in pruned.ids
    found = with_nodes(pruned, whole, ("0_3_3", "1_5_3"))
    assert set(found.ids) == {*pruned.ids, "0_3_3", "1_5_3"}
    sources, weights = found.incoming(found.index("0_3_3"))
    assert [found.ids[node] for node in sources] == ["E_10_3"]
    assert weights.tolist() == [1]
    assert with_nodes(pruned, whole, ("E_10_3",)) is pruned
    with pytest.raises(InputError, match="no such node"):
        with_nodes(pruned, whole, ("7_7_7",))


def test_what_the_picture_is_given() -> None:
    whole = with_influence(hand_graph())
    kept = whole.subgraph([i for i in range(12) if i != 4])  # feature 11 is pruned
    texts = Texts({"1_5_3": "sea\n<b>", "0_9_2": "of the store"}, {"1_5_3": "feature?feature=5"})
    data = picture(kept, texts, whole=whole, subgraph=PINNED, selected="1_5_3")
    by_id = {node["id"]: node for node in data["nodes"]}
    assert by_id["1_5_3"]["name"] == "sea↵<b>"
    assert by_id["1_5_3"]["url"] == "feature?feature=5"
    assert by_id["0_9_2"]["name"] == "line <end> & more", "the graph's own label goes first"
    assert by_id["0_3_1"]["name"] == "feature 3"
    assert by_id["3_20_3"]["name"] == "“ <b>yes</b>” 75 %"
    assert [column["text"] for column in data["columns"]] == [
        "<|begin|>", "</script><b>x</b>", "↵", " �",
    ]  # fmt: skip
    links = list(zip(*data["links"].values(), strict=True))
    names = [node["id"] for node in data["nodes"]]
    named = {(names[s], names[t]): (weight, share) for s, t, weight, share in links}
    assert len(links) == 8
    # of the whole graph's 6, 2 and -1 into output 0
    assert named[("1_5_3", "3_20_3")] == (6.0, pytest.approx(6 / 9, rel=1e-3))
    assert links[0][:2] == (names.index("1_5_3"), names.index("3_20_3")), "carries most"
    assert data["selected"] == "1_5_3"
    assert data["left_out"] == {"nodes": 0, "links": 0}
    assert picture(kept, texts, selected="1_11_3")["selected"] is None
    assert picture(kept, texts)["subgraph"] is None
    json.dumps(data, allow_nan=False)


def test_a_difference_of_two_logits_has_no_probability_of_its_own() -> None:
    facts = {"logit_tokens": {"20": " he -  she", "21": " no"}, "outputs": [[20, 25], 21]}
    found = picture(hand_graph(facts=facts), Texts())
    by_id = {each["id"]: each for each in found["nodes"]}
    assert by_id["3_20_3"]["name"] == "“ he -  she”"
    said = "difference of logits +7.000 · probability of the first 75 %"
    assert by_id["3_20_3"]["facts"] == said
    assert by_id["3_21_3"]["name"] == "“ no” 25 %"


def test_graphs_by_gradients_have_effects_of_either_sign() -> None:
    effects = [0.1, 0.2, 0.1, -0.3, 0.2, 0.1, 0, 0, 0, 0, 0, 0]
    graph = hand_graph(method="gradient", influence=effects)
    assert layout(graph).slot[3:6] == [0, 1, 2], "the largest effect first, whatever its sign"
    (node,) = [each for each in picture(graph, Texts())["nodes"] if each["id"] == "1_5_3"]
    assert node["size"] == 1
    said = "activation 1.500 · effect on the outputs -0.300 · 30 % of the effects, by size, of all"
    assert node["facts"].startswith(said)
    assert "effect" not in picture(hand_graph(), Texts())["nodes"][3]["facts"]


def test_a_strangers_graph_may_have_odd_facts() -> None:
    odd: dict[str, Any] = {"facts": {"logit_tokens": ["x"]}, "labels": {"0_9_2": 7}}
    names = {each["id"]: each["name"] for each in picture(hand_graph(**odd), Texts())["nodes"]}
    assert names["3_20_3"] == "“20” 75 %"
    assert names["0_9_2"] == "7"


def test_of_too_many_nodes_the_least_are_not_drawn() -> None:
    count = MOST_NODES + 10
    kind = [FEATURE] * (count - 2) + [2, 3]
    graph = hand_graph(
        kind=kind, site=[0] * (count - 2) + [-1, -1], layer=[0] * (count - 2) + [-1, 2],
        position=[1] * count, number=np.arange(count), activation=np.ones(count),
        value=np.zeros(count), bias=np.zeros(count), weight=[0] * (count - 1) + [1],
        influence=np.r_[np.arange(count - 2), 0, 0], cumulative=np.ones(count),
        adjacency=np.zeros((count, count)), labels={},
    )  # fmt: skip
    data = picture(graph, Texts(), subgraph=Subgraph(pinned=("0_3_1",)))
    assert data["left_out"] == {"nodes": 10, "links": 0}
    ids = {node["id"] for node in data["nodes"]}
    assert {"0_3_1", graph.ids[-1], graph.ids[-2]} <= ids, "what is pinned, tokens and outputs"
    assert "0_4_1" not in ids


def test_subgraphs_are_kept_beside_their_graph(tmp_path: Path) -> None:
    file = tmp_path / "two.npz"
    assert saved_subgraphs(file) == []
    path = save_subgraph(PINNED, file, "early-ones")
    assert path == tmp_path / "two.npz.early-ones.subgraph.json"
    assert load_subgraph(file, "early-ones") == PINNED
    assert saved_subgraphs(file) == ["early-ones"]
    assert saved_subgraphs(tmp_path / "other.npz") == []
    with pytest.raises(InputError, match="holds a subgraph already"):
        save_subgraph(Subgraph(), file, "early-ones")
    save_subgraph(Subgraph(), file, "early-ones", replace=True)
    assert load_subgraph(file, "early-ones") == Subgraph()
    for name in ("", "../x", "A b", "x" * 61, "-x"):
        with pytest.raises(InputError, match="part of a file's name"):
            subgraph_file(file, name)
    path.write_text('{"artefact": "something"}')
    with pytest.raises(ArtefactError, match="no subgraph"):
        load_subgraph(file, "early-ones")
    path.write_text(json.dumps({"artefact": "circuit subgraph", "schema": 1, "pinned": "x"}))
    with pytest.raises(ArtefactError, match="no list of nodes"):
        load_subgraph(file, "early-ones")
    path.write_text("mine")
    with pytest.raises(InputError, match="never replaced"):
        save_subgraph(PINNED, file, "early-ones", replace=True)


@pytest.mark.parametrize(
    ("pinned", "groups", "said"),
    [
        (("a", "a"), {}, "twice"),
        (("a",), {"x": ("b",)}, "not pinned"),
        (("a",), {"x": ("a",), "y": ("a",)}, "two supernodes"),
        (("a",), {" ": ("a",)}, "a name and a node"),
        (("a",), {"x": ()}, "a name and a node"),
    ],
)
def test_what_cannot_be_a_subgraph(
    pinned: tuple[str, ...], groups: dict[str, tuple[str, ...]], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        Subgraph(pinned=pinned, supernodes=groups)


def test_the_page_lets_nothing_in_and_runs_its_own_script_alone() -> None:
    texts = Texts({"1_5_3": "</script><img src=x onerror=alert(1)>"}, {"1_5_3": "feature?x=1"})
    text = page(with_influence(hand_graph()), texts, PINNED)
    assert text.count("</script>") == 2, "the data's and the script's, none of a token's"
    assert "<img" not in text
    assert "feature?x=1" not in text, "no link to an explorer that is not there"
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    (script,) = re.findall(r'<script type="module">(.*?)</script>', text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy
    assert "export default" not in script
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    (data,) = re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)
    found = {node["id"]: node for node in json.loads(data)["nodes"]}
    assert found["1_5_3"]["name"] == "</script><img src=x onerror=alert(1)>"
    assert found["E_8_1"]["reach"] == 0, "tokens and outputs are there at any share"
    assert 0 < found["0_9_2"]["reach"] <= 1


def test_neuronpedias_json_has_every_label() -> None:
    graph = with_influence(hand_graph())
    found = neuronpedia(graph, "Two + two.npz", Texts({"1_5_3": "sea"}), PINNED)
    assert found["metadata"]["slug"] == slug("Two + two.npz") == "two-two"
    labels = {node["node_id"]: node["clerp"] for node in found["nodes"]}
    assert labels["1_5_3"] == "sea"
    assert labels["0_9_2"] == "line <end> & more"
    assert labels["E_8_1"] == "Emb: “</script><b>x</b>”"
    assert labels["error_1_3"] == "Err: “ �”"
    assert labels["3_20_3"].startswith('Output " <b>yes</b>" (p=0.75')
    assert labels["0_3_1"] == "", "nobody calls it anything"
    assert found["qParams"]["pinnedIds"] == list(PINNED.pinned)
    assert found["qParams"]["supernodes"] == [["early", *EARLY]]
    assert node_name(graph, graph.index("0_3_1"), Texts()) == "feature 3"
