"""Attribution graphs of one prompt: exact where attention and norms are held.

Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language Models".
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activations import Model
from sae.circuits.assemble import assemble, folded
from sae.circuits.cut_run import EMBEDDING
from sae.circuits.edges import Edges
from sae.circuits.effects import estimated_effects
from sae.circuits.graph import FEATURE, LOGIT, Graph
from sae.circuits.outputs import Output, Outputs, outputs_of
from sae.circuits.parts import Part, bare_part, part_of, parts_across, placements_of, uncut_mlps
from sae.circuits.pruning import cumulative, with_influence
from sae.circuits.rows import EdgeRows
from sae.core.base import SparseAutoencoder
from sae.data.token_ids import token_ids
from saescope.errors import InputError, check_choice
from saescope.integers import as_index
from saescope.progress import silent

Method = Literal["linear", "gradient", "integrated"]
_EXACT = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.2}
"""by how much, of the sizes of all that a node gets, their sum may differ from what it has"""


def circuit(
    model: Model,
    saes: Sequence[SparseAutoencoder],
    prompt: str | Sequence[int],
    *,
    method: Method = "linear",
    outputs: Sequence[Output] | None = None,
    max_outputs: int = 10,
    probability: float = 0.95,
    max_features: int = 4096,
    batch: int = 256,
    unread_errors: bool = True,
    allow_other_model: bool = False,
    progress: bool = False,
) -> Graph:
    """The attribution graph of a prompt: what its next token comes from, feature by feature.

    By the linear method each transcoder's MLP is the sum of its active features and an error, an
    MLP without a transcoder an error; attention patterns and norms' scales are held as they are on
    this prompt. What a feature reads is then exactly its incoming edges and biases (`Graph.bias`).

    Args:
        saes: transcoders, one for each layer or for some; SAEs of other sites are cut there alike.
        prompt: a text, or token ids (with BOS, where the model uses one).
        method: "linear", for transcoders; or "gradient" or "integrated", for SAEs of any sites: the
            model stays its nonlinear self, edges are gradient times activation, and `influence` has
            nodes' effects on the outputs by these gradients (`sae.circuits.effects`).
        outputs: tokens to explain (ids or texts of one token), or pairs of two whose logits'
            difference is meant; by default the likeliest next tokens.
        max_outputs, probability: the likeliest tokens are taken until they have this probability
            together, and no more than so many.
        max_features: the most features that become nodes: those of the most influence. What the
            others write is counted with the errors of their site.
        batch: features whose edges are computed at once; less takes less memory.
        unread_errors: what is written where SAEs do not read (the first position, special tokens)
            is error; otherwise bias, as in circuit-tracer.
        allow_other_model: use SAEs of another model (a base model's); it is said.
        progress: say how far it is.

    Raises InputError for an empty prompt, SAEs that do not fit the model or cannot be taken apart,
    outputs that are no tokens, and a model whose attention or norms cannot be held.

    >>> graph = sae.circuit(model, transcoders, "The capital of France is")   # doctest: +SKIP
    """
    check_choice("no such method", "method", method, get_args(Method))
    batch = as_index(batch, where="batch", low=1)
    max_features = as_index(max_features, where="max_features", low=1)
    ids = token_ids(model, prompt, name="prompt", where="prompt")
    wanted = outputs_of(model, ids, outputs, most=max_outputs, probability=probability)
    allowed = {"unread_errors": unread_errors, "allow_other_model": allow_other_model}
    parts, embedding = parts_of(model, saes, ids, linear=method == "linear", **allowed)
    rows = EdgeRows(model, parts, ids, embedding, linear=method == "linear")
    with silent(not progress):
        graph = _traced(rows, wanted, method, max_features, batch)
    return replace(graph, prompt=prompt) if isinstance(prompt, str) else graph


def _traced(rows: EdgeRows, outputs: Outputs, method: Method, most: int, batch: int) -> Graph:
    """The graph of the most influential features. InputError where sums are not exact."""
    edges = Edges.into_outputs(rows, outputs, most)
    if method == "linear":
        edges.visit(most, batch)
        graph = assemble(rows, outputs, edges.visited, edges.both())
        _check_sums(graph, rows.model)
        return with_influence(graph)
    given = (rows.model, rows.parts, rows.tokens, rows.embedding, outputs)
    effects = estimated_effects(*given, method).row()
    edges.visit(most, batch, effects)
    graph = assemble(rows, outputs, edges.visited, edges.both())
    return _with_effects(graph, method, edges.visited, rows, effects)


def _with_effects(
    graph: Graph,
    method: str,
    features: NDArray[np.int64],
    rows: EdgeRows,
    effects: NDArray[np.float32],
) -> Graph:
    """The graph with nodes' effects on the outputs as their influence."""
    found = folded(effects[None].copy(), rows, features)[0]
    found = np.concatenate([found[np.sort(features)], found[rows.columns.features :]])
    found = np.pad(found, (0, len(graph) - len(found)))  # outputs have none
    return replace(graph, method=method, influence=found, cumulative=cumulative(found))


def _check_sums(graph: Graph, model: Model) -> None:
    """Raise InputError unless what nodes get adds up to what they have."""
    got = graph.adjacency.sum(1, dtype=np.float64) + graph.bias
    sizes = np.abs(graph.adjacency).sum(1) + np.abs(graph.bias)
    targets = np.isin(graph.kind, (FEATURE, LOGIT))
    off = (np.abs(got - graph.value) / np.maximum(sizes, 1e-12))[targets]
    if off.size and off.max() > _EXACT[model.dtype]:
        raise InputError(
            "what features get does not add up to what they have: something in this model, held, "
            "is not linear",
            where=model.spec,
            given=f"relative difference {off.max():.2g}",
            allowed=f"up to {_EXACT[model.dtype]:g}",
        )


def parts_of(
    model: Model,
    saes: Sequence[SparseAutoencoder],
    ids: Sequence[int],
    *,
    linear: bool = True,
    unread_errors: bool = True,
    allow_other_model: bool = False,
) -> tuple[list[Part], Tensor]:
    """What SAEs make of a prompt, in the order of their sites, and its embeddings [pos, d_model].

    Raises InputError as `circuit` does.
    """
    placed = placements_of(model, saes, allow_other_model=allow_other_model)
    tokens = torch.tensor([list(ids)])
    bare = uncut_mlps(model, placed) if linear else []
    own = [site for each in placed for site in (*each.read, *each.written)]
    sites = list(dict.fromkeys([EMBEDDING, *own, *bare]))
    found = model.capture(tokens, sites)
    kept = model.keep_mask(tokens)[0].to(model.device)
    parts: list[Part] = []
    for p in placed:
        if p.sae.concatenates:
            x = {site: found[site][0] for site in (*p.read, *p.written)}
            parts += parts_across(p, x, kept, unread_errors=unread_errors)
        else:
            x, h = found[p.read[0]][0], found[p.written[0]][0]
            parts.append(part_of(p, x, h, kept, unread_errors=unread_errors))
    parts += [bare_part(s, found[s][0], kept, unread_errors=unread_errors) for s in bare]
    order = {site: index for index, site in enumerate(found)}  # as the run reached them
    parts.sort(key=lambda part: order[part.read])
    return parts, found[EMBEDDING][0].float()
