"""Edges and active features made into a `Graph`."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activations.sites.names import layer_of
from sae.circuits.cut_run import FINAL
from sae.circuits.graph import EMBEDDING, ERROR, FEATURE, LOGIT, Graph
from sae.circuits.outputs import Outputs
from sae.circuits.rows import EdgeRows

Into = tuple[NDArray[np.float32], NDArray[np.float32]]
"""edges into features [features, width] and into outputs [outputs, width]"""


def assemble(rows: EdgeRows, outputs: Outputs, features: NDArray[np.int64], into: Into) -> Graph:
    """The graph of some of the active features; what the others write goes to the errors.

    Args: features are indices among all active ones, each with its row of `into`.
    """
    order = np.argsort(features, kind="stable")
    features = features[order]
    columns, model = rows.columns, rows.model
    edges = folded(np.concatenate([into[0][order], into[1]]), rows, features)
    sources = np.concatenate([features, np.arange(columns.features, columns.width)])
    nodes: dict[str, Any] = _columns(
        [_features(rows, features), _errors(rows), _embeddings(rows), _outputs(rows, outputs)]
    )
    size = len(nodes["kind"])
    targets = np.r_[: len(features), size - len(into[1]) : size]
    adjacency = np.zeros((size, size), np.float32)
    adjacency[targets[:, None], np.arange(len(sources))] = edges[:, sources]
    if not rows.linear:  # there is no run without nodes; what is not accounted for is the rest
        nodes["bias"][targets] = nodes["value"][targets] - adjacency[targets].sum(1)
    texts = {str(t): text for t, text in zip(outputs.token, outputs.text, strict=True)}
    return Graph(
        prompt="".join(model.token_strings(rows.tokens)),
        token_ids=list(rows.tokens),
        tokens=model.token_strings(rows.tokens),
        model=model.name,
        n_layers=model.n_layers,
        sites=[part.read for part in rows.parts],
        saes=[part.name for part in rows.parts],
        method="linear" if rows.linear else "gradient",
        **nodes,
        influence=np.zeros(size),
        cumulative=np.ones(size),
        adjacency=adjacency,
        facts={
            "logit_tokens": texts,
            "outputs": [list(each) if isinstance(each, tuple) else each for each in outputs.pairs],
            "sae_hashes": [part.sae_hash for part in rows.parts],
            "active_features": columns.features,
            "left_out": columns.features - len(features),
        },
    )


def folded(
    edges: NDArray[np.float32], rows: EdgeRows, features: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The edges [targets, width] with those from other features added to their site's errors."""
    columns = rows.columns
    left = np.ones(columns.features, bool)
    left[features] = False
    for index, part in enumerate(rows.parts):
        position = part.position.cpu().numpy()
        start = columns.starts[index]
        own = np.flatnonzero(left[start : start + len(position)])
        if len(own):
            to = np.zeros((len(own), columns.n_pos), np.float32)
            to[np.arange(len(own)), position[own]] = 1
            edges[:, columns.errors(index)] += edges[:, start + own] @ to
    return edges


def _features(rows: EdgeRows, features: NDArray[np.int64]) -> dict[str, Any]:
    counts = [len(part.number) for part in rows.parts]
    site = np.repeat(np.arange(len(counts)), counts)[features]
    layer = np.array([_layer(rows, part.read) for part in rows.parts])[site]
    parts = rows.parts
    chosen = torch.from_numpy(features)
    position, number, activation, bias = (
        torch.cat([getattr(part, name).cpu() for part in parts])[chosen].numpy()
        for name in ("position", "number", "activation", "bias")
    )
    constant = torch.zeros(0)
    if rows.linear:
        found = [rows.whole.from_biases[p.read][p.position] for p in parts]
        dots = [(x * p.encoder).sum(1) for x, p in zip(found, parts, strict=True)]
        constant = torch.cat([dot.cpu() for dot in dots])[chosen]
    return {
        "kind": np.full(len(features), FEATURE),
        "site": site,
        "layer": layer,
        "position": position,
        "number": number,
        "activation": activation,
        "value": activation,
        "bias": bias + constant.numpy() if rows.linear else bias,
    }


def _errors(rows: EdgeRows) -> dict[str, Any]:
    n_pos, parts = rows.columns.n_pos, rows.parts
    layers = [_layer(rows, part.read) for part in parts]
    count = len(parts) * n_pos
    return {
        "kind": np.full(count, ERROR),
        "site": np.repeat(np.arange(len(parts)), n_pos),
        "layer": np.repeat(layers, n_pos),
        "position": np.tile(np.arange(n_pos), len(parts)),
        "number": np.full(count, -1),
        "activation": torch.cat([part.error.norm(dim=1).cpu() for part in parts]).numpy(),
    }


def _embeddings(rows: EdgeRows) -> dict[str, Any]:
    n_pos = rows.columns.n_pos
    return {
        "kind": np.full(n_pos, EMBEDDING),
        "site": np.full(n_pos, -1),
        "layer": np.full(n_pos, -1),
        "position": np.arange(n_pos),
        "number": np.asarray(rows.tokens),
        "activation": rows.embedding.norm(dim=1).cpu().numpy(),
    }


def _outputs(rows: EdgeRows, outputs: Outputs) -> dict[str, Any]:
    count = len(outputs.token)
    value, bias = (
        _logits(x[-1], outputs)
        for x in (
            rows.whole.read[FINAL][0].detach(),
            rows.whole.from_biases.get(FINAL, torch.zeros(1, outputs.direction.shape[1])),
        )
    )
    return {
        "kind": np.full(count, LOGIT),
        "site": np.full(count, -1),
        "layer": np.full(count, rows.model.n_layers),
        "position": np.full(count, rows.columns.n_pos - 1),
        "number": np.asarray(outputs.token),
        "activation": outputs.probability.numpy(),
        "value": value,
        "bias": bias,
        "weight": outputs.weight.numpy(),
    }


def _logits(x: Tensor, outputs: Outputs) -> NDArray[np.float32]:
    return (outputs.direction @ x.float().cpu() + outputs.bias).numpy()


def _columns(groups: list[dict[str, Any]]) -> dict[str, NDArray[Any]]:
    """The groups one after another; what a group does not say is 0."""
    names = list(dict.fromkeys(name for group in groups for name in group))
    return {
        name: np.concatenate([group.get(name, np.zeros(len(group["kind"]))) for group in groups])
        for name in names
    }


def _layer(rows: EdgeRows, site: str) -> int:
    """The block of a site; sites of no block count as the first."""
    found = layer_of(site)
    return 0 if found is None else found
