"""What a head reads, by measure: how far back a source is, and whether a repeat leads to it."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saescope.errors import check_range

CLASSES = ("first", "induction", "local", "middle", "long-range")
"""of source positions; the first that applies

    first       a position that SAEs do not read: a text's first token, special tokens. Heads put
                weight there that they have no use for, so it counts in no family
    induction   what came after the destination's token earlier: the token before it is the same one
    local       up to `near` tokens back, the destination itself included
    long-range  `far` tokens back or more
    middle      between these
"""
FAMILIES = CLASSES[1:]


@dataclass(frozen=True, kw_only=True)
class Distances:
    """Where local sources end and long-range ones begin, in tokens."""

    near: int = 4
    """the largest distance of a local source"""
    far: int = 32
    """the smallest distance of a long-range one"""

    def __post_init__(self) -> None:
        check_range("near", self.near, low=0)
        check_range("far", self.far, low=self.near + 1)


def source_classes(
    tokens: Int[Tensor, " pos"], keep: Bool[Tensor, " pos"], distances: Distances
) -> Int[Tensor, "destination source"]:
    """The number in `CLASSES` of each source at each destination; -1 after the destination.

    >>> tokens, keep = torch.tensor([0, 5, 6, 7, 5]), torch.tensor([False, True, True, True, True])
    >>> source_classes(tokens, keep, Distances(near=1, far=3))[4].tolist()
    [0, 4, 1, 2, 2]
    """
    at = torch.arange(len(tokens))
    distance = at[:, None] - at[None]
    before = tokens.roll(1)
    repeats = (tokens[:, None] == before[None]) & (at[None] > 0) & (distance > 0)
    repeats &= keep.roll(1)[None]
    found = torch.full_like(distance, CLASSES.index("middle"))
    found[distance >= distances.far] = CLASSES.index("long-range")
    found[distance <= distances.near] = CLASSES.index("local")
    found[repeats] = CLASSES.index("induction")
    found[:, ~keep] = CLASSES.index("first")
    found[distance < 0] = -1
    return found
