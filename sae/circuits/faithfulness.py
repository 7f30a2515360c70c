"""Faithfulness and completeness of circuits: what the model still does with some nodes alone.

m is what is explained (`sae.circuits.effects`). With M the model, C a set of features and 0 no
feature at all, every other feature being ablated wherever it fires (Marks et al. 2024, arXiv
2403.19647, section 4):

    faithfulness(C) = (m(C) - m(0)) / (m(M) - m(0))
    completeness(C) = (m(M without C) - m(0)) / (m(M) - m(0))

so that a circuit which is all that matters has faithfulness 1 and completeness 0. Features are
found anew in each run, from what they read there. Errors, and positions that SAEs do not read, are
left as they are in each. What is ablated is set to 0, or to the feature's mean over the positions
that SAEs read in all the prompts given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activations import Model
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
    for each in placed:
        if each.sae.concatenates:
            raise InputError(
                "a cross-layer transcoder's features are not ablated one by one",
                where="faithfulness",
                given=each.read[0],
            )
    for graph in graphs:
        _check_made_with(graph, placed)
    means = _means(model, placed, graphs) if ablation == "mean" else [None] * len(placed)
    generator = np.random.default_rng(seed)
    rows = [
        _of_prompt(_Ablated(model, placed, means, graph), counts, draws, generator)
        for graph in graphs
    ]
    named = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return Curve(counts=list(counts), **named)


def _check_made_with(graph: Graph, placed: Sequence[Placement]) -> None:
    own = {each.read[0]: each for each in placed}
    for node in graph.nodes_of(FEATURE):
        site = graph.sites[graph.site[node]]
        if site not in own or graph.number[node] >= own[site].sae.d_sae:
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
        placed: Sequence[Placement],
        means: Sequence[Tensor | None],
        graph: Graph,
    ) -> None:
        self.graph = graph
        self._model = model
        self._placed = placed
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
        tokens = torch.tensor([graph.token_ids])
        read_here = self._model.keep_mask(tokens)[0].to(self._model.device)
        seen: dict[str, Tensor] = {}
        edits: dict[str, Any] = {}
        for placed, means in zip(self._placed, self._means, strict=True):
            read, written = placed.read[0], placed.written[0]
            own = [
                nodes[np.array([graph.sites[s] == read for s in graph.site[nodes]], bool)]
                for nodes in sets
            ]

            def change(h: Tensor, _: object, placed=placed, means=means, own=own) -> Tensor:
                x = h if placed.read == placed.written else seen[placed.read[0]]
                sae = placed.sae
                rows = x[:, read_here].reshape(-1, x.shape[-1])
                active = sae.encode(rows.to(sae.W_dec)).float()
                active = active.view(len(h), -1, sae.d_sae)
                gone = torch.ones_like(active, dtype=torch.bool)
                at = read_here.long().cumsum(0) - 1
                for row, nodes in enumerate(own):
                    where = at[torch.from_numpy(graph.position[nodes]).long()]
                    gone[row, where, torch.from_numpy(graph.number[nodes])] = False
                off = active if means is None else active - means
                lost = off.masked_fill(gone == invert, 0.0) @ sae.W_dec.float()
                h = h.clone()
                h[:, read_here] -= lost.to(h)
                return h

            def see(x: Tensor, _: object, read=read) -> None:
                seen[read] = x.clone()

            edits[written] = change
            if read != written:
                edits[read] = see
        return edits


def _outputs(model: Model, graph: Graph) -> Outputs:
    """What a graph explains, its weights as they were when it was made."""
    nodes = graph.facts["outputs"]
    wanted = [tuple(each) if isinstance(each, list) else each for each in nodes]
    return outputs_of(model, graph.token_ids, wanted, most=1, probability=1)


@torch.no_grad()
def _means(model: Model, placed: Sequence[Placement], graphs: Sequence[Graph]) -> list[Tensor]:
    """Each feature's mean activation [d_sae] over what SAEs read of all prompts, by SAE."""
    totals = [torch.zeros(each.sae.d_sae) for each in placed]
    rows = 0
    for graph in graphs:
        tokens = torch.tensor([graph.token_ids])
        kept = model.keep_mask(tokens)[0]
        found = model.capture(tokens, list({each.read[0] for each in placed}))
        rows += int(kept.sum())
        for total, each in zip(totals, placed, strict=True):
            x = found[each.read[0]][0][kept]
            total += each.sae.encode(x.to(each.sae.W_dec)).float().sum(0).cpu()
    return [(total / max(rows, 1)).to(model.device) for total in totals]
