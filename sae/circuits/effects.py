"""What each node is worth to the outputs, through the whole model: by gradients, and exactly.

The amount that is explained is m = sum of weight * logit over a graph's outputs. What a node adds
to m is m less what m is without it: without the feature's part of what is written at its site, the
model behind going on by itself. `ablation_effects` measures that, a run a node. Two estimates take
a few runs for all nodes (Marks et al. 2024, arXiv 2403.19647, section 3):

    gradient     the gradient of m at the node's site, times what the node writes
    integrated   the same, the gradient a mean over the way from a site without all of its nodes
                 (biases alone) to the site as it is, one site at a time (Sundararajan et al. 2017)

The way of a site of the stream itself begins at a stream of nearly zero, where a norm makes much of
the least change. Few points on the way see nothing of that stretch: what they estimate is nearer to
single nodes' ablation for it, and does not add up to what the site does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activations import Model
from activations.models.frozen import frozen
from sae.circuits.cut_run import EMBEDDING, FINAL
from sae.circuits.outputs import Outputs
from sae.circuits.parts import Part
from saescope.integers import as_index

Estimate = Literal["gradient", "integrated"]
STEPS = 10
"""points on the way of integrated gradients"""


@dataclass(frozen=True)
class Effects:
    """What nodes add to m, by part: positive where m would be less without the node."""

    features: list[NDArray[np.float32]]
    """by part [features], as the part orders them"""
    errors: list[NDArray[np.float32]]
    """by part [pos]"""
    embeddings: NDArray[np.float32]
    """[pos]"""

    def row(self) -> NDArray[np.float32]:
        """All of them as `sae.circuits.rows.Columns` orders them."""
        return np.concatenate([*self.features, *self.errors, self.embeddings])


def estimated_effects(
    model: Model,
    parts: Sequence[Part],
    tokens: Sequence[int],
    embedding: Tensor,
    outputs: Outputs,
    estimate: Estimate = "gradient",
    steps: int = STEPS,
) -> Effects:
    """Effects of all nodes of a prompt by gradients, in one run or in `steps` runs a site."""
    steps = as_index(steps, where="steps", low=1)
    sites = [EMBEDDING, *(part.written for part in parts)]
    if estimate == "gradient":
        slopes = _slopes(model, tokens, outputs, sites)
    else:
        ways = dict(zip(sites, [torch.zeros_like(embedding), *_constants(parts)], strict=True))
        slopes = {}
        for site, base in ways.items():
            found = [
                _slopes(model, tokens, outputs, [site], base, (step + 0.5) / steps)[site]
                for step in range(steps)
            ]
            slopes[site] = torch.stack(found).mean(0)
    features, errors = [], []
    for part in parts:
        writes = {part.written: part.decoder, **part.later}
        worth = [(slopes[site][part.position] * each).sum(1) for site, each in writes.items()]
        features.append(_numpy(torch.stack(worth).sum(0)))
        errors.append(_numpy((slopes[part.written] * part.error).sum(1)))
    return Effects(features, errors, _numpy((slopes[EMBEDDING] * embedding).sum(1)))


def _numpy(x: Tensor) -> NDArray[np.float32]:
    return x.float().cpu().numpy()


def _constants(parts: Sequence[Part]) -> list[Tensor]:
    return [part.constant for part in parts]


def _slopes(
    model: Model,
    tokens: Sequence[int],
    outputs: Outputs,
    sites: Sequence[str],
    base: Tensor | None = None,
    share: float = 1.0,
) -> dict[str, Tensor]:
    """The gradient of m at each site [pos, d], float32.

    Args: with base [pos, d], at the point of the way from it to the activation that is this share.
    """
    leaves: dict[str, Tensor] = {}
    final: list[Tensor] = []

    def leaf(x: Tensor, site: str) -> Tensor:
        if base is not None:
            start = base[None].to(x)
            x = (start + share * (x - start)).detach()
        x = x.clone() if x.requires_grad else x.detach().clone().requires_grad_()
        leaves[site] = x
        return x

    edits: dict[str, Any] = {site: lambda x, _position, site=site: leaf(x, site) for site in sites}

    def see(x: Tensor, _position: object) -> None:
        final.append(x)

    edits[FINAL] = see
    with frozen(model, hold=False) as own, torch.enable_grad(), model.edit(edits):
        own.run(torch.tensor([list(tokens)]))
        m = measured(final[0], outputs)[0]
        found = torch.autograd.grad(m, list(leaves.values()), allow_unused=True)
    return {
        site: torch.zeros_like(leaves[site][0]).float() if each is None else each[0].float()
        for site, each in zip(leaves, found, strict=True)
    }


def measured(final: Tensor, outputs: Outputs) -> Tensor:
    """m [batch] of what the unembedding reads [batch, pos, d_model]."""
    direction = (outputs.weight @ outputs.direction).to(final.device)
    bias = float(outputs.weight @ outputs.bias)
    return final[:, -1].float() @ direction + bias


@torch.no_grad()
def ablation_effects(
    model: Model,
    tokens: Sequence[int],
    outputs: Outputs,
    nodes: Sequence[tuple[str, int, Tensor]],
    batch: int = 32,
) -> NDArray[np.float32]:
    """Effects measured exactly, one run a node, so many at once.

    Args: nodes are sites, positions, and what each node writes there [d].

    Returns m less m without the node, for each.
    """
    found = []
    clean = run_measured(model, tokens, outputs, {})
    for start in range(0, len(nodes), batch):
        chosen = nodes[start : start + batch]
        edits: dict[str, Any] = {}
        for site in {name for name, _, _ in chosen}:
            own = [(row, at, v) for row, (name, at, v) in enumerate(chosen) if name == site]
            rows, positions = (torch.tensor([each[n] for each in own]) for n in (0, 1))
            vectors = torch.stack([each[2] for each in own])

            def without(x: Tensor, _: object, rows=rows, at=positions, v=vectors) -> Tensor:
                x = x.clone()
                x[rows, at] -= v.to(x)
                return x

            edits[site] = without
        lost = clean - run_measured(model, tokens, outputs, edits, copies=len(chosen))
        found.append(_numpy(lost))
    return np.concatenate(found) if found else np.zeros(0, np.float32)


@torch.no_grad()
def run_measured(
    model: Model, tokens: Sequence[int], outputs: Outputs, edits: Mapping[str, Any], copies: int = 1
) -> Tensor:
    """m [copies] of as many copies of a text, in runs with edits by site."""
    final: list[Tensor] = []

    def see(x: Tensor, _position: object) -> None:
        final.append(x.clone())

    with model.edit(edits), model.edit({FINAL: see}):
        model.hf.base_model(
            input_ids=torch.tensor([list(tokens)]).expand(copies, -1).to(model.device),
            use_cache=False,
        )
    return measured(final[0], outputs)
