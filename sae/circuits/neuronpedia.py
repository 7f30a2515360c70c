"""A graph as the JSON that Neuronpedia's graph viewer and circuit-tracer's own read.

The schema is Neuronpedia's "attribution graph" 1: metadata, qParams (what is pinned and grouped),
nodes and links. The viewer's slider of pruning compares a node's `influence` with its threshold, so
that is the cumulative share of influence (`Graph.cumulative`). A feature's number there is the
Cantor pairing of layer and number, (l + n)(l + n + 1) / 2 + n.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sae.circuits.graph import EMBEDDING, ERROR, FEATURE, LOGIT, Graph
from saescope.errors import InputError

_TYPES = ("cross layer transcoder", "mlp reconstruction error", "embedding", "logit")
"""the viewer's words for the kinds of nodes; it draws features of any SAE as the first"""


def to_neuronpedia(
    graph: Graph,
    slug: str,
    *,
    scan: str | None = None,
    pinned: Sequence[str] = (),
    supernodes: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """A graph as Neuronpedia's JSON: give it a pruned one, since each edge is an object of it.

    Args:
        slug: what the graph is called in addresses: lower-case letters, digits, - and _.
        scan: Neuronpedia's name of the model, if not the graph's.
        pinned: names of nodes (`Graph.ids`) to show in the subgraph.
        supernodes: groups of nodes by what they are called.

    Raises InputError for another slug, or nodes that are not in the graph.

    >>> json.dumps(to_neuronpedia(graph, "two-plus-two"))                 # doctest: +SKIP
    """
    if not slug or not all(c.islower() or c.isdigit() or c in "-_" for c in slug):
        raise InputError(
            "is part of an address", where="slug", given=slug, allowed="a-z, 0-9, - and _"
        )
    groups = [[name, *nodes] for name, nodes in (supernodes or {}).items()]
    for node in (*pinned, *(node for group in groups for node in group[1:])):
        graph.index(node)
    target, source, weight = graph.edges()
    ids = graph.ids
    return {
        "metadata": {
            "slug": slug,
            "scan": scan or graph.model,
            "transcoder_list": list(graph.saes),
            "prompt_tokens": list(graph.tokens),
            "prompt": graph.prompt,
            **_pruning(graph),
            "schema_version": 1,
        },
        "qParams": {
            "pinnedIds": list(pinned),
            "supernodes": groups,
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": [_node(graph, index) for index in range(len(graph))],
        "links": [
            {"source": ids[s], "target": ids[t], "weight": float(w)}
            for t, s, w in zip(target.tolist(), source.tolist(), weight.tolist(), strict=True)
        ],
    }


def _pruning(graph: Graph) -> dict[str, Any]:
    """How a graph was pruned; nothing of one that was not, as the schema has no null there."""
    names = ("node_threshold", "edge_threshold")
    known = {name: float(graph.facts[name]) for name in names if graph.facts.get(name) is not None}
    if "node_threshold" not in known:
        return {}
    return {"node_threshold": known["node_threshold"], "pruning_settings": known}


def _node(graph: Graph, index: int) -> dict[str, Any]:
    kind, layer = int(graph.kind[index]), int(graph.layer[index])
    position, number = int(graph.position[index]), int(graph.number[index])
    name = graph.ids[index]
    common = {
        "node_id": name,
        "ctx_idx": position,
        "feature_type": _TYPES[kind],
        "token_prob": float(graph.activation[index]) if kind == LOGIT else 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "influence": float(graph.cumulative[index]),
        "activation": float(graph.activation[index]),
    }
    if kind == FEATURE:
        pair = (layer + number) * (layer + number + 1) // 2 + number
        shown = {"feature": pair, "layer": str(layer), "jsNodeId": f"{layer}_{number}-0"}
        return {**common, **shown, "clerp": graph.labels.get(name, "")}
    if kind == ERROR:
        shown = {"feature": -1, "layer": str(layer), "jsNodeId": f"{name}-0", "activation": None}
        return {**common, **shown, "clerp": graph.labels.get(name, "")}
    if kind == EMBEDDING:
        shown = {"feature": position, "layer": "E", "jsNodeId": f"E_{number}-{position}"}
        return {**common, **shown, "activation": None, "clerp": graph.labels.get(name, "")}
    text = graph.facts.get("logit_tokens", {}).get(str(number), str(number))
    return {
        **common,
        "feature": number,
        "layer": str(graph.n_layers + 1),
        "jsNodeId": f"L_{number}-{position}",
        "is_target_logit": index == int(graph.weight.argmax()),
        "activation": None,
        # the viewer reads the probability out of this text
        "clerp": f'Output "{text}" (p={float(graph.activation[index]):.3f})',
    }
