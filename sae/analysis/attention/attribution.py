"""Direct feature attribution (DFA): what a feature's pre-activation is made of, as an exact sum.

A pre-activation is linear in what the SAE reads, x W_enc + bias, and x is a sum:

    attn.hook_z    of the heads side by side, each a sum over source positions of
                   pattern[source] * v[source]
    hook_attn_out  the same, through W_O (and the norm behind it, where a model has one)
    hook_resid_*   of the embedding, and what the attention heads (over sources, as above) and the
                   MLPs of the layers before have added

(Kissane et al. 2024, arXiv 2406.17759; Elhage et al. 2021, "A Mathematical Framework for
Transformer Circuits").

So the pre-activation is the sum over these of their product with the encoder's direction, plus the
biases. Nothing is approximated, but two things are held as they were in the run: attention's
patterns, and the scale of a norm between a head and the stream. What made them so (queries, keys,
what the norm saw) gets no share. Values are counted with their bias. With grouped queries head h
reads the values of key-value head h // (heads / key-value heads).

The SAE's normaliser. A scale that is the same for all rows, and a mean, are folded into the weights
and biases. A normaliser of each row ("standardised", the LayerNorm without a gain) takes the row's
mean off, which is linear, and divides by its deviation, held as it was: in the model's units that
division leaves x and multiplies the biases. SAEs behind a tuned lens are refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activations import Model
from activations.models.attention import (
    TOLERANCE,
    AttentionRun,
    HeadOutputs,
    run_with_patterns,
)
from sae.analysis.attention.encoder import Encoder, read_at
from sae.analysis.attention.head_values import HeadValues
from sae.core.base import SparseAutoencoder
from sae.data.token_ids import token_ids
from saescope.errors import InputError
from saescope.integers import as_index


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """One feature at one position: all that its pre-activation there is the sum of.

    In the model's units, as feature activations are:
    sources.sum() + sum(components.values()) + sum(biases.values()) + rounding = pre_activation.
    """

    feature: int
    site: str
    token_ids: list[int]
    """of the text up to `position`, which the model reads no further"""
    tokens: list[str]
    """their displayable texts"""
    position: int
    """where the feature was read: the destination"""
    pre_activation: float
    """x W_enc + bias, before the SAE chooses which features fire (a gated SAE's magnitude)"""
    activation: float
    """the feature's activation, 0 where it does not fire"""
    heads: list[tuple[int, int]]
    """(layer, head) of each row of `sources`"""
    sources: NDArray[np.float64]
    """[heads, position + 1]: what each head brought from each source position"""
    components: dict[str, float]
    """what did not come through a head: "embedding", "MLP 0", "MLP 1", ..."""
    biases: dict[str, float]
    """of the SAE's encoder and decoder, and of the attention's output"""
    rounding: float
    """what the model's precision leaves over"""

    @property
    def by_head(self) -> NDArray[np.float64]:
        """Each head's share [heads], summed over sources."""
        return self.sources.sum(axis=1)

    @property
    def by_source(self) -> NDArray[np.float64]:
        """What heads brought from each position [position + 1], summed over heads."""
        return self.sources.sum(axis=0)

    def negated(self) -> "Attribution":
        """The same for the negative end of a signed SAE's feature."""
        return replace(
            self,
            pre_activation=-self.pre_activation,
            activation=-self.activation,
            sources=-self.sources,
            components={name: -value for name, value in self.components.items()},
            biases={name: -value for name, value in self.biases.items()},
            rounding=-self.rounding,
        )


@torch.no_grad()
def attribute(
    model: Model,
    sae: SparseAutoencoder,
    text: str | Sequence[int],
    feature: int,
    position: int | None = None,
    *,
    site: str | None = None,
    allow_other_model: bool = False,
) -> Attribution:
    """Where a feature's pre-activation at one position of a text comes from.

    Args:
        text: a text, or token ids of one (with BOS, where the model uses one).
        position: index of the token at which the feature is read; by default the one at which its
            pre-activation is the largest (of either sign, for a signed SAE).
        site: where, if not the site the SAE was trained at; which layer, for one of several.
        allow_other_model: read a model with an SAE that was trained on another; it is said.

    Raises InputError for a site other than attn.hook_z, hook_attn_out and hook_resid_* of a block,
    an SAE without a linear pre-activation (matching pursuit), a crosscoder, a position that SAEs do
    not read, a text of more than 1024 tokens up to it, and a model whose attention or residual
    stream is another sum (gates on heads, norms after the sums of the stream).

    >>> found = attribute(model, sae, "The old harbour lay quiet", 123)        # doctest: +SKIP
    >>> found.tokens[found.by_source.argmax()]                                 # doctest: +SKIP
    ' harbour'
    """
    own, read, layer, name = read_at(model, sae, site, allow_other_model)
    encoder = Encoder.of(own, as_index(feature, where="feature", low=0, high=own.d_sae - 1))
    ids = token_ids(model, text, name="text", where="attribute")
    position = destination_of(model, encoder, ids, read, position)
    ids = ids[: position + 1]
    parts = Parts(model, encoder.direction, layer, name)
    run = run_with_patterns(model, ids, parts.needed())
    x = run.at[read][position]
    parts.take_apart(run, position)
    pre_activation = float(encoder.pre_activation(x[None])[0])
    biases = {**encoder.biases(x), **parts.biases}
    sources = np.concatenate(parts.sources) if parts.sources else np.zeros((0, position + 1))
    every = np.asarray([*sources.flat, *parts.components.values(), *biases.values()])
    return Attribution(
        feature=encoder.feature,
        site=read,
        token_ids=ids,
        tokens=model.token_strings(ids),
        position=position,
        pre_activation=pre_activation,
        activation=encoder.activation(x, pre_activation, float(np.abs(every).sum())),
        heads=parts.heads,
        sources=sources,
        components=parts.components,
        biases=biases,
        rounding=pre_activation - float(every.sum()),
    )


def destination_of(
    model: Model, encoder: "Encoder", ids: list[int], site: str, position: int | None
) -> int:
    """The position asked for, or that of the largest pre-activation. Raises InputError if none."""
    tokens = torch.tensor([ids])
    keep = model.keep_mask(tokens)[0]
    if position is not None:
        chosen = as_index(position, where="position", low=0, high=len(ids) - 1)
        if not keep[chosen]:
            raise InputError(
                "SAEs read neither a text's first token nor special tokens",
                where="position",
                given=chosen,
            )
        return chosen
    if not bool(keep.any()):
        raise InputError(
            "SAEs read neither a text's first token nor special tokens, and this text has no other",
            where="text",
        )
    x = model.capture(tokens, [site])[site][0].double().cpu()
    found = encoder.pre_activation(x)
    found = found.abs() if encoder.sae.signed else found
    return int(found.masked_fill(~keep, -torch.inf).argmax())


class Parts:
    """The parts of what is read at a position of a run, and a direction's product with each.

    The names of the model's sites are TransformerLens'.
    """

    def __init__(self, model: Model, direction: Tensor, layer: int, name: str) -> None:
        self._model = model
        self.site = f"blocks.{layer}.{name}"
        self._direction = direction
        self._only_heads = name == "attn.hook_z"
        self.is_stream = name.startswith("hook_resid")
        after_attention = name in ("hook_resid_mid", "hook_resid_post")
        first = 0 if self.is_stream else layer
        last = layer + 1 if after_attention or not self.is_stream else layer
        self.attention = range(first, last)
        """layers whose heads have a share"""
        self._mlps = range(layer + (name == "hook_resid_post") if self.is_stream else 0)
        self.heads: list[tuple[int, int]] = []
        self.sources: list[NDArray[np.float64]] = []
        self.components: dict[str, float] = {}
        self.biases: dict[str, float] = {}
        self.behind: dict[int, Tensor] = {}
        """by layer, the direction [d_z] along which its heads are read at the position"""

    def stream(self) -> dict[str, str]:
        """The sites that add up to the residual stream, by the names of the components."""
        if not self.is_stream:
            return {}
        attention = {f"attention {n}": f"blocks.{n}.hook_attn_out" for n in self.attention}
        mlps = {f"MLP {n}": f"blocks.{n}.hook_mlp_out" for n in self._mlps}
        return {"embedding": "blocks.0.hook_resid_pre", **attention, **mlps}

    def needed(self) -> list[str]:
        """The sites that a run has to keep."""
        names = ["attn.hook_v", "attn.hook_z", *([] if self._only_heads else ["hook_attn_out"])]
        own = [f"blocks.{layer}.{name}" for layer in self.attention for name in names]
        return list(dict.fromkeys([self.site, *own, *self.stream().values()]))

    def take_apart(self, run: AttentionRun, position: int) -> None:
        """Fill in the terms of what is read at a position.

        Raises InputError where the residual stream, or a head, is another sum.
        """
        self._check_stream(run, position)
        for name, site in self.stream().items():
            if not name.startswith("attention"):
                self.components[name] = float(run.at[site][position] @ self._direction)
        for layer in self.attention:
            behind = self.behind[layer] = self._behind(run, layer, position)
            found = HeadValues.of(self._model, run, layer, position).brought(behind, position)
            self.heads += [(layer, head) for head in range(len(found))]
            self.sources.append(found.numpy())

    def _behind(self, run: AttentionRun, layer: int, position: int) -> Tensor:
        """The direction [d_z] along which heads are read; the bias behind them is a term too."""
        if self._only_heads:
            return self._direction
        block = f"blocks.{layer}."
        z, attn_out = (run.at[block + name][position] for name in ("attn.hook_z", "hook_attn_out"))
        out = HeadOutputs.of(self._model, layer)
        through = out.multiplier(z, attn_out) * self._direction
        if out.bias is not None:
            self.biases[f"attention {layer} output bias"] = float(out.bias @ through)
        return out.weight @ through

    def rows(self) -> list[list[float]]:
        """What each of `heads` brought from each source position."""
        return [row for block in self.sources for row in block.tolist()]

    def _check_stream(self, run: AttentionRun, position: int) -> None:
        added = [run.at[site][position] for site in self.stream().values()]
        if not added:
            return
        off = (torch.stack(added).sum(0) - run.at[self.site][position]).norm()
        if off > TOLERANCE[self._model.dtype] * sum(float(a.norm()) for a in added):
            raise InputError(
                "the residual stream is not the sum of what attention and MLPs add to it",
                where=self._model.spec,
                allowed="models without norms behind the sums of their stream",
            )
