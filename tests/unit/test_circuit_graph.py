"""Attribution graphs: their files, Neuronpedia's JSON, pruning and scores against sums by hand."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae.circuits.files import load, save, to_dict
from sae.circuits.graph import EMBEDDING, ERROR, FEATURE, LOGIT, Graph
from sae.circuits.neuronpedia import to_neuronpedia
from sae.circuits.pruning import (
    completeness_score,
    cumulative,
    influence,
    normalised,
    prune,
    replacement_score,
    with_influence,
)
from saescope.artefact import ArtefactError
from saescope.errors import InputError


def graph(**fields: Any) -> Graph:
    """Token 0 -> feature 0 -> logit 0 and token 1 -> feature 1 -> logit 1, and an error beside.

    Nodes: features 0 and 1, error 2, tokens 3 and 4, logits 5 and 6.
    """
    adjacency = np.zeros((7, 7))
    adjacency[0, 3] = 2.0
    adjacency[1, [0, 4]] = [-1.0, 3.0]
    adjacency[5, [0, 1, 2]] = [6.0, 1.0, -1.0]
    adjacency[6, [1, 2]] = [-3.0, 1.0]
    given: dict[str, Any] = {
        "prompt": "a b", "token_ids": [7, 9], "tokens": ["a", " b"], "model": "tiny",
        "n_layers": 2, "sites": ["blocks.0.hook_mlp_in", "blocks.1.hook_mlp_in"],
        "saes": ["runs/0", "runs/1"], "method": "linear",
        "kind": [FEATURE, FEATURE, ERROR, EMBEDDING, EMBEDDING, LOGIT, LOGIT],
        "site": [0, 1, 1, -1, -1, -1, -1], "layer": [0, 1, 1, -1, -1, 2, 2],
        "position": [0, 1, 1, 0, 1, 1, 1], "number": [3, 5, -1, 7, 9, 11, 12],
        "activation": [2.0, 2.5, 1.0, 4.0, 5.0, 0.75, 0.25], "value": [2.5, 2.5, 0, 0, 0, 6, -2],
        "bias": [0.5, 0.5, 0, 0, 0, 0, 0], "weight": [0, 0, 0, 0, 0, 0.75, 0.25],
        "influence": np.zeros(7), "cumulative": np.ones(7), "adjacency": adjacency,
        "facts": {"logit_tokens": {"11": " yes", "12": " no"}},
    }  # fmt: skip
    return Graph(**{**given, **fields})


# by hand: logit 0 splits 6:1:1 and logit 1 3:1 over features 0 and 1 and the error; feature 1
# splits 1:3 over feature 0 and token 1; feature 0 has token 0 alone
TO_1 = 0.75 / 8 + 0.25 * 3 / 4
TO_0 = 0.75 * 6 / 8 + TO_1 / 4
INFLUENCE = [TO_0, TO_1, 0.75 / 8 + 0.25 / 4, TO_0, TO_1 * 3 / 4, 0, 0]


def test_influence_is_the_sum_of_all_walks() -> None:
    own = graph()
    shares = normalised(own.adjacency)
    assert influence(shares, own.weight) == pytest.approx(INFLUENCE, rel=1e-6)
    series = sum(np.linalg.matrix_power(shares.astype(float), n) for n in range(1, 7))
    assert influence(shares, own.weight) == pytest.approx(own.weight @ series, rel=1e-6)
    found = with_influence(own)
    assert found.influence == pytest.approx(INFLUENCE, rel=1e-6)
    order = np.argsort(-np.array(INFLUENCE), kind="stable")
    assert found.cumulative[order] == pytest.approx(
        np.cumsum(np.array(INFLUENCE)[order]) / sum(INFLUENCE), rel=1e-6
    )
    assert cumulative(np.zeros(2)).tolist() == [0, 0]


def test_scores_are_the_published_formulae() -> None:
    tokens, errors = INFLUENCE[3] + INFLUENCE[4], INFLUENCE[2]
    assert replacement_score(graph()) == pytest.approx(tokens / (tokens + errors), rel=1e-6)
    counted = np.array([*INFLUENCE[:5], 0.75, 0.25])
    explained = np.array([1, 1, 1, 1, 1, 7 / 8, 3 / 4])
    assert completeness_score(graph()) == pytest.approx(
        (counted * explained).sum() / counted.sum(), rel=1e-6
    )
    nothing = graph(adjacency=np.zeros((7, 7)), weight=np.zeros(7))
    assert np.isnan(replacement_score(nothing))
    assert np.isnan(completeness_score(nothing))


def test_edges_in_a_circle_are_refused() -> None:
    adjacency = graph().adjacency.copy()
    adjacency[0, 1] = 1
    with pytest.raises(InputError, match="round in a circle"):
        with_influence(graph(adjacency=adjacency))


def test_pruning_keeps_nodes_and_edges_by_their_share() -> None:
    # of the sum, features have .633 and .281, the error .156, tokens .633 and .211
    assert prune(graph(), nodes=1, edges=1).n_edges == graph().n_edges
    small = prune(graph(), nodes=0.6, edges=1)
    assert small.ids == ["0_3_0", "E_7_0", "E_9_1", "3_11_1", "3_12_1"]
    assert small.adjacency[3].tolist() == [6, 0, 0, 0, 0]
    assert small.adjacency[4].tolist() == [0, 0, 0, 0, 0]  # all that it got is gone
    assert small.influence == pytest.approx([TO_0, TO_0, TO_1 * 3 / 4, 0, 0], rel=1e-6)
    assert small.facts["node_threshold"] == 0.6
    # with all nodes the edges carry 0.5625, .09375, .09375 to logit 0, .1875, .0625 to logit 1,
    # .0703, .2109 to feature 1, .6328 to feature 0: 1.9141 in all; 80% are the four largest
    edges = prune(graph(), nodes=1, edges=0.8)
    assert sorted(zip(*(each.tolist() for each in edges.edges()[:2]), strict=True)) == [
        (0, 2), (1, 3), (4, 0), (5, 1)
    ]  # fmt: skip
    assert edges.ids[:2] == ["0_3_0", "1_5_1"]  # the error has no edge left, and is gone
    assert "error_1_1" not in edges.ids


def test_features_that_nothing_flows_into_are_left_out_in_turn() -> None:
    adjacency = graph().adjacency.copy()
    adjacency[0, 3] = 0  # feature 0 has nothing from anywhere, so 1's share of it goes too
    adjacency[1, 4] = 0
    small = prune(graph(adjacency=adjacency), nodes=1, edges=1)
    assert small.ids == ["error_1_1", "E_7_0", "E_9_1", "3_11_1", "3_12_1"]


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_shares_are_checked(share: float) -> None:
    with pytest.raises(InputError, match="nodes"):
        prune(graph(), nodes=share)


@pytest.mark.parametrize("name", ["g.npz", "g.json"])
def test_a_file_gives_the_same_graph_again(tmp_path: Path, name: str) -> None:
    own = graph(labels={"0_3_0": "animals"})
    path = save(own, tmp_path / name)
    assert to_dict(load(path)) == to_dict(own)
    assert load(path).adjacency.tolist() == own.adjacency.tolist()
    with pytest.raises(InputError, match="holds a graph already"):
        save(with_influence(own), path)
    save(with_influence(own), path, replace=True)
    assert load(path).influence == pytest.approx(INFLUENCE, rel=1e-6)


def test_what_is_no_graph_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ends in \.npz or \.json"):
        save(graph(), tmp_path / "graph.pt")
    with pytest.raises(ArtefactError):
        load(tmp_path / "missing.npz")
    for name in ("broken.npz", "broken.json"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 no graph")
        with pytest.raises(ArtefactError):
            load(tmp_path / name)
        with pytest.raises(InputError, match="something else than a graph"):
            save(graph(), tmp_path / name, replace=True)
    good = to_dict(graph())
    broken: list[tuple[dict, str]] = [
        ({"schema": 99}, "newer saescope"), ({"artefact": "sae"}, "no graph"),
        ({"source": [-1] * len(good["source"])}, "without an end"), ({"site": [0]}, "one entry"),
        ({"target": [99] * len(good["target"])}, "out of bounds"), ({"position": None}, "read"),
    ]  # fmt: skip
    for change, message in broken:
        (tmp_path / "g.json").write_text(json.dumps({**good, **change}))
        with pytest.raises((ArtefactError, InputError), match=message):
            load(tmp_path / "g.json")
    del good["value"]
    (tmp_path / "g.json").write_text(json.dumps(good))
    with pytest.raises(ArtefactError, match="lacks"):
        load(tmp_path / "g.json")


def test_no_pickle_is_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "g.npz", head=np.array([{"artefact": "circuit"}], dtype=object))
    with pytest.raises(ArtefactError, match="no graph that can be read"):
        load(tmp_path / "g.npz")


def test_wrong_arrays_are_said() -> None:
    own = graph()
    for change, message in (
        ({"layer": own.layer + 1}, "layer: out of range"),
        ({"site": own.site[:-1]}, "site: one entry a node"),
        ({"adjacency": np.zeros((2, 2))}, "a row and a column a node"),
        ({"value": np.full(7, np.nan)}, "value: is not finite"),
        ({"tokens": ["a"]}, "one text a token"),
        ({"saes": ["a"]}, "one name a site"),
    ):
        with pytest.raises(InputError, match=message):
            graph(**change)
    with pytest.raises(InputError, match="nodes"):
        own.subgraph([7])
    with pytest.raises(InputError, match="no such node"):
        own.labelled({"9_9_9": "x"})


def test_nodes_are_named_described_and_followed() -> None:
    own = graph(labels={"0_3_0": "animals"})
    assert own.ids == ["0_3_0", "1_5_1", "error_1_1", "E_7_0", "E_9_1", "3_11_1", "3_12_1"]
    assert own.describe(0) == "animals of blocks.0.hook_mlp_in at 'a' (0)"
    assert own.describe(2) == "error of blocks.1.hook_mlp_in at ' b' (1)"
    assert own.describe(4) == "token at ' b' (1)"
    assert own.describe(5) == "output ' yes' (p=0.750)"
    sources, weights = own.incoming(own.index("3_11_1"))
    assert (sources.tolist(), weights.tolist()) == ([0, 1, 2], [6, 1, -1])
    assert own.outgoing(1)[0].tolist() == [6, 5]
    assert own.nodes_of(FEATURE, LOGIT).tolist() == [0, 1, 5, 6]
    small = own.subgraph([5, 0])
    assert (small.ids, small.labels) == (["0_3_0", "3_11_1"], {"0_3_0": "animals"})
    assert small.adjacency.tolist() == [[0, 0], [6, 0]]
    # two SAEs in a block: their features are told apart by their sites
    sites = ["blocks.0.hook_attn_out", "blocks.0.hook_mlp_out"]
    both = replace(own, sites=sites, labels={})
    assert both.ids[:3] == ["0@hook_attn_out_3_0", "1@hook_mlp_out_5_1", "error_1@hook_mlp_out_1"]


def test_neuronpedia_gets_its_schema() -> None:
    own = with_influence(graph(labels={"0_3_0": "animals"}))
    made = to_neuronpedia(own, "a-b", pinned=["0_3_0"], supernodes={"both": ["0_3_0", "1_5_1"]})
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert made["metadata"]["prompt_tokens"] == ["a", " b"]
    assert made["metadata"]["scan"] == "tiny"
    assert made["qParams"]["pinnedIds"] == ["0_3_0"]
    assert made["qParams"]["supernodes"] == [["both", "0_3_0", "1_5_1"]]
    nodes = {node["node_id"]: node for node in made["nodes"]}
    assert len(nodes) == len(own)
    feature = nodes["1_5_1"]
    assert (feature["feature"], feature["layer"], feature["ctx_idx"]) == (6 * 7 // 2 + 5, "1", 1)
    assert feature["feature_type"] == "cross layer transcoder"
    assert feature["influence"] == pytest.approx(float(own.cumulative[1]))
    assert nodes["0_3_0"]["clerp"] == "animals"
    assert nodes["error_1_1"]["feature_type"] == "mlp reconstruction error"
    assert (nodes["E_9_1"]["layer"], nodes["E_9_1"]["feature"]) == ("E", 1)
    assert nodes["3_11_1"]["clerp"] == 'Output " yes" (p=0.750)'
    assert [nodes[n]["is_target_logit"] for n in ("3_11_1", "3_12_1")] == [True, False]
    assert {"source": "1_5_1", "target": "3_12_1", "weight": -3.0} in made["links"]
    assert len(made["links"]) == own.n_edges
    for slug, pinned in (("a b", []), ("", []), ("a", ["none"])):
        with pytest.raises(InputError):
            to_neuronpedia(own, slug, pinned=pinned)


def test_graphs_need_no_torch() -> None:
    code = (
        "import sys, sae.circuits.graph, sae.circuits.files, sae.circuits.pruning, "
        "sae.circuits.neuronpedia; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
