"""From the features pinned of a graph to the Steer page, and why it cannot take some of them."""

from collections.abc import Mapping
from dataclasses import dataclass

from dashboards import model_cache
from dashboards.circuits import saved
from dashboards.circuits.drawing import node_words
from dashboards.edits import Edit
from sae.circuits.graph import FEATURE, Graph
from sae.circuits.subgraphs import Subgraph
from saescope.errors import SaescopeError

WAYS = {
    "ablate": "switch off",
    "scale": "double where active",
    "add": "add at its strongest",
}
"""what is done to each feature"""
_MOST = 20
"""edits that the Steer page takes"""


@dataclass(frozen=True)
class Steering:
    """An address of the Steer page: one SAE's features, and the graph's prompt."""

    store: str
    features: list[int]
    parameters: dict[str, str]


def steerings(
    graph: Graph, subgraph: Subgraph, stores: Mapping[int, str], way: str
) -> tuple[list[Steering], list[str]]:
    """The Steer page's addresses for what is pinned, one an SAE, and what cannot be steered.

    A feature that is pinned at several tokens is edited once: the page edits it wherever it is.

    Args: stores are those of sites (see `saved.stores_of`); way is one of WAYS.
    """
    by_store: dict[str, list[int]] = {}
    refused: list[str] = []
    for name in subgraph.pinned:
        node = graph.index(name)
        site = int(graph.site[node])
        if graph.kind[node] != FEATURE:
            refused.append(f"{node_words(graph, node)}: only features can be steered")
        elif site not in stores:
            refused.append(f"{node_words(graph, node)}: no store beside these is of its SAE")
        else:
            own = by_store.setdefault(stores[site], [])
            if (number := int(graph.number[node])) not in own:
                own.append(number)
    found = []
    for store, features in by_store.items():
        if problem := _problem(store, len(features)):
            refused.append(f"{store}: {problem}")
        else:
            found.append(Steering(store, features, _parameters(graph, store, features, way)))
    return found, refused


def _problem(name: str, count: int) -> str:
    """Why an SAE's features cannot be steered; "" if they can."""
    store, _ = saved.opened(name)
    if store.meta.get("architecture") == "crosscoder":
        return "a crosscoder cannot steer, its features are known only after its last site"
    if count > _MOST:
        return f"{count} features are pinned, and the Steer page takes {_MOST}"
    try:
        model_cache.origin_of(store)
    except SaescopeError as error:
        return str(error)
    return ""


def _parameters(graph: Graph, store: str, features: list[int], way: str) -> dict[str, str]:
    opened, _ = saved.opened(store)

    def amount(feature: int) -> float:
        if way == "add":
            return float(f"{opened.feature(feature).max:.4g}")
        return 2.0 if way == "scale" else 0.0

    text = ",".join(Edit(way, feature, amount(feature)).text for feature in features)
    return {"sae": store, "edits": text, "prompt": graph.prompt}
