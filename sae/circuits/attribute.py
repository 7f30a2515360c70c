"""Attribution graphs of one prompt: exact where attention and norms are held.

Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language Models".
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from activations import Model
from sae.circuits.assemble import assemble
from sae.circuits.cut_run import EMBEDDING
from sae.circuits.edges import Edges
from sae.circuits.graph import FEATURE, LOGIT, Graph
from sae.circuits.outputs import Output, outputs_of
from sae.circuits.parts import Part, bare_part, part_of, placements_of, uncut_mlps
from sae.circuits.pruning import with_influence
from sae.circuits.rows import EdgeRows
from sae.core.base import SparseAutoencoder
from saescope.errors import InputError
from saescope.integers import as_index, as_indices
from saescope.progress import silent

_EXACT = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.2}
"""by how much, of the sizes of all that a node gets, their sum may differ from what it has"""


def circuit(
    model: Model,
    saes: Sequence[SparseAutoencoder],
    prompt: str | Sequence[int],
    *,
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

    Each transcoder's MLP is taken as the sum of its active features and an error, an MLP without a
    transcoder as an error; attention patterns, norms' scales and errors are held as they are on
    this prompt. Then what a feature reads is exactly the sum of its incoming edges and of biases
    (`Graph.bias`).

    Args:
        saes: transcoders, one for each layer or for some; SAEs of other sites are cut there alike.
        prompt: a text, or token ids (with BOS, where the model uses one).
        outputs: tokens to explain (ids or texts of one token), or pairs of two whose logits'
            difference is meant; by default the likeliest next tokens.
        max_outputs, probability: the likeliest tokens are taken until they have this probability
            together, and no more than so many.
        max_features: the most features that become nodes: those of the most influence. What the
            others write is counted with the errors of their site.
        batch: features whose edges are computed at once; less takes less memory.
        unread_errors: count what is written at positions that SAEs do not read (the first, special
            tokens) as errors; otherwise it is part of the biases, as in circuit-tracer.
        allow_other_model: use SAEs of another model (a base model's); it is said.
        progress: say how far it is.

    Raises InputError for an empty prompt, SAEs that do not fit the model or cannot be taken apart,
    outputs that are no tokens, and a model whose attention or norms cannot be held.

    >>> graph = sae.circuit(model, transcoders, "The capital of France is")   # doctest: +SKIP
    """
    batch = as_index(batch, where="batch", low=1)
    max_features = as_index(max_features, where="max_features", low=1)
    ids = prompt_ids(model, prompt)
    wanted = outputs_of(model, ids, outputs, most=max_outputs, probability=probability)
    allowed = {"unread_errors": unread_errors, "allow_other_model": allow_other_model}
    parts, embedding = parts_of(model, saes, ids, **allowed)
    rows = EdgeRows(model, parts, ids, embedding)
    edges = Edges.into_outputs(rows, wanted, max_features)
    with silent(not progress):
        edges.visit(max_features, batch)
    graph = assemble(rows, wanted, edges.visited, edges.both())
    _check_sums(graph, model)
    return with_influence(replace(graph, prompt=prompt) if isinstance(prompt, str) else graph)


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


def prompt_ids(model: Model, prompt: str | Sequence[int]) -> list[int]:
    """Token ids of a prompt. Raises InputError for one that is empty, or of unknown tokens."""
    if isinstance(prompt, str):
        ids = model.tokenize(prompt) if prompt else []
    else:
        ids = as_indices(prompt, where="prompt", low=0, high=model.d_vocab - 1)
    if not ids:
        raise InputError("the prompt is empty", where="prompt", given=prompt)
    return list(ids)


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
    parts = [
        part_of(p, found[p.read[0]][0], found[p.written[0]][0], kept, unread_errors=unread_errors)
        for p in placed
    ]
    parts += [bare_part(s, found[s][0], kept, unread_errors=unread_errors) for s in bare]
    order = {site: index for index, site in enumerate(model.sites())}
    parts.sort(key=lambda part: (order.get(part.read, len(order)), part.read))
    return parts, found[EMBEDDING][0].float()
