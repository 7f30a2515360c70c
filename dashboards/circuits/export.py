"""A graph to take along: a page that needs nothing else, and Neuronpedia's JSON with labels."""

import base64
import hashlib
import html
import json
import re
from dataclasses import replace
from typing import Any

from dashboards.amounts import counted
from dashboards.circuits import drawing
from dashboards.circuits.drawing import Texts, node_name
from dashboards.tokens import plain_visible
from sae.circuits.graph import EMBEDDING, ERROR, FEATURE, Graph
from sae.circuits.neuronpedia import to_neuronpedia
from sae.circuits.subgraphs import Subgraph

MARK = '<meta name="generator" content="saescope circuit">'
"""by which a page is known to be one of these"""
_EXPORTS = "export default function"
_START = """
const data = JSON.parse(document.getElementById("data").textContent);
draw({ data, parentElement: document.body, setStateValue: () => {} });
"""
_STYLE = """
:root{color-scheme:light dark;--st-text-color:#1d2330;--st-background-color:#fff;
--st-secondary-background-color:#f3f4f6;--st-primary-color:#c2601a;
--st-font:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
@media(prefers-color-scheme:dark){:root{--st-text-color:#e6e8ec;--st-background-color:#12151b;
--st-secondary-background-color:#1c212b;--st-primary-color:#e8873a}}
body{margin:0;padding:1.2rem;background:var(--st-background-color);color:var(--st-text-color);
font:15px/1.5 var(--st-font)}
h1{font-size:1.3rem;line-height:1.3;margin:0 0 .3rem;overflow-wrap:anywhere;white-space:pre-wrap}
.about{opacity:.75;margin:.1rem 0 .8rem;font-size:.9rem}
"""


def page(graph: Graph, texts: Texts, subgraph: Subgraph, about: str = "") -> str:
    """The page: the same picture, with hover and click, and no network.

    Only its own script, known by its hash, may run in it.

    Args: about is said below the heading.
    """
    data = drawing.picture(graph, replace(texts, urls={}), subgraph=subgraph)
    reached = dict(zip(graph.ids, graph.cumulative.tolist(), strict=True))
    always = {graph.ids[node] for node in range(len(graph)) if _is_end(graph, node)}
    for node in data["nodes"]:
        node["reach"] = 0.0 if node["id"] in always else float(f"{reached[node['id']]:.4g}")
    data["slider"] = True
    script = drawing.script().replace(_EXPORTS, "const draw = function", 1) + _START
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    title = html.escape(plain_visible(graph.prompt), quote=True)
    said = html.escape(plain_visible(_about(graph, data, about)), quote=True)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{MARK}'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}{drawing.style()}</style></head>"
        f'<body><h1>{title}</h1><p class="about">{said}</p><div class="circuit"></div>'
        f'<script type="application/json" id="data">{_in_script(data)}</script>'
        f'<script type="module">{script}</script></body></html>\n'
    )


def _is_end(graph: Graph, node: int) -> bool:
    return int(graph.kind[node]) not in (FEATURE, ERROR)


def _about(graph: Graph, data: dict[str, Any], about: str) -> str:
    nodes, links = (
        counted(len(data["nodes"]), "node"),
        counted(len(data["links"]["source"]), "link"),
    )
    drawn = f"{nodes}, {links}"
    left = data["left_out"]
    if left["nodes"] or left["links"]:
        drawn += f" (the {left['nodes']:,} nodes and {left['links']:,} links of least influence are"
        drawn += " left out)"
    return " · ".join(filter(None, (graph.model, drawn, about)))


def _in_script(data: Any) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def slug(name: str) -> str:
    """A name as a part of addresses and of files' names.

    >>> slug("Two + two.npz")
    'two-two'
    """
    stem = re.sub(r"\.(npz|json)$", "", name).lower()
    return re.sub(r"[^a-z0-9_]+", "-", stem).strip("-_")[:60] or "graph"


def neuronpedia(graph: Graph, name: str, texts: Texts, subgraph: Subgraph) -> dict[str, Any]:
    """Neuronpedia's JSON of a graph, every node with its label, and with what is pinned."""
    labels: dict[str, str] = {}
    for node, own in enumerate(graph.ids):
        kind = int(graph.kind[node])
        if kind == FEATURE:
            labels[own] = graph.labels.get(own) or texts.labels.get(own, "")
        elif kind == EMBEDDING:
            labels[own] = f"Emb: {node_name(graph, node, Texts())}"
        elif kind == ERROR:
            labels[own] = f"Err: “{plain_visible(graph.tokens[graph.position[node]])}”"
    kept = {own: text for own, text in labels.items() if text}
    return to_neuronpedia(
        graph.labelled(kept),
        slug(name),
        pinned=subgraph.pinned,
        supernodes=subgraph.supernodes,
    )
