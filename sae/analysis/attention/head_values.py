"""What each attention head of a layer brings from each source position, read along a direction."""

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from activations import Model
from activations.models.attention import TOLERANCE, AttentionRun
from saescope.errors import InputError


@dataclass(frozen=True)
class HeadValues:
    """A layer's patterns and values in a run: z[head, destination] = sum pattern * values."""

    pattern: Float[Tensor, "head destination source"]
    values: Float[Tensor, "source head d_head"]
    """with grouped queries, those of a head's key-value head"""

    @classmethod
    def of(cls, model: Model, run: AttentionRun, layer: int, at: int | None = None) -> Self:
        """Those of a run that kept attn.hook_v and attn.hook_z of the layer.

        Raises InputError where patterns and values do not make z, at one destination or at any.
        """
        rows = slice(None) if at is None else slice(at, at + 1)
        block = f"blocks.{layer}.attn."
        found = _values_by_head(run, layer)
        if found is not None:
            z = run.at[f"{block}hook_z"][rows]
            made = torch.einsum("hts,shd->thd", run.pattern[layer][:, rows], found).flatten(1)
            allowed = TOLERANCE[model.dtype] * (made.norm(dim=1) + z.norm(dim=1))
            if bool(((made - z).norm(dim=1) <= allowed).all()):
                return cls(run.pattern[layer], found)
        raise InputError(
            "heads are not their pattern times their values alone (a gate, or another kind of "
            "attention)",
            where=f"{model.spec}, layer {layer}",
        )

    @property
    def heads(self) -> int:
        """How many there are."""
        return len(self.pattern)

    def along(self, directions: Float[Tensor, "n d_z"]) -> Float[Tensor, "n head source"]:
        """Values times directions, not yet weighed by a pattern."""
        by_head = directions.view(len(directions), self.heads, -1)
        return torch.einsum("shd,nhd->nhs", self.values, by_head)

    def brought(self, direction: Float[Tensor, " d_z"], at: int) -> Float[Tensor, "head source"]:
        """What each head brings to a destination from each source up to it, times a direction."""
        return (self.pattern[:, at] * self.along(direction[None])[0])[:, : at + 1]


def _values_by_head(run: AttentionRun, layer: int) -> Tensor | None:
    """[source, head, d_head], each key-value head's values once for each head that reads them.

    None where the widths of values and heads do not fit.
    """
    v, z = run.at[f"blocks.{layer}.attn.hook_v"], run.at[f"blocks.{layer}.attn.hook_z"]
    count = len(run.pattern[layer])
    size = z.shape[1] // count
    groups = v.shape[1] // max(size, 1)
    if count * size != z.shape[1] or groups == 0 or groups * size != v.shape[1] or count % groups:
        return None
    return v.view(len(v), groups, size).repeat_interleave(count // groups, dim=1)
