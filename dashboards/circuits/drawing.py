"""An attribution graph as a picture: layers by tokens, links on hovering, nodes that are pinned.

What is drawn is chosen here; drawing.js draws it, in the explorer and in a page of its own.
It gets texts and numbers alone, and makes text nodes of them, so no token can become markup.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st
from streamlit.components.v2 import component

from dashboards.amounts import amount
from dashboards.tokens import plain_visible, shortened
from sae.circuits.graph import EMBEDDING, ERROR, FEATURE, KINDS, LOGIT, Graph
from sae.circuits.pruning import normalised
from sae.circuits.subgraphs import Subgraph, summed

_HERE = Path(__file__).parent
MOST_NODES, MOST_LINKS = 1500, 30_000
"""that are drawn: a browser is slow with more"""
ACROSS = 6
"""nodes side by side at one layer and token; more go into further lines"""
LINEAR = "linear"
"""the method by which edges are exact, and nodes have an influence; by others, estimates"""
_LONGEST_NAME = 120
_FIGURES = 4


@dataclass(frozen=True)
class Layout:
    """Where nodes are drawn: columns of tokens, rows of sites, from the outputs down to the tokens.

    A column is as many slots wide, and a row as many lines high, as its fullest cell needs.
    """

    columns: list[int]
    """slots of each position's column"""
    rows: list[tuple[str, int]]
    """name and lines of each row, from the top"""
    row: list[int]
    """of each node"""
    slot: list[int]
    line: list[int]


@dataclass(frozen=True)
class Texts:
    """What nodes are called, by their names in the graph, and where their features' pages are."""

    labels: Mapping[str, str] = field(default_factory=dict)
    """of people, models or a feature's tokens; nodes without one go by their numbers"""
    urls: Mapping[str, str] = field(default_factory=dict)


def layout(graph: Graph) -> Layout:
    """Nodes by rows and columns; the most influential first in each cell, errors behind features.

    A row is a site: a block has several where several of its sites have SAEs.
    """
    # rows: -1 the tokens, then sites in the model's order, then the outputs
    kind, n_sites = graph.kind, len(graph.sites)
    height = np.where(kind == EMBEDDING, -1, np.where(kind == LOGIT, n_sites, graph.site))
    used = sorted({int(each) for each in height}, reverse=True)
    row = [used.index(int(each)) for each in height]
    # an effect, which graphs by gradients have in its place, may be negative
    order = np.lexsort((-np.abs(graph.influence), kind == ERROR))
    cells: dict[tuple[int, int], list[int]] = {}
    for node in order.tolist():
        cells.setdefault((row[node], int(graph.position[node])), []).append(node)
    columns = [1] * len(graph.tokens)
    for (_, position), nodes in cells.items():
        columns[position] = max(columns[position], min(len(nodes), ACROSS))
    slot, line, lines = [0] * len(graph), [0] * len(graph), [1] * len(used)
    for (level, position), nodes in cells.items():
        for index, node in enumerate(nodes):
            line[node], slot[node] = divmod(index, columns[position])
            lines[level] = max(lines[level], line[node] + 1)
    names = [_row_name(graph, each) for each in used]
    return Layout(columns, list(zip(names, lines, strict=True)), row, slot, line)


def _row_name(graph: Graph, height: int) -> str:
    if height in (-1, len(graph.sites)):
        return "tokens" if height == -1 else "output"
    site = graph.sites[height]
    parts = site.split(".", 2)
    if parts[0] != "blocks" or len(parts) < 3:
        return plain_visible(site)
    alone = sum(each.split(".")[:2] == parts[:2] for each in graph.sites) == 1
    return f"L{parts[1]}" if alone else f"L{parts[1]} {parts[2].replace('hook_', '')}"


def node_name(graph: Graph, node: int, texts: Texts) -> str:
    """What a node is called: its label, its token, or what it is."""
    kind, number = int(graph.kind[node]), int(graph.number[node])
    name = graph.ids[node]
    if label := graph.labels.get(name) or texts.labels.get(name):
        return shortened(plain_visible(str(label)), _LONGEST_NAME)
    if kind == EMBEDDING:
        return f"“{_token(graph, node)}”"
    if kind == LOGIT:
        found = graph.facts.get("logit_tokens")
        text = found.get(str(number), number) if isinstance(found, dict) else number
        said = f"“{plain_visible(str(text))}”"
        if graph.is_difference(node):
            return said
        return f"{said} {100 * graph.activation[node]:.3g} %"
    return f"feature {number}" if kind == FEATURE else "error"


def node_words(graph: Graph, node: int) -> str:
    """What a node is and where: for its tooltip and its heading."""
    kind, at = int(graph.kind[node]), f"“{_token(graph, node)}” ({graph.position[node]})"
    if kind == EMBEDDING:
        return f"token at position {graph.position[node]}"
    if kind == LOGIT:
        return f"output after {at}"
    site = plain_visible(graph.sites[graph.site[node]])
    what = f"feature {graph.number[node]}" if kind == FEATURE else "error"
    return f"{what} · {site} · at {at}"


def _token(graph: Graph, node: int) -> str:
    return plain_visible(graph.tokens[graph.position[node]])


def picture(
    graph: Graph,
    texts: Texts,
    *,
    whole: Graph | None = None,
    subgraph: Subgraph | None = None,
    selected: str | None = None,
) -> dict[str, Any]:
    """What drawing.js draws of a graph, and of what is pinned of it.

    Args:
        whole: the graph before it was pruned; shares of links are of all that their targets get
            there.
        subgraph: its nodes are drawn whatever their influence.
        selected: the name of the node whose links are shown.

    If the graph has more nodes or links than are drawn, those of most influence are;
    `left_out` says how many are not.
    """
    subgraph = subgraph or Subgraph()
    drawn = _drawn(graph, {*subgraph.pinned, *([selected] if selected else ())})
    where = layout(drawn)
    names = [node_name(drawn, node, texts) for node in range(len(drawn))]
    largest = float(np.abs(drawn.influence).max(initial=0)) or 1.0
    totals = _totals(graph if whole is None else whole, drawn)
    links, links_left = _links(drawn, totals)
    return {
        "nodes": [
            {
                "id": drawn.ids[node],
                "kind": KINDS[drawn.kind[node]],
                "name": names[node],
                "words": node_words(drawn, node),
                "facts": _facts(drawn, node),
                "url": texts.urls.get(drawn.ids[node], ""),
                "column": int(drawn.position[node]),
                "row": where.row[node],
                "slot": where.slot[node],
                "line": where.line[node],
                "size": float(min(abs(drawn.influence[node]) / largest, 1) ** 0.5),
            }
            for node in range(len(drawn))
        ],
        "columns": [
            {"slots": slots, "text": plain_visible(token) or "·"}
            for slots, token in zip(where.columns, drawn.tokens, strict=True)
        ],
        "rows": [{"name": name, "lines": lines} for name, lines in where.rows],
        "links": links,
        "pinned": [name for name in subgraph.pinned if name in set(drawn.ids)],
        "selected": selected if selected in set(drawn.ids) else None,
        "subgraph": groups_drawn(drawn, subgraph, dict(zip(drawn.ids, names, strict=True))),
        "left_out": {"nodes": len(graph) - len(drawn), "links": links_left},
    }


def _drawn(graph: Graph, always: set[str]) -> Graph:
    """The graph without its least influential nodes, if there are too many."""
    if len(graph) <= MOST_NODES:
        return graph
    first = np.isin(graph.kind, (EMBEDDING, LOGIT)) | np.isin(graph.ids, list(always))
    order = np.lexsort((-np.abs(graph.influence), ~first))
    return graph.subgraph(np.sort(order[:MOST_NODES]))


def _totals(whole: Graph, drawn: Graph) -> np.ndarray:
    """The sizes of all edges into each of the nodes drawn, also from nodes that are not."""
    sizes = np.abs(whole.adjacency).sum(1, dtype=np.float64)
    return sizes if whole is drawn else sizes[[whole.index(name) for name in drawn.ids]]


def _links(graph: Graph, totals: np.ndarray) -> tuple[dict[str, list[Any]], int]:
    """Sources, targets, weights and shares of the links; those that carry most to outputs first."""
    target, source, weight = graph.edges()
    reach = (np.abs(graph.influence) + graph.weight)[target]
    flow = normalised(graph.adjacency)[target, source] * reach
    order = np.argsort(-flow, kind="stable")[:MOST_LINKS]
    share = np.abs(weight) / np.maximum(totals[target], np.finfo(float).tiny)
    found = {
        "source": source[order].tolist(),
        "target": target[order].tolist(),
        "weight": [_short(each) for each in weight[order].tolist()],
        "share": [_short(each) for each in share[order].tolist()],
    }
    return found, len(flow) - len(order)


def _short(value: float) -> float:
    return float(f"{value:.{_FIGURES}g}")


def _facts(graph: Graph, node: int) -> str:
    """A node's numbers, in words."""
    kind, activation = int(graph.kind[node]), float(graph.activation[node])
    if kind == LOGIT:
        said = f"{100 * activation:.3g} %"
        if graph.is_difference(node):
            value = amount(float(graph.value[node]), 3, signed=True)
            return f"difference of logits {value} · probability of the first {said}"
        return f"probability {said}"
    what = "activation" if kind == FEATURE else "norm"
    said = f"{what} {amount(activation, 3)}"
    value = float(graph.influence[node])
    if graph.method != LINEAR:
        said += f" · effect on the outputs {amount(value, 3, signed=True)}"
    total = float(np.abs(graph.influence).sum()) or 1.0
    return f"{said} · {100 * abs(value) / total:.2g} % of the {influence_word(graph)} of all shown"


def influence_word(graph: Graph) -> str:
    """What a graph has by which its nodes are ranked: influence, or effects (see `Graph`)."""
    return "influence" if graph.method == LINEAR else "effects, by size,"


def groups_drawn(
    graph: Graph, subgraph: Subgraph, names: Mapping[str, str]
) -> dict[str, list[dict[str, Any]]] | None:
    """The pinned nodes and supernodes as boxes, in lines from outputs to tokens; None if none is.

    Args: names are what nodes are called.
    """
    groups = {
        name: nodes
        for name, nodes in subgraph.groups().items()
        if all(node in names for node in nodes)
    }
    if not groups:
        return None
    matrix = summed(graph, groups)
    members = [[graph.index(node) for node in nodes] for nodes in groups.values()]
    heights = [float(np.mean([_height(graph, node) for node in nodes])) for nodes in members]
    levels = sorted(set(heights), reverse=True)
    boxes = [
        {
            "name": plain_visible(name) if name in subgraph.supernodes else names[name],
            "kind": "supernode" if name in subgraph.supernodes else KINDS[graph.kind[nodes[0]]],
            "members": [graph.ids[node] for node in nodes],
            "words": "\n".join(
                f"{names[graph.ids[node]]} · {node_words(graph, node)}" for node in nodes
            ),
            "level": levels.index(height),
            "column": float(np.mean(graph.position[nodes])),
        }
        for (name, height), nodes in zip(zip(groups, heights, strict=True), members, strict=True)
    ]
    links = [
        {"source": int(source), "target": int(target), "weight": _short(float(weight))}
        for target, source in np.argwhere(matrix).tolist()
        for weight in [matrix[target, source]]
    ]
    return {"boxes": boxes, "links": links}


def _height(graph: Graph, node: int) -> int:
    kind = int(graph.kind[node])
    if kind in (EMBEDDING, LOGIT):
        return -1 if kind == EMBEDDING else len(graph.sites)
    return int(graph.site[node])


def script() -> str:
    """What draws, as a module of JavaScript whose default export it is."""
    return (_HERE / "drawing.js").read_text("utf-8")


def style() -> str:
    """Its style sheet."""
    return (_HERE / "drawing.css").read_text("utf-8")


@functools.cache
def _component() -> Callable[..., Any]:
    return component(
        "saescope_circuit_graph", html='<div class="circuit"></div>', css=style(), js=script()
    )


def draw(
    data: Mapping[str, Any], key: str, chosen: Callable[[str | None, Sequence[str]], None]
) -> None:
    """Draw the picture.

    Args: chosen is called with the node selected and those pinned when a reader changes either.
    """

    def changed() -> None:
        found = dict(st.session_state[key].get("chosen") or {})
        chosen(found.get("selected"), list(found.get("pinned") or ()))

    _component()(data=dict(data), key=key, on_chosen_change=changed)
