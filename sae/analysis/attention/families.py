"""Head polysemanticity: which families of features share an attention head, by measure.

Where a feature fires, what each head brought to it from each source (`attribution`) says what it
goes by. Of what raises its pre-activation, the shares of kinds of source (`source_classes`) are
averaged over where it fires, weighted by its activation. The first token apart, which heads attend
to when they have nothing to say, a feature is of the family that has more than half: induction,
local, middle or long-range; else it is mixed.

A feature belongs to the head that has most of its decoder (`heads`). The table says for each head
how its features divide into families, beside two nulls:

    random directions   each feature's direction replaced by a random one of the same length within
                        each head, read at the same places: what the head's patterns alone make
    other heads         as many features drawn from all heads: whether a head's own features are
                        more alike than any

Alikeness is the effective number of families, exp of their entropy: 1 where all are of one family.
Intervals are over texts: groups of texts are drawn anew, and families decided again.

Kissane et al. (2024, arXiv 2406.17759, section 4) judged the ten top features of each of GPT-2's
144 heads by eye and called 9 of 10 heads polysemantic. This is their question, not their method.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activations import Model
from activations.models.attention import HeadOutputs, run_with_patterns
from sae.analysis.attention.encoder import Encoder, read_at
from sae.analysis.attention.head_values import HeadValues
from sae.analysis.attention.heads import attention_site
from sae.analysis.attention.source_classes import CLASSES, FAMILIES, Distances, source_classes
from sae.core.base import SparseAutoencoder
from saescope.errors import check_range
from saescope.progress import Progress

GROUPS = 16
"""of texts, drawn anew for intervals"""
_ENTRIES = 1024
"""firings taken apart at once"""
MIXED = len(FAMILIES)
"""the number of no family"""


@dataclass(frozen=True, kw_only=True)
class FeatureSources:
    """What features go by: sums over the places where they fire, by group of texts."""

    layer: int
    firings: NDArray[np.int64]
    """[features]"""
    weight: NDArray[np.float64]
    """[groups, features]: sums of activations"""
    by_class: NDArray[np.float64]
    """[groups, features, classes]: sums of shares times activations"""
    random_by_class: NDArray[np.float64]
    """the same of random directions at the same places"""
    by_head: NDArray[np.float64]
    """[features, heads]: the same by the head that brought it"""
    strongest: NDArray[np.float64]
    """[features]: the largest activation seen"""
    token: NDArray[np.int64]
    """[features]: the token that most was brought from where that was; -1 for none"""
    texts: int

    def shares(self, groups: NDArray[np.int64] | None = None, *, random: bool = False) -> NDArray:
        """[features, classes] of `CLASSES`: shares of what raises the pre-activation.

        NaN for a feature that does not fire. Args: groups, with repeats, are those to count.
        """
        sums, weight = self.random_by_class if random else self.by_class, self.weight
        if groups is not None:
            count = np.bincount(groups, minlength=len(weight)).astype(float)
            sums, weight = (
                np.tensordot(count, sums, axes=1)[None],
                (count @ weight)[None],
            )
        with np.errstate(invalid="ignore"):
            return sums.sum(0) / weight.sum(0)[:, None]

    def families(
        self, groups: NDArray[np.int64] | None = None, *, random: bool = False
    ) -> NDArray[np.int64]:
        """[features]: the number in `FAMILIES`, `MIXED` for none, -1 where it does not fire."""
        return families_of(self.shares(groups, random=random))


def families_of(shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """The family of shares [n, classes]; see `FeatureSources.families`.

    >>> families_of(np.array([[0.8, 0.15, 0.0, 0.05, 0.0], [0.2, 0.2, 0.2, 0.2, 0.2]])).tolist()
    [0, 4]
    """
    rest = shares[:, 1:]
    total = rest.sum(1)
    best = rest.argmax(1)
    largest = rest[np.arange(len(rest)), best]
    found = np.where(2 * largest > total, best, MIXED)
    return np.where(np.isfinite(total), found, -1)


@torch.inference_mode()
def feature_sources(
    model: Model,
    sae: SparseAutoencoder,
    texts: Sequence[Sequence[int]],
    *,
    distances: Distances | None = None,
    site: str | None = None,
    seed: int = 0,
    allow_other_model: bool = False,
) -> FeatureSources:
    """Run a model over texts (token ids) and measure what each feature goes by.

    Args: seed is of the random directions; site and allow_other_model are as `attribute`'s.

    Raises InputError for an SAE that is not at attn.hook_z or hook_attn_out, fewer texts than 16,
    and as `attribute` does.
    """
    check_range("texts", len(texts), low=GROUPS)
    own, read, _, _ = read_at(model, sae, site, allow_other_model)
    layer, _ = attention_site(read)
    Encoder.of(own, 0)  # says what cannot be taken apart
    reader = _Reader(model, own, read, layer, distances or Distances(), seed)
    with Progress("attention", len(texts), "texts") as progress:
        for number, tokens in enumerate(texts):
            reader.add(list(tokens), number * GROUPS // len(texts))
            progress.advance(1)
    return reader.found(len(texts))


class _Reader:
    """Sums over texts."""

    def __init__(
        self,
        model: Model,
        sae: SparseAutoencoder,
        site: str,
        layer: int,
        distances: Distances,
        seed: int,
    ) -> None:
        self._model, self._sae, self._site, self._layer = model, sae, site, layer
        self._distances = distances
        self._first = True
        direction = sae.W_enc_T.detach().float().cpu()
        if sae.normaliser.kind == "standardised":
            direction = direction - direction.mean(1, keepdim=True)
        if not site.endswith(".hook_z"):
            # up to a norm's scale at each position, which no share depends on
            direction = direction @ HeadOutputs.of(model, layer).up_to_scale().float().T
        self._direction = direction
        # not torch's generator, of whose numbers an SAE's own first weights may be made
        self._draw = np.random.default_rng(seed)
        self._random: Tensor | None = None
        count, classes = len(direction), len(CLASSES)
        self._firings = torch.zeros(count, dtype=torch.int64)
        self._weight = torch.zeros(GROUPS, count, dtype=torch.float64)
        self._sums = torch.zeros(2, GROUPS, count, classes, dtype=torch.float64)
        self._by_head: Tensor | None = None
        self._strongest = torch.zeros(count, dtype=torch.float64)
        self._token = torch.full((count,), -1)

    def add(self, tokens: list[int], group: int) -> None:
        """Count a text in a group."""
        model, block = self._model, f"blocks.{self._layer}.attn."
        sites = [self._site, f"{block}hook_v", f"{block}hook_z"]
        run = run_with_patterns(model, tokens, sites, check=self._first)
        self._first = False
        heads = HeadValues.of(model, run, self._layer)
        ids = torch.tensor(tokens)
        keep = model.keep_mask(ids[None])[0]
        kinds = source_classes(ids, keep, self._distances)
        at = keep.nonzero()[:, 0]
        codes = self._sae.encode_sparse(run.at[self._site][at].to(self._sae.W_dec)).compact()
        destination, feature = at[codes.rows().cpu()], codes.index.long().cpu()
        value = codes.value.double().cpu()
        twins = self._twins(heads.heads)
        for first in range(0, len(feature), _ENTRIES):
            rows = slice(first, first + _ENTRIES)
            some = (destination[rows], feature[rows], value[rows])
            brought = _raising(heads, self._direction, *some)
            self._count(brought, kinds, some, group, 0)
            self._heads_and_tokens(brought, ids, some)
            self._count(_raising(heads, twins, *some), kinds, some, group, 1)

    def _twins(self, heads: int) -> Tensor:
        """A random direction for each feature, as long as its own within each head."""
        if self._random is None:
            own = self._direction.view(len(self._direction), heads, -1)
            drawn = torch.from_numpy(self._draw.standard_normal(own.shape)).to(own)
            drawn *= own.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)
            self._random = drawn.flatten(1)
            self._by_head = torch.zeros(len(own), heads, dtype=torch.float64)
        return self._random

    def _count(
        self,
        brought: Tensor,
        kinds: Tensor,
        some: tuple[Tensor, Tensor, Tensor],
        group: int,
        which: int,
    ) -> None:
        destination, feature, value = some
        by_source = brought.sum(1)
        total = by_source.sum(1).clamp_min(torch.finfo(by_source.dtype).tiny)
        kind = kinds[destination]
        shares = torch.stack(
            [(by_source * (kind == n)).sum(1) / total for n in range(len(CLASSES))], dim=1
        )
        weighted = shares.double() * value.abs()[:, None]
        self._sums[which, group].index_add_(0, feature, weighted)
        if which == 0:
            self._weight[group].index_add_(0, feature, value.abs())
            self._firings.index_add_(0, feature, torch.ones_like(feature))

    def _heads_and_tokens(
        self, brought: Tensor, ids: Tensor, some: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        _, feature, value = some
        assert self._by_head is not None
        by_head = brought.sum(2)
        shares = by_head / by_head.sum(1, keepdim=True).clamp_min(1e-30)
        self._by_head.index_add_(0, feature, shares.double() * value.abs()[:, None])
        token = ids[brought.sum(1).argmax(1)]
        for number, size, top in zip(
            feature.tolist(), value.abs().tolist(), token.tolist(), strict=True
        ):
            if size > self._strongest[number]:
                self._strongest[number], self._token[number] = size, top

    def found(self, texts: int) -> FeatureSources:
        """What was counted."""
        assert self._by_head is not None
        weight = self._weight.sum(0)[:, None].clamp_min(1e-30)
        return FeatureSources(
            layer=self._layer,
            firings=self._firings.numpy(),
            weight=self._weight.numpy(),
            by_class=self._sums[0].numpy(),
            random_by_class=self._sums[1].numpy(),
            by_head=(self._by_head / weight).numpy(),
            strongest=self._strongest.numpy(),
            token=self._token.numpy(),
            texts=texts,
        )


def _raising(
    heads: HeadValues, directions: Tensor, destination: Tensor, feature: Tensor, value: Tensor
) -> Tensor:
    """What raises each firing's pre-activation [n, head, source]: the parts above 0.

    A negative activation of a signed SAE is raised by what lowers the pre-activation.
    """
    used, row = feature.unique(return_inverse=True)
    along = heads.along(directions[used].to(heads.values))[row]
    along *= value.sign().to(along)[:, None, None]
    return (along * heads.pattern[:, destination].transpose(0, 1)).clamp_min(0)
