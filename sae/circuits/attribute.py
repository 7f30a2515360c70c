"""Attribution graphs of one prompt: exact where attention and norms are held.

Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language Models".
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activations import Model
from sae.circuits.assemble import assemble
from sae.circuits.cut_run import EMBEDDING
from sae.circuits.graph import FEATURE, LOGIT, Graph
from sae.circuits.outputs import Output, Outputs, outputs_of
from sae.circuits.parts import Part, bare_part, part_of, placements_of, uncut_mlps
from sae.circuits.pruning import with_influence
from sae.circuits.rows import EdgeRows
from sae.core.base import SparseAutoencoder
from saescope.errors import InputError, check_range
from saescope.integers import as_index, as_indices
from saescope.progress import Progress, silent

UPDATE = 4
"""batches of features between two rankings"""
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
    check_range("probability", probability, above=0, high=1)
    batch = as_index(batch, where="batch", low=1)
    max_features = as_index(max_features, where="max_features", low=1)
    ids = prompt_ids(model, prompt)
    wanted = outputs_of(
        model, ids, outputs, most=as_index(max_outputs, where="max_outputs", low=1),
        probability=probability,
    )  # fmt: skip
    parts, embedding = parts_of(
        model, saes, ids, unread_errors=unread_errors, allow_other_model=allow_other_model
    )
    rows = EdgeRows(model, parts, ids, embedding)
    edges = _Edges.into_outputs(rows, wanted, max_features)
    with silent(not progress):
        edges.visit(max_features, batch)
    count = len(wanted.token)
    into = edges.into[count : count + len(edges.visited)], edges.into[:count]
    graph = assemble(rows, wanted, edges.visited, into)
    if isinstance(prompt, str):
        graph = replace(graph, prompt=prompt)
    _check_sums(graph, model)
    return with_influence(graph)


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


@dataclass
class _Edges:
    """Edges into outputs and into the features visited so far, a row a target."""

    rows: EdgeRows
    weight: NDArray[np.float32]
    into: NDArray[np.float32]
    """[outputs, width], then [visited, width]"""
    totals: NDArray[np.float32]
    """the sizes of each row, summed"""
    visited: NDArray[np.int64]
    """the feature of each row behind those of the outputs"""

    @classmethod
    def into_outputs(cls, rows: EdgeRows, outputs: Outputs, most: int) -> "_Edges":
        """With room for so many features."""
        count = len(outputs.token)
        room = count + min(most, rows.columns.features)
        into = np.zeros((room, rows.columns.width), np.float32)
        into[:count] = rows.into_outputs(outputs.direction)
        totals = np.zeros(room, np.float32)
        totals[:count] = np.abs(into[:count]).sum(1)
        weight = outputs.weight.numpy().astype(np.float32)
        return cls(rows, weight, into, totals, np.zeros(0, np.int64))

    def visit(self, most: int, batch: int) -> None:
        """Compute edges into features, the most influential first, until there are `most`."""
        every = np.arange(self.rows.columns.features)
        most = min(most, len(every))
        with Progress("edges", most, "features") as progress:
            while len(self.visited) < most:
                left = np.setdiff1d(every, self.visited, assume_unique=True)
                if most < len(every):
                    ranked = np.argsort(-self.influence()[left], kind="stable")
                    left = left[ranked][: min(UPDATE * batch, most - len(self.visited))]
                groups = self.rows.group(left)
                for group in np.unique(groups):
                    own = np.sort(left[groups == group])
                    for start in range(0, len(own), batch):
                        self._add(own[start : start + batch])
                        progress.advance(len(own[start : start + batch]))

    def _add(self, features: NDArray[np.int64]) -> None:
        first = len(self.weight) + len(self.visited)
        found = self.rows.into_features(features)
        self.into[first : first + len(features)] = found
        self.totals[first : first + len(features)] = np.abs(found).sum(1)
        self.visited = np.concatenate([self.visited, features])

    def influence(self) -> NDArray[np.float32]:
        """Of each possible source [width] on the outputs, through the features visited so far.

        Features get nothing from later parts, so one walk from the last part to the first is all.
        """
        count, starts = len(self.weight), self.rows.columns.starts
        found = _shares(self.into[:count], self.totals[:count], self.weight)
        for start, end in zip(starts[-2::-1], starts[:0:-1], strict=True):
            own = np.flatnonzero((self.visited >= start) & (self.visited < end))
            if len(own):
                rows, above = self.into[count + own], found[self.visited[own]]
                found += _shares(rows, self.totals[count + own], above)
        return found


def _shares(
    rows: NDArray[np.float32], totals: NDArray[np.float32], weight: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Each row's weight shared out over its sources, by the sizes of its edges; [width]."""
    each = (weight / np.maximum(totals, np.finfo(np.float32).tiny)).astype(np.float32)
    return each @ np.abs(rows)
