"""Recursive attribution: from a feature back through attention to the features of SAEs before it.

A feature of attention's outputs is a sum over heads and source positions (`attribution`). What a
head brings from a source is linear in the residual stream there, once the pattern and the scale of
the norm before attention are held as they were in the run:

    pattern[head, s] * (scale[s] * gain * x[s]) W_V . u + a constant

and an SAE of the residual stream writes x[s] = sum_j f_j(s) W_dec[j] + b_dec + error(s). So each
head and source is a sum over features at the source, which can be taken apart in turn (recursive
DFA: Kissane et al. 2024, arXiv 2406.17759, section 4.2; frozen scales as in Elhage et al. 2021).

Every node's children sum to it, but for rounding. The error of an SAE is a child like any other:
what its features leave unexplained is not theirs. At a position that SAEs do not read (a text's
first token, special tokens) the whole stream is one child. A feature's own share is passed on in
proportion to its pre-activation's terms, so it must be its pre-activation where it fires. What made
patterns and scales so has no share.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from activations import Model
from activations.models.attention import AttentionRun, run_with_patterns
from activations.models.attention_values import ValueMap
from sae.analysis.attention.attribution import Parts, destination_of
from sae.analysis.attention.encoder import Encoder, read_at
from sae.analysis.attention.head_values import HeadValues
from sae.core.base import SparseAutoencoder
from sae.data.token_ids import token_ids
from saescope.errors import InputError, check_range
from saescope.integers import as_index


@dataclass(frozen=True, kw_only=True)
class Node:
    """A part of a feature's pre-activation, and what it is the sum of in turn."""

    kind: str
    """feature, head, component, bias, error, stream (at a position that SAEs do not read) or rest
    (all others of its parent, together)"""
    name: str
    position: int
    """of the text: where the feature fires, or which source the head reads"""
    value: float
    """its share of the root's pre-activation, in the model's units"""
    feature: int | None = None
    site: str | None = None
    """of a feature"""
    activation: float | None = None
    """of a feature, 0 where it does not fire"""
    children: tuple["Node", ...] = ()
    """none of a node that was not taken apart"""

    def walk(self) -> Iterator["Node"]:
        """This node and all below it."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True)
class _Upstream:
    """An SAE of the residual stream that a layer's attention reads."""

    sae: SparseAutoencoder
    site: str
    layer: int
    """of the site"""
    name: str
    """of the site within its block"""


@dataclass(frozen=True)
class _Question:
    """What all levels need."""

    model: Model
    run: AttentionRun
    keep: list[bool]
    upstream: dict[int, _Upstream]
    """by the layer whose attention reads it"""
    top: int
    maps: dict[int, ValueMap] = field(default_factory=dict)
    heads: dict[int, HeadValues] = field(default_factory=dict)

    def map_of(self, layer: int) -> ValueMap:
        if layer not in self.maps:
            self.maps[layer] = ValueMap.of(self.model, self.run, layer)
        return self.maps[layer]

    def heads_of(self, layer: int) -> HeadValues:
        if layer not in self.heads:
            self.heads[layer] = HeadValues.of(self.model, self.run, layer)
        return self.heads[layer]


@torch.no_grad()
def attribute_recursively(
    model: Model,
    sae: SparseAutoencoder,
    text: str | Sequence[int],
    feature: int,
    position: int | None = None,
    *,
    upstream: Sequence[SparseAutoencoder],
    depth: int = 1,
    top: int = 8,
    site: str | None = None,
    allow_other_model: bool = False,
) -> Node:
    """Where a feature comes from, through the features of SAEs of the residual stream before it.

    Args:
        text, feature, position, site: as `attribute`'s.
        upstream: SAEs at hook_resid_pre, or at hook_resid_post of the layer before, each for the
            attention layer that reads the stream there.
        depth: how many times features are taken apart after the first.
        top: how many heads with a source, and how many features, are kept a node, the largest; the
            others are one child of kind "rest".

    Raises InputError as `attribute` does; for an upstream SAE elsewhere, two for one layer, or one
    with a normaliser of each row; and for a layer whose values are not the stream through one norm
    and one matrix.

    >>> root = attribute_recursively(model, sae, text, 5, upstream=[stream_sae])  # doctest: +SKIP
    >>> [(n.name, n.value) for n in root.children[0].children]                    # doctest: +SKIP
    """
    check_range("depth", depth, low=1)
    check_range("top", top, low=1)
    own, read, layer, name = read_at(model, sae, site, allow_other_model)
    before = _upstream(model, upstream, allow_other_model)
    encoder = Encoder.of(own, as_index(feature, where="feature", low=0, high=own.d_sae - 1))
    ids = token_ids(model, text, name="text", where="attribute")
    position = destination_of(model, encoder, ids, read, position)
    ids = ids[: position + 1]
    root = Parts(model, encoder.direction, layer, name)
    run = run_with_patterns(model, ids, _sites(model, root, before))
    keep = model.keep_mask(torch.tensor([ids]))[0].tolist()
    asked = _Question(model, run, keep, before, top)
    return _feature_node(asked, encoder, (read, layer, name), position, None, depth)


def _upstream(
    model: Model, saes: Sequence[SparseAutoencoder], allow_other_model: bool
) -> dict[int, _Upstream]:
    found: dict[int, _Upstream] = {}
    for each in saes:
        own, read, layer, name = read_at(model, each, None, allow_other_model)
        reader = {"hook_resid_pre": layer, "hook_resid_post": layer + 1}.get(name)
        if reader is None or each.transcodes:
            raise InputError(
                "attention reads the residual stream between blocks",
                where="upstream",
                given=read,
                allowed="SAEs at blocks.N.hook_resid_pre or blocks.N.hook_resid_post",
            )
        if own.normaliser.kind == "standardised":
            raise InputError(
                "has a normaliser of each row, so what it writes is no sum over its features",
                where="upstream",
                given=read,
            )
        if reader in found:
            raise InputError(f"two SAEs of what layer {reader} reads", where="upstream", given=read)
        found[reader] = _Upstream(own, read, layer, name)
    return found


def _sites(model: Model, root: Parts, upstream: dict[int, _Upstream]) -> list[str]:
    wanted = root.needed()
    for reader, each in upstream.items():
        if reader < model.n_layers:
            wanted += [*ValueMap.needed(model, reader), f"blocks.{reader}.attn.hook_z"]
        wanted += Parts(model, each.sae.W_dec[0], each.layer, each.name).needed()
    return list(dict.fromkeys(wanted))


def _feature_node(
    asked: _Question,
    encoder: Encoder,
    where: tuple[str, int, str],
    position: int,
    value: float | None,
    depth: int,
) -> Node:
    """A feature at a position, taken apart; value is its share, None for the root's own.

    `depth` features may follow one another below it.
    """
    site, layer, name = where
    x = asked.run.at[site][position]
    pre_activation = float(encoder.pre_activation(x[None])[0])
    weight = 1.0 if value is None else value / pre_activation
    parts = Parts(asked.model, encoder.direction, layer, name)
    parts.take_apart(asked.run, position)
    cells = [
        (head, source, amount)
        for head, row in zip(parts.heads, parts.rows(), strict=True)
        for source, amount in enumerate(row)
    ]
    cells.sort(key=lambda cell: -abs(cell[2]))
    children = [
        _head_node(asked, parts, cell, position, weight, depth) for cell in cells[: asked.top]
    ]
    rest = sum(amount for _, _, amount in cells[asked.top :])
    children.append(_leaf("rest", "other heads and sources", position, weight * rest))
    biases = {**encoder.biases(x), **parts.biases}
    for kind, terms in (("component", parts.components), ("bias", biases)):
        children += [_leaf(kind, each, position, weight * terms[each]) for each in terms]
    size = sum(abs(amount) for _, _, amount in cells) + sum(
        abs(amount) for terms in (parts.components, biases) for amount in terms.values()
    )
    return Node(
        kind="feature",
        name=f"{site} {encoder.feature}",
        position=position,
        value=weight * pre_activation,
        feature=encoder.feature,
        site=site,
        activation=encoder.activation(x, pre_activation, size),
        children=tuple(children),
    )


def _leaf(kind: str, name: str, position: int, value: float | Tensor) -> Node:
    return Node(kind=kind, name=name, position=position, value=float(value))


def _head_node(
    asked: _Question,
    parts: Parts,
    cell: tuple[tuple[int, int], int, float],
    destination: int,
    weight: float,
    depth: int,
) -> Node:
    """What a head brought from a source, taken apart where an SAE of what it read is given.

    Args: cell is the head, its source and what it brought; weight, the feature's share of the root
    over its pre-activation.
    """
    (layer, number), source, amount = cell
    node = _leaf("head", f"head {layer}.{number}", source, weight * amount)
    before = asked.upstream.get(layer)
    if before is None:
        return node
    heads, values = asked.heads_of(layer), asked.map_of(layer)
    behind = parts.behind[layer].view(heads.heads, -1)[number]
    width = len(values.constant)
    group = number * width // (heads.heads * len(behind))
    direction = torch.zeros(width, dtype=torch.float64)
    direction[group * len(behind) : (group + 1) * len(behind)] = behind
    direction *= weight * float(heads.pattern[number, destination, source])
    constant = float(values.constant @ direction)
    children = _stream(asked, before, values.back(direction, source), source, depth)
    children.append(_leaf("bias", f"values of layer {layer}", source, constant))
    return replace(node, children=tuple(children))


def _stream(
    asked: _Question, before: _Upstream, direction: Tensor, position: int, depth: int
) -> list[Node]:
    """The residual stream at a position, along a direction, as what an SAE makes of it."""
    x = asked.run.at[before.site][position]
    if not asked.keep[position]:
        return [_leaf("stream", "residual stream, where no SAE reads", position, x @ direction)]
    sae = before.sae
    codes = sae.encode_sparse(x[None].to(sae.W_dec)).compact()
    index, value = codes.index.long().cpu(), codes.value.double().cpu()
    written = value[:, None] * sae.W_dec[index.to(sae.W_dec.device)].double().cpu()
    bias = sae.b_dec.double().cpu()
    shares = written @ direction
    order = shares.abs().argsort(descending=True, stable=True).tolist()
    children = []
    for entry in order[: asked.top]:
        encoder, share = Encoder.of(sae, int(index[entry])), float(shares[entry])
        if depth > 1 and share:
            where = (before.site, before.layer, before.name)
            children.append(_feature_node(asked, encoder, where, position, share, depth - 1))
            continue
        leaf = _leaf("feature", f"{before.site} {encoder.feature}", position, share)
        known = {"feature": encoder.feature, "site": before.site}
        children.append(replace(leaf, **known, activation=float(value[entry])))
    rest = float(shares[order[asked.top :]].sum())
    error = (x - written.sum(0) - bias) @ direction
    return [
        *children,
        _leaf("rest", "other features", position, rest),
        _leaf("error", f"error of the SAE at {before.site}", position, error),
        _leaf("bias", f"SAE decoder bias at {before.site}", position, bias @ direction),
    ]
