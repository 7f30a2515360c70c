"""Faithfulness and completeness of circuits: what the model still does with some nodes alone.

m is what is explained (`sae.circuits.effects`). With M the model, C a set of features and 0 no
feature at all, every other feature being ablated wherever it fires (Marks et al. 2024, arXiv
2403.19647, section 4):

    faithfulness(C) = (m(C) - m(0)) / (m(M) - m(0))
    completeness(C) = (m(M without C) - m(0)) / (m(M) - m(0))

so that a circuit which is all that matters has faithfulness 1 and completeness 0. Features are
found anew in each run, from what they read there; what a cross-layer transcoder's feature writes is
taken out at all its layers. Errors, and positions that SAEs do not read, are left as they are in
each. What is ablated is set to 0, or to the feature's mean over the positions that SAEs read in all
the prompts given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activations import Model
from sae.architectures.cross_layer_transcoder import CrossLayerTranscoder
from sae.circuits.effects import run_measured
from sae.circuits.graph import FEATURE, Graph
from sae.circuits.outputs import Outputs, outputs_of
from sae.circuits.parts import placements_of
from sae.core.base import SparseAutoencoder
from sae.data.placement import Placement
from sae.evaluation.intervals import t_quantile
from saescope.errors import InputError
from saescope.integers import as_index, as_indices

Ablation = Literal["zero", "mean"]
_AT_ONCE = 16
"""sets of nodes whose runs are made as one batch"""


@dataclass(frozen=True)
class Curve:
    """Faithfulness and completeness by number of features kept, a row a prompt."""

    counts: list[int]
    """features kept; a prompt whose graph has fewer keeps all of them"""
    faithfulness: NDArray[np.float64]
    """[prompts, counts]"""
    completeness: NDArray[np.float64]
    random_faithfulness: NDArray[np.float64]
    """[prompts, counts]: the same of as many features drawn from the graph's, a mean over draws"""
    random_completeness: NDArray[np.float64]
    model: NDArray[np.float64]
    """[prompts]: m of the model"""
    empty: NDArray[np.float64]
    """[prompts]: m without any feature"""

    def mean(self, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The mean over prompts of one of the four [counts], and half of its 95% interval.

        By Student's t, prompts as the unit; NaN of a single prompt.
        """
        rows = getattr(self, name)
        n = len(rows)
        if n < 2:
            return rows.mean(0), np.full(rows.shape[1], np.nan)
        return rows.mean(0), t_quantile(n - 1) * rows.std(0, ddof=1) / np.sqrt(n)


def faithfulness(
    model: Model,
    saes: Sequence[SparseAutoencoder],
    graphs: Sequence[Graph],
    counts: Sequence[int],
    *,
    ablation: Ablation = "mean",
    draws: int = 5,
    seed: int = 0,
    allow_other_model: bool = False,
) -> Curve:
    """How much of its outputs the model keeps with the most influential features of each prompt.

    Args:
        graphs: of the prompts, whole, made with these SAEs (`sae.circuit`).
        counts: how many features to keep, for each point of the curve.
        ablation: what others are set to.
        draws: random sets of the same number of features of the same graph, beside each.

    Raises InputError for no graph, graphs of other SAEs, and a prompt whose outputs do not depend
    on features at all.

    >>> curve = faithfulness(model, transcoders, graphs, [10, 100, 1000])     # doctest: +SKIP
    >>> curve.mean("faithfulness"), curve.mean("random_faithfulness")         # doctest: +SKIP
    """
    if not graphs:
        raise InputError("wants at least one graph", where="graphs")
    counts = as_indices(counts, where="counts", low=1)
    draws = as_index(draws, where="draws", low=1)
    if ablation not in ("zero", "mean"):
        raise InputError("no such ablation", where="ablation", given=ablation, allowed="zero, mean")
    placed = placements_of(model, saes, allow_other_model=allow_other_model)
    dictionaries = [own for each in placed for own in _dictionaries_of(each)]
    for graph in graphs:
        _check_made_with(graph, dictionaries)
    means: Sequence[Tensor | None] = [None] * len(dictionaries)
    if ablation == "mean":
        means = _means(model, dictionaries, graphs)
    generator = np.random.default_rng(seed)
    rows = [
        _of_prompt(_Ablated(model, dictionaries, means, graph), counts, draws, generator)
        for graph in graphs
    ]
    named = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return Curve(counts=list(counts), **named)


@dataclass(frozen=True)
class _Dictionary:
    """An SAE, or one layer of a cross-layer transcoder: features that read one site."""

    read: str
    written: dict[str, Tensor]
    """[features, d_out] by site: the decoder's rows"""
    features: int
    encode: Callable[[Tensor], Tensor]
    """rows [batch, d_in] to activations [batch, features]"""
    like: Tensor
    """a weight, whose type and device rows take on"""

    def active(self, rows: Tensor) -> Tensor:
        """Activations of rows [batch, d_in], in float32."""
        return self.encode(rows.to(self.like)).float()


def _dictionaries_of(placed: Placement) -> list[_Dictionary]:
    sae = placed.sae
    if not isinstance(sae, CrossLayerTranscoder):
        written = {placed.written[0]: sae.W_dec.detach().float()}
        return [_Dictionary(placed.read[0], written, sae.d_sae, sae.encode, sae.W_dec)]
    found = []
    for layer, read in enumerate(placed.read):
        rows = sae.decoder(layer).detach().float().unbind(1)
        written = dict(zip(placed.written[layer:], rows, strict=True))
        encode = partial(_encode_layer, sae, layer)
        found.append(_Dictionary(read, written, sae.features_a_layer, encode, sae.b_dec))
    return found


def _encode_layer(sae: CrossLayerTranscoder, layer: int, x: Tensor) -> Tensor:
    return sae.encode_layer(layer, x).dense()


def _check_made_with(graph: Graph, dictionaries: Sequence[_Dictionary]) -> None:
    features = {each.read: each.features for each in dictionaries}
    for node in graph.nodes_of(FEATURE):
        site = graph.sites[graph.site[node]]
        if graph.number[node] >= features.get(site, 0):
            raise InputError("a graph has features of other SAEs", where="graphs", given=site)


def _of_prompt(
    runs: "_Ablated", counts: Sequence[int], draws: int, generator: np.random.Generator
) -> dict[str, Any]:
    graph = runs.graph
    nodes = graph.nodes_of(FEATURE)
    ranked = nodes[np.argsort(-np.abs(graph.influence[nodes]), kind="stable")]
    sets = [ranked[:count] for count in counts]
    for count in counts:
        sets += [generator.permutation(nodes)[:count] for _ in range(draws)]
    whole, empty = float(runs.whole), float(runs.kept([ranked[:0]])[0])
    if not abs(whole - empty) > 1e-9 * max(abs(whole), abs(empty)):
        raise InputError(
            "its outputs do not depend on any feature", where="faithfulness", given=graph.prompt
        )

    def shares(found: NDArray[np.float64]) -> tuple[Any, Any]:
        parts = (found - empty) / (whole - empty)
        drawn = parts[len(counts) :].reshape(len(counts), draws)
        return parts[: len(counts)], drawn.mean(1)

    kept, random_kept = shares(runs.kept(sets))
    without, random_without = shares(runs.kept(sets, invert=True))
    return {
        "faithfulness": kept,
        "completeness": without,
        "random_faithfulness": random_kept,
        "random_completeness": random_without,
        "model": whole,
        "empty": empty,
    }


class _Ablated:
    """Runs of a model on a graph's prompt in which features are ablated."""

    def __init__(
        self,
        model: Model,
        dictionaries: Sequence[_Dictionary],
        means: Sequence[Tensor | None],
        graph: Graph,
    ) -> None:
        self.graph = graph
        self._model = model
        self._dictionaries = dictionaries
        self._means = means
        self._outputs = _outputs(model, graph)
        self.whole = run_measured(model, graph.token_ids, self._outputs, {})[0]

    def kept(self, sets: Sequence[NDArray[Any]], *, invert: bool = False) -> NDArray[np.float64]:
        """m [sets] with the features of each set alone, or with all but these.

        Args: sets have indices of the graph's nodes.
        """
        found = []
        for start in range(0, len(sets), _AT_ONCE):
            chosen = sets[start : start + _AT_ONCE]
            edits = self._edits(chosen, invert)
            m = run_measured(
                self._model, self.graph.token_ids, self._outputs, edits, copies=len(chosen)
            )
            found.append(m.double().cpu().numpy())
        return np.concatenate(found)

    def _edits(self, sets: Sequence[NDArray[Any]], invert: bool) -> dict[str, Any]:
        graph = self.graph
        read_here = self._model.keep_mask(torch.tensor([graph.token_ids]))[0]
        read_here = read_here.to(self._model.device)
        at = read_here.long().cumsum(0) - 1
        lost: dict[int, Tensor] = {}  # by dictionary: [sets, positions read, features]

        def looked(x: Tensor, dictionary: _Dictionary, means: Tensor | None) -> Tensor:
            active = dictionary.active(x[:, read_here].flatten(0, 1)).unflatten(0, (len(x), -1))
            gone = torch.ones_like(active, dtype=torch.bool)
            here = np.array([site == dictionary.read for site in graph.sites], bool)
            for row, chosen in enumerate(sets):
                nodes = chosen[here[graph.site[chosen]]]
                where = at[torch.from_numpy(graph.position[nodes]).long()]
                gone[row, where, torch.from_numpy(graph.number[nodes])] = False
            off = active if means is None else active - means
            return off.masked_fill(gone == invert, 0.0)

        def edit(h: Tensor, site: str) -> Tensor:
            for index, each in enumerate(self._dictionaries):
                if each.read == site:
                    lost[index] = looked(h, each, self._means[index])
            h = h.clone()
            for index, each in enumerate(self._dictionaries):
                if site in each.written:
                    h[:, read_here] -= (lost[index] @ each.written[site]).to(h)
            return h

        sites = {site for each in self._dictionaries for site in (each.read, *each.written)}
        return {site: lambda h, _, site=site: edit(h, site) for site in sites}


def _outputs(model: Model, graph: Graph) -> Outputs:
    """What a graph explains, its weights as they were when it was made."""
    nodes = graph.facts["outputs"]
    wanted = [tuple(each) if isinstance(each, list) else each for each in nodes]
    return outputs_of(model, graph.token_ids, wanted, most=1, probability=1)


@torch.no_grad()
def _means(
    model: Model, dictionaries: Sequence[_Dictionary], graphs: Sequence[Graph]
) -> list[Tensor]:
    """Each feature's mean activation [features] over what SAEs read of all prompts."""
    totals = [torch.zeros(each.features) for each in dictionaries]
    rows = 0
    for graph in graphs:
        tokens = torch.tensor([graph.token_ids])
        kept = model.keep_mask(tokens)[0]
        found = model.capture(tokens, list({each.read for each in dictionaries}))
        rows += int(kept.sum())
        for total, each in zip(totals, dictionaries, strict=True):
            total += each.active(found[each.read][0][kept]).sum(0).cpu()
    return [(total / max(rows, 1)).to(model.device) for total in totals]
