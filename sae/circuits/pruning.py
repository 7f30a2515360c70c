"""Which nodes and edges of a graph matter for its outputs, and how much of it they explain.

With |A| the sizes of the edges, each target's divided by their sum, the influence of the nodes on
the outputs is w (|A| + |A|^2 + ...), where w has the logits' probabilities: the share of a walk
from an output backwards, each step to a source in proportion to the size of its edge, that passes
a node. A graph has no circles, so the sum ends. (Ameisen et al. 2025, "Circuit Tracing"; the
scores are theirs too.)
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from sae.circuits.graph import EMBEDDING, ERROR, FEATURE, LOGIT, Graph
from saescope.errors import InputError, check_range


def normalised(adjacency: Float[np.ndarray, "targets sources"]) -> NDArray[np.float32]:
    """The sizes of edges as shares of all that their target gets; rows without edges stay 0."""
    sizes = np.abs(adjacency.astype(np.float32))
    total = sizes.sum(1, keepdims=True, dtype=np.float64).astype(np.float32)
    return np.divide(sizes, total, out=sizes, where=total > 0)


def influence(
    shares: Float[np.ndarray, "nodes nodes"], weight: Float[np.ndarray, " nodes"]
) -> NDArray[np.float64]:
    """weight (shares + shares^2 + ...): the influence of each node on the outputs.

    Raises InputError for edges that go round in a circle.

    >>> chain = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    >>> influence(chain, np.array([0.0, 0, 0.5])).tolist()
    [0.5, 0.5, 0.0]
    """
    total = np.zeros(len(weight))
    step = np.asarray(weight, shares.dtype)  # of the same precision, or NumPy would copy the shares
    for _ in range(len(weight) + 1):
        step = step @ shares
        if not step.any():
            return total
        total += step
    raise InputError("its edges go round in a circle", where="graph")


def with_influence(graph: Graph) -> Graph:
    """The graph with the influence of its nodes, and each one's cumulative share of all of it."""
    found = influence(normalised(graph.adjacency), graph.weight)
    return replace(graph, influence=found, cumulative=cumulative(found))


def cumulative(found: Float[np.ndarray, " nodes"]) -> NDArray[np.float64]:
    """The share of all influence that each node and those of more influence have together."""
    sizes = np.abs(np.asarray(found, np.float64))
    order = np.argsort(-sizes, kind="stable")
    shares = np.empty(len(sizes))
    shares[order] = np.cumsum(sizes[order]) / max(sizes.sum(), np.finfo(float).tiny)
    return shares


def prune(graph: Graph, *, nodes: float = 0.8, edges: float = 0.98) -> Graph:
    """The nodes that have 80% of all influence, and the edges between them that carry 98%.

    First nodes are chosen: those of the most influence (or of the largest effects on the outputs,
    where the graph has these) that have this share of all. Tokens and logits are always kept. Then
    edges, by the influence that flows through them among these nodes. Last, features without an
    edge in or out, and errors without one out, are left out until none is left. `influence` and
    `cumulative` stay those of the whole graph.

    Raises InputError for shares outside of 0 to 1.

    >>> len(prune(graph)), len(prune(graph, nodes=0.5))                   # doctest: +SKIP
    (412, 155)
    """
    check_range("nodes", nodes, low=0, high=1)
    check_range("edges", edges, low=0, high=1)
    found = np.abs(graph.influence)  # an effect on the outputs may be negative
    if graph.method == "linear":
        found = influence(normalised(graph.adjacency), graph.weight)
    keep = found >= _threshold(found, nodes)
    keep |= np.isin(graph.kind, (EMBEDDING, LOGIT))
    facts = {**graph.facts, "node_threshold": nodes, "edge_threshold": edges}
    own = found if graph.method == "linear" else graph.influence
    whole = replace(graph, influence=own, cumulative=cumulative(found), facts=facts)
    small = whole.subgraph(keep)
    shares = normalised(small.adjacency)
    flow = shares * (influence(shares, small.weight) + small.weight)[:, None]
    carry = (flow >= _threshold(flow.ravel(), edges)) & (flow > 0)
    return small.subgraph(_connected(small, carry), carry)


def _connected(graph: Graph, carry: Bool[np.ndarray, "nodes nodes"]) -> Bool[np.ndarray, " nodes"]:
    """The nodes without those that nothing flows through; `carry` loses the edges of these."""
    features = graph.kind == FEATURE
    inner = features | (graph.kind == ERROR)
    keep = np.ones(len(graph), bool)
    while True:
        idle = keep & ((inner & ~carry.any(0)) | (features & ~carry.any(1)))
        if not idle.any():
            return keep
        keep &= ~idle
        carry &= keep[:, None] & keep[None, :]


def _threshold(scores: Float[np.ndarray, " scores"], share: float) -> float:
    """The smallest score among the largest that have this share of the sum of all."""
    ordered = np.sort(scores)[::-1]
    if not ordered.size or ordered[0] <= 0:
        return 0.0
    reached = np.cumsum(ordered) / ordered.sum()
    return float(ordered[min(int(np.searchsorted(reached, share)), len(ordered) - 1)])


def replacement_score(graph: Graph) -> float:
    """Share of the influence of what a computation starts from that tokens have, and not errors.

    1 where all that reaches the outputs comes from tokens through features, 0 where all comes from
    errors. Of a whole graph: pruning takes nodes out. NaN where nothing reaches the outputs.
    """
    found = influence(normalised(graph.adjacency), graph.weight)
    tokens, errors = (found[graph.kind == kind].sum() for kind in (EMBEDDING, ERROR))
    return float(tokens / (tokens + errors)) if tokens + errors else float("nan")


def completeness_score(graph: Graph) -> float:
    """Share of what nodes get that does not come from errors, each counted by its influence.

    Nodes that nothing flows into, tokens and errors, count as explained, as where it was published.
    NaN where nothing reaches the outputs.
    """
    shares = normalised(graph.adjacency)
    counted = influence(shares, graph.weight) + graph.weight
    explained = 1 - shares[:, graph.kind == ERROR].sum(1)
    total = counted.sum()
    return float((explained * counted).sum() / total) if total else float("nan")
