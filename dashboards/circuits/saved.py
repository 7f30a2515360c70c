"""Saved graphs beside the stores, and which store has the features of each of their sites."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import streamlit as st

from dashboards import find_stores, queries
from dashboards.circuits.drawing import Texts
from dashboards.tokens import feature_url
from sae.circuits.files import GRAPH_FILE, load
from sae.circuits.graph import FEATURE, Graph
from sae.circuits.pruning import prune
from sae.circuits.subgraphs import GRAPHS_FOLDER, KeptScores, Scores, is_subgraph_file
from saescope.errors import SaescopeError
from saescope.paths import AnyPath
from store import Annotations, FeatureStore

_DEEPEST, _MOST = 2, 500
_ENDINGS = (".npz", ".json")


def saved_graphs() -> dict[str, Path]:
    """The graphs in the folder of graphs beside the stores, and in folders in it, by path there."""
    folder = find_stores.beside_stores() / GRAPHS_FOLDER
    found: list[Path] = []
    for depth in range(1, _DEEPEST + 1):
        found += sorted(folder.glob("/".join(["*"] * depth)))
    files = [path for path in found if path.suffix in _ENDINGS and not is_subgraph_file(path)]
    return {
        str(path.relative_to(folder)): path for path in files[:_MOST] if _is_graph(version(path))
    }


def version(path: Path) -> queries.Version:
    """Identity of a graph's file, which changes when it is written anew."""
    return queries.version_of(path)


@st.cache_data(max_entries=1000, show_spinner=False)
def _is_graph(version: queries.Version) -> bool:
    return GRAPH_FILE.holds(Path(version[0]))


@dataclass(frozen=True)
class Loaded:
    """A graph as its file has it, and how it is scored."""

    graph: Graph
    scores: KeptScores
    all: Scores
    """of the whole graph"""


@st.cache_resource(max_entries=3, show_spinner="Reading the graph …")
def loaded(version: queries.Version) -> Loaded:
    """The graph of a file. Raises ArtefactError for one that cannot be read."""
    graph = load(version[0])
    scores = KeptScores(graph)
    return Loaded(graph, scores, scores.of(np.ones(len(graph), bool)))


@dataclass(frozen=True)
class Kept:
    """What is left of a graph, and its scores beside those of as many features at random."""

    graph: Graph
    scores: Scores
    random: list[Scores]
    all: Scores
    """of the whole graph"""


@st.cache_resource(max_entries=12, show_spinner="Pruning the graph …")
def kept(version: queries.Version, nodes: float, edges: float, always: tuple[str, ...]) -> Kept:
    """A pruned graph, with some nodes kept in any case.

    Raises InputError for nodes that the graph does not have.
    """
    whole = loaded(version)
    found = with_nodes(prune(whole.graph, nodes=nodes, edges=edges), whole.graph, always)
    mask = np.zeros(len(whole.graph), bool)
    mask[[whole.graph.index(name) for name in found.ids]] = True
    return Kept(found, whole.scores.of(mask), whole.scores.of_random(mask), whole.all)


def with_nodes(pruned: Graph, whole: Graph, always: Sequence[str]) -> Graph:
    """A pruned graph and further nodes of the whole one, with all their links to what is there.

    Raises InputError for nodes that the whole graph does not have.
    """
    more = [whole.index(name) for name in always if name not in set(pruned.ids)]
    if not more:
        return pruned
    here = np.array([whole.index(name) for name in pruned.ids], np.int64)
    edges = np.zeros(whole.adjacency.shape, bool)
    edges[np.ix_(here, here)] = pruned.adjacency != 0
    edges[more, :] = edges[:, more] = True
    chosen = np.zeros(len(whole), bool)
    chosen[here] = chosen[more] = True
    return whole.subgraph(chosen, edges)


# ---- stores of the sites ------------------------------------------------------------------------


def stores_of(graph: Graph) -> dict[int, str]:
    """The store of each of the graph's sites of which there is one, by the site's index.

    A store is taken for a site's where the hash of its SAE is the one that the graph records; of a
    graph that records none, where model and site are the same and the SAE goes by the same name.
    """
    found: dict[int, str] = {}
    for name, path in find_stores.stores().items():
        with suppress(SaescopeError, OSError):  # a damaged store has its own message on Home
            meta, _ = queries.summary(queries.version_of(path))
            for site in range(len(graph.sites)):
                if site not in found and _is_of(meta, name, graph, site):
                    found[site] = name
    return found


def _is_of(meta: Mapping[str, Any], name: str, graph: Graph, site: int) -> bool:
    own = graph.number[(graph.kind == FEATURE) & (graph.site == site)]
    if int(own.max(initial=-1)) >= int(meta.get("d_sae") or 0):
        return False
    hashes = graph.facts.get("sae_hashes")
    if isinstance(hashes, list) and len(hashes) == len(graph.sites):
        return bool(hashes[site]) and meta.get("sae_hash") == hashes[site]
    if meta.get("site") != graph.sites[site] or meta.get("model") != graph.model:
        return False
    called = PurePath(graph.saes[site]).name
    run = PurePath(str(meta.get("sae_path") or "")).name
    return called in {name, str(meta.get("name") or ""), run} - {""}


def opened(name: str) -> tuple[FeatureStore, Annotations]:
    """A store and people's labels of its features."""
    store = queries.open_store(_path(name))
    return store, queries.annotations(store)


def _path(name: str) -> AnyPath:
    return find_stores.stores()[name]


def texts_of(graph: Graph, stores: Mapping[int, str]) -> Texts:
    """What the stores call the features of a graph, and the addresses of their pages.

    A person's label goes before the machines' best, and that before a feature's top tokens.
    """
    labels: dict[str, str] = {}
    urls: dict[str, str] = {}
    for site, name in stores.items():
        store, notes = opened(name)
        nodes = np.flatnonzero((graph.kind == FEATURE) & (graph.site == site))
        features = sorted({int(number) for number in graph.number[nodes]})
        called = queries.named(store, notes, features)
        bare = [feature for feature in features if not called[feature].labelled]
        machine = notes.best_machine_labels(bare)
        for node in nodes.tolist():
            feature = int(graph.number[node])
            own = machine.get(feature)
            text = own.label if own is not None and own.label else called[feature].text
            labels[graph.ids[node]] = text
            urls[graph.ids[node]] = feature_url(name, feature)
    return Texts(labels, urls)
