"""An SAE in its model: what is read at some sites, and what takes activations' place at others."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from activations.sites.kept import real_tokens

if TYPE_CHECKING:
    from activations import Model

Replacement = Callable[[Tensor], Tensor]
"""Activations [rows, d_in] float32 to what stands in for them, [rows, d_out]."""


@dataclass(frozen=True, kw_only=True)
class InModel:
    """Held-out sequences, the model, and the SAE that is put into it."""

    model: "Model"
    """what is taken apart"""
    read: Sequence[str]
    """sites whose activations, side by side, the SAE reads"""
    written: Sequence[str]
    """sites where its output goes, in the order of its columns"""
    replacement: Replacement
    """what the SAE makes of activations"""
    mean: Tensor
    """[d_out], mean activation at the sites written"""
    tokens: Tensor
    """int64 [sequence, position]"""
    keep: Tensor
    """bool [sequence, position], where activations are replaced and predictions counted"""
    document: Tensor | None = None
    """int64 [sequence, position], each token's document; if None, sequences are taken for
    documents"""
    attention_mask: Tensor | None = None
    """[sequence, position], 0 at padding, which is neither replaced nor predicted"""
    batch: int = 4
    """sequences a run of the model"""

    def real(self) -> Tensor:
        """bool [sequence, position], false at padding."""
        return real_tokens(self.tokens, self.attention_mask)

    def splice(self) -> "Splice":
        """Reads and replaces at these sites."""
        return Splice(self.model, self.read, self.written)


class Splice:
    """Reads some sites in one run of a model, replaces some in another."""

    def __init__(self, model: "Model", read: Sequence[str], written: Sequence[str]) -> None:
        self.model, self.read, self.written = model, read, written
        self.widths = [model.d_in(site) for site in written]
        self._seen: dict[str, Tensor] = {}

    def reading(self, keep: Tensor) -> AbstractContextManager[None]:
        """Within the block, a run's activations at kept positions are remembered."""

        def remember(site: str) -> Callable[[Tensor, Tensor], None]:
            def see(h: Tensor, _: Tensor) -> None:
                self._seen[site] = h[keep].float()

            return see

        return self.model.edit({site: remember(site) for site in self.read})

    def replacing(self, replacement: Replacement, keep: Tensor) -> AbstractContextManager[None]:
        """Within the block, kept positions are replaced; made from what `reading` saw.

        It is made sequence by sequence: products of other numbers of rows round otherwise, so that
        what is measured would depend on how many sequences a run has.
        """
        x = torch.cat([self._seen[site] for site in self.read], dim=-1)
        rows = keep.flatten(1).sum(1).tolist()
        made = [replacement(one) for one in x.split(rows) if len(one)] or [replacement(x)]
        parts = torch.cat(made).split(self.widths, dim=-1)
        edits = zip(self.written, parts, strict=True)
        return self.model.edit({site: _replace_kept(part, keep) for site, part in edits})


def _replace_kept(rows: Tensor, keep: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def edit(h: Tensor, _: Tensor) -> Tensor:
        out = h.clone()
        out[keep] = rows.to(h.dtype)
        return out

    return edit
