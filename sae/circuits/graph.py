"""An attribution graph: what features, errors, tokens and logits of one prompt get from each other.

Nodes are what the model's computation on the prompt is cut into (Ameisen et al. 2025, "Circuit
Tracing: Revealing Computational Graphs in Language Models"; Marks et al. 2024, arXiv 2403.19647):

    embedding   what a token brings into the residual stream, one a position
    feature     an active feature of an SAE or a transcoder at a position
    error       what an SAE leaves unexplained at a position, one a site and position
    logit       a next token, its logit above the mean of all logits; or a difference of two logits

An edge is the part of the target's value that comes straight from the source, through no other
node. Needs NumPy alone, no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from saescope.errors import InputError
from saescope.integers import as_indices

KINDS = ("feature", "error", "embedding", "logit")
"""names of the kinds of nodes; `Graph.kind` has their indices"""
FEATURE, ERROR, EMBEDDING, LOGIT = range(4)
NODE_ARRAYS: dict[str, type[np.generic]] = {
    "kind": np.int8,
    "site": np.int32,
    "layer": np.int32,
    "position": np.int32,
    "number": np.int64,
    "activation": np.float32,
    "value": np.float32,
    "bias": np.float32,
    "weight": np.float32,
    "influence": np.float32,
    "cumulative": np.float32,
}
"""arrays with an entry a node, and what each is kept as"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Graph:
    """The nodes and edges of one prompt.

    Nodes are ordered: features (by layer, position, number), errors, embeddings, logits. Files of
    graphs are in `sae.circuits.files`, pruning in `sae.circuits.pruning`, and what Neuronpedia's
    viewer reads in `sae.circuits.neuronpedia`.

    >>> graph = sae.circuits.files.load("circuit.npz")                     # doctest: +SKIP
    >>> sources, weights = graph.incoming(graph.index("12_345_6"))         # doctest: +SKIP
    >>> graph.describe(sources[0]), weights[0]                             # doctest: +SKIP
    """

    prompt: str
    token_ids: list[int]
    """of the prompt, with BOS where the model uses one"""
    tokens: list[str]
    """their displayable texts"""
    model: str
    """name of the model"""
    n_layers: int
    sites: list[str]
    """the sites that features are read at, in the model's order"""
    saes: list[str]
    """what was read at each of these sites: a run's folder or another name"""
    method: str
    """how edges were computed: linear, gradient or integrated"""
    kind: Int[np.ndarray, " nodes"]
    """index into `KINDS`"""
    site: Int[np.ndarray, " nodes"]
    """index into `sites`; -1 for embeddings and logits"""
    layer: Int[np.ndarray, " nodes"]
    """the block; -1 for embeddings, `n_layers` for logits"""
    position: Int[np.ndarray, " nodes"]
    """index of the token"""
    number: Int[np.ndarray, " nodes"]
    """a feature's number, the token id of embeddings and logits, -1 for errors"""
    activation: Float[np.ndarray, " nodes"]
    """a feature's activation, an error's or an embedding's norm, a logit's probability"""
    value: Float[np.ndarray, " nodes"]
    """what incoming edges and `bias` add up to: a feature's pre-activation, a logit above the mean
    of all logits; 0 for errors and embeddings, which nothing flows into"""
    bias: Float[np.ndarray, " nodes"]
    """the part of `value` that comes from biases, and so from no node"""
    weight: Float[np.ndarray, " nodes"]
    """how much a node counts as an output: a logit's probability (1 for a difference of two), 0 for
    all others"""
    influence: Float[np.ndarray, " nodes"]
    """influence on the outputs, direct and indirect (see `sae.circuits.pruning`), or the effect
    on them where that was measured"""
    cumulative: Float[np.ndarray, " nodes"]
    """share of all nodes' influence that this node and all of more influence have, in the graph
    before it was pruned"""
    adjacency: Float[np.ndarray, "nodes nodes"]
    """[target, source]: the edges, 0 where there is none"""
    labels: dict[str, str] = field(default_factory=dict)
    """what people or models call a node, by `ids`"""
    facts: dict[str, Any] = field(default_factory=dict)
    """further facts: active features that were left out, scores, the settings"""

    def __post_init__(self) -> None:
        for name, dtype in NODE_ARRAYS.items():
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype))
        object.__setattr__(self, "adjacency", np.asarray(self.adjacency, np.float32))
        self._check()

    def _check(self) -> None:
        """Raise InputError for arrays of different lengths, or numbers that lead nowhere."""
        count = self.kind.size
        for name in NODE_ARRAYS:
            if getattr(self, name).shape != (count,):
                given = getattr(self, name).shape
                raise InputError("one entry a node", where=name, given=given, allowed=f"({count},)")
        if self.adjacency.shape != (count, count):
            given, allowed = self.adjacency.shape, f"({count}, {count})"
            raise InputError(
                "a row and a column a node", where="adjacency", given=given, allowed=allowed
            )
        if len(self.tokens) != len(self.token_ids):
            given = {"tokens": len(self.tokens), "token_ids": len(self.token_ids)}
            raise InputError("one text a token", where="tokens", given=given)
        if len(self.saes) != len(self.sites):
            given = {"saes": len(self.saes), "sites": len(self.sites)}
            raise InputError("one name a site", where="saes", given=given)
        bounds = {
            "kind": (0, len(KINDS)),
            "site": (-1, len(self.sites)),
            "layer": (-1, self.n_layers + 1),
            "position": (0, len(self.tokens)),
        }
        for name, (low, end) in bounds.items():
            found = getattr(self, name)
            if count and not (low <= found.min() and found.max() < end):
                given = [int(found.min()), int(found.max())]
                raise InputError(
                    "out of range", where=name, given=given, allowed=f"{low}..{end - 1}"
                )
        for name in (
            "activation",
            "value",
            "bias",
            "weight",
            "influence",
            "cumulative",
            "adjacency",
        ):
            if not np.isfinite(getattr(self, name)).all():
                raise InputError("is not finite everywhere", where=name)

    def __len__(self) -> int:
        """Number of nodes."""
        return self.kind.size

    def __repr__(self) -> str:
        counts = ", ".join(f"{np.sum(self.kind == i)} {name}" for i, name in enumerate(KINDS))
        return f"Graph({self.prompt!r}, {self.method}: {counts}; {self.n_edges} edges)"

    @property
    def n_edges(self) -> int:
        """Number of edges that are not 0."""
        return int(np.count_nonzero(self.adjacency))

    @cached_property
    def ids(self) -> list[str]:
        """A name for each node, the same in every graph of the prompt.

        "LAYER_FEATURE_POSITION" for features (with "@SITE" behind the layer where a block has SAEs
        at several sites), "error_LAYER_POSITION", "E_TOKEN_POSITION", "OUTPUT_TOKEN_POSITION" for
        logits, where OUTPUT is `n_layers` + 1, as Neuronpedia counts.
        """
        layers = [site.split(".")[1] for site in self.sites if site.startswith("blocks.")]
        several = len(set(layers)) < len(self.sites)
        found = []
        for kind, site, layer, position, number in zip(
            *(
                getattr(self, name).tolist()
                for name in ("kind", "site", "layer", "position", "number")
            ),
            strict=True,
        ):
            at = f"{layer}@{self.sites[site].split('.', 2)[-1]}" if several else str(layer)
            found.append(
                {
                    FEATURE: f"{at}_{number}_{position}",
                    ERROR: f"error_{at}_{position}",
                    EMBEDDING: f"E_{number}_{position}",
                    LOGIT: f"{self.n_layers + 1}_{number}_{position}",
                }[kind]
            )
        return found

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.ids)}

    def index(self, node: str) -> int:
        """The index of a node by its name. Raises InputError for one that is not in the graph."""
        if node not in self._index:
            raise InputError("no such node in this graph", where="node", given=node)
        return self._index[node]

    def describe(self, node: int) -> str:
        """A node in a few words: its label, or what it is."""
        label = self.labels.get(self.ids[node])
        kind, number = int(self.kind[node]), int(self.number[node])
        at = f"at {self.tokens[self.position[node]]!r} ({self.position[node]})"
        if kind == EMBEDDING:
            return f"token {at}"
        if kind == LOGIT:
            text = self.facts.get("logit_tokens", {}).get(str(number), str(number))
            return f"output {text!r} (p={self.activation[node]:.3f})"
        what = "error" if kind == ERROR else label or f"feature {number}"
        return f"{what} of {self.sites[self.site[node]]} {at}"

    def is_difference(self, node: int) -> bool:
        """Whether an output is a difference of two logits."""
        pairs = [each for each in self.facts.get("outputs", ()) if not isinstance(each, int)]
        return self.kind[node] == LOGIT and self.number[node] in [each[0] for each in pairs]

    def nodes_of(self, *kinds: int) -> Int[np.ndarray, " chosen"]:
        """Indices of the nodes of these kinds."""
        return np.flatnonzero(np.isin(self.kind, kinds))

    def incoming(self, node: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The nodes that a node gets anything from, and how much; the largest first.

        >>> sources, weights = graph.incoming(3)                          # doctest: +SKIP
        """
        return _strongest(self.adjacency[node])

    def outgoing(self, node: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The nodes that get anything from a node, and how much, from the largest."""
        return _strongest(self.adjacency[:, node])

    def edges(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Targets, sources and weights of all edges."""
        target, source = np.nonzero(self.adjacency)
        return target, source, self.adjacency[target, source]

    def subgraph(
        self,
        nodes: Bool[np.ndarray, " nodes"] | Sequence[int],
        edges: Bool[np.ndarray, "nodes nodes"] | None = None,
    ) -> "Graph":
        """The graph of some nodes (a mask, or indices) and of the edges between them.

        Args: edges, a mask [target, source] of this graph, keeps only these.

        Raises InputError for nodes that the graph does not have.
        """
        given = np.asarray(nodes)
        if given.dtype == bool and given.shape == (len(self),):
            chosen = np.flatnonzero(given)
        else:
            chosen = np.unique(as_indices(nodes, where="nodes", low=0, high=len(self) - 1))
            chosen = chosen.astype(np.int64)
        kept = self.adjacency if edges is None else np.where(edges, self.adjacency, 0)
        arrays = {name: getattr(self, name)[chosen] for name in NODE_ARRAYS}
        names = {self.ids[index] for index in chosen}
        labels = {name: text for name, text in self.labels.items() if name in names}
        adjacency = kept[np.ix_(chosen, chosen)]
        return replace(self, **arrays, adjacency=adjacency, labels=labels)

    def labelled(self, labels: Mapping[str, str]) -> "Graph":
        """The same with labels of nodes, by their names. Raises InputError for unknown nodes."""
        for name in labels:
            self.index(name)
        return replace(self, labels={**self.labels, **labels})


def _strongest(row: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    found = np.flatnonzero(row)
    order = found[np.argsort(-np.abs(row[found]), kind="stable")]
    return order, row[order]
