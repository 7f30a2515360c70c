"""Graphs for Neuronpedia against the rules of its JSON schema of attribution graphs, 1.0.0.

The rules are those of apps/webapp/app/api/graph/graph-schema.json of hijohnnylin/neuronpedia, as
read in November 2026: which keys there must be, and of what types those are that may be.
"""

import json
from typing import Any

import pytest

from sae.circuits.neuronpedia import to_neuronpedia
from sae.circuits.pruning import prune, with_influence
from tests.hand_graphs import hand_graph

TEXT, WHOLE, NUMBER, NOTHING = (str,), (int,), (int, float), (type(None),)
REQUIRED: dict[str, dict[str, tuple[type, ...]]] = {
    "metadata": {"slug": TEXT, "scan": TEXT, "prompt_tokens": (list,), "prompt": TEXT},
    "qParams": {},
    "nodes": {
        "node_id": TEXT, "feature": WHOLE + NOTHING, "layer": TEXT + WHOLE, "ctx_idx": WHOLE,
        "feature_type": TEXT, "jsNodeId": TEXT, "clerp": TEXT,
    },
    "links": {"source": TEXT, "target": TEXT, "weight": NUMBER},
}  # fmt: skip
ALLOWED: dict[str, dict[str, tuple[type, ...]]] = {
    "metadata": {
        "node_threshold": NUMBER, "feature_details": (dict,), "info": (dict,),
        "generation_settings": (dict,), "pruning_settings": (dict,),
    },
    "qParams": {
        "pinnedIds": (list,), "supernodes": (list,), "linkType": TEXT, "clickedId": TEXT,
        "sg_pos": TEXT,
    },
    "nodes": {"influence": NUMBER + NOTHING, "activation": NUMBER + NOTHING},
    "links": {},
}  # fmt: skip


def faults(graph: Any) -> list[str]:
    """What of a graph is against the rules."""
    found = []
    for part, required in REQUIRED.items():
        entries = graph[part] if part in ("nodes", "links") else [graph[part]]
        for entry in entries:
            found += [f"{part} lacks {name}" for name in required if name not in entry]
            for name, types in {**required, **ALLOWED[part]}.items():
                value = entry.get(name, ...)
                if value is not ... and (not isinstance(value, types) or isinstance(value, bool)):
                    found.append(f"{part}.{name}: {value!r}")
    metadata, asked = graph["metadata"], graph["qParams"]
    texts = [*metadata["prompt_tokens"], *asked.get("pinnedIds", [])]
    found += [f"{each!r} is no text" for each in texts if not isinstance(each, str)]
    for name in ("node_threshold", "edge_threshold"):
        value = metadata.get("pruning_settings", {}).get(name, 0)
        if not isinstance(value, int | float):
            found.append(f"pruning_settings.{name}: {value!r}")
    return found


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("method", ["linear", "gradient"])
def test_every_graph_keeps_to_the_schema(pruned: bool, method: str) -> None:
    whole = with_influence(hand_graph(method=method))
    if pruned:
        whole = prune(whole, nodes=0.9, edges=0.95)
    made = to_neuronpedia(whole, "a-graph", pinned=["1_5_3"], supernodes={"two": ["1_5_3"]})
    read = json.loads(json.dumps(made, allow_nan=False))
    assert faults(read) == []
    metadata = read["metadata"]
    if pruned:
        assert metadata["node_threshold"] == 0.9
        assert metadata["pruning_settings"] == {"node_threshold": 0.9, "edge_threshold": 0.95}
    else:  # there is no null there in the schema
        assert "node_threshold" not in metadata
    names = [node["node_id"] for node in read["nodes"]]
    assert len(set(names)) == len(names) == len(whole)
    assert {end for link in read["links"] for end in (link["source"], link["target"])} <= set(names)


def test_the_rules_find_faults() -> None:
    made: Any = to_neuronpedia(with_influence(hand_graph()), "a-graph")
    made["metadata"]["node_threshold"] = None
    made["nodes"][0]["layer"] = 1.5
    made["nodes"][1]["ctx_idx"] = True
    del made["links"][0]["weight"]
    assert len(faults(made)) == 4
