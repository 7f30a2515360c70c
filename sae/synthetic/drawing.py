"""Drawing a world's rows: which features fire, how strongly, and the rows they make.

A row is a function of a key and its number, whatever is drawn beside it: of each row, words of
Philox decide the common causes, which features fire (one word a feature: it fires where the word,
as a number between 0 and 1, is below its probability given the common causes) and the amounts.
Features without a parent are looked at one by one, all others only where their parent fires. In C++
on the CPU (`sae/kernels/synthetic.cpp`), in torch's operators elsewhere: the same rows but for
rounding, which may make a feature fire or not where its word and its probability agree to six
digits.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sae.kernels.codes import SparseCodes
from sae.synthetic import philox
from sae.synthetic.cpp_drawing import CppDrawing
from sae.synthetic.philox import Key
from sae.synthetic.world import TILE, Tops, World
from saescope.integers import as_index

_CAUSES, _TOPS, _AMOUNTS, _CHILDREN = range(4)
"""purposes of words; from _CHILDREN on, one for each four children of a parent"""
_TOPS_AT_ONCE = 2**21
"""entries [rows, features without a parent] that are looked at together"""


class DrawnRows(NamedTuple):
    """Rows and what they are made of."""

    x: Tensor
    """float32 [rows, d_in]"""
    codes: SparseCodes
    """the true features that fire, with their amounts, all above 0"""


class _Firing(NamedTuple):
    """Features that fire on rows, of one generation."""

    row: Tensor
    """int64 [entries], within the rows drawn together"""
    feature: Tensor
    """int64 [entries]"""
    value: Tensor
    """float64 [entries], amounts"""


class Drawing:
    """Draws rows of a world on a device.

    >>> from sae.synthetic.config import world_config
    >>> draw = Drawing(World(world_config("tiny")), seed=0)
    world: 100 steps
    world: done, 100 steps in ...
    >>> x = draw.rows(0, 8)
    >>> bool((draw.rows(5, 3) == x[5:]).all())
    True
    """

    def __init__(
        self,
        world: World,
        *,
        seed: int = 0,
        purpose: int = 0,
        device: torch.device | str = "cpu",
        cpp: bool | None = None,
    ) -> None:
        """Args:
        seed, purpose: of which rows; rows of other numbers are independent of these.
        cpp: whether to draw in C++ (None: on the CPU, where it can be had).
        """
        seed = as_index(seed, where="seed", low=0, high=2**63 - 1)
        self.device = torch.device(device)
        self.world = world.to(self.device)
        self.tops = Tops.of(self.world)
        self.key: Key = philox.key_of(seed, purpose)
        on_cpu = self.device.type == "cpu"
        usable = on_cpu and CppDrawing.usable() if cpp is None else cpp
        self.cpp = CppDrawing(world, self.key) if usable else None

    def rows(self, first: int, count: int) -> Tensor:
        """Rows [count, d_in], float32, numbered from `first`."""
        if self.cpp is not None:
            return self.cpp.rows(first, count)
        return self.with_codes(first, count).x

    def with_codes(self, first: int, count: int) -> DrawnRows:
        """The same rows, and the true features of each."""
        if self.cpp is not None:
            return DrawnRows(*self.cpp.with_codes(first, count))
        step = max(1, _TOPS_AT_ONCE // max(1, len(self.tops.feature)))
        codes = SparseCodes.concatenate(
            [
                self._codes(start, min(step, first + count - start))
                for start in range(first, first + count, step)
            ]
        )
        return DrawnRows(self._made_of(codes), codes)

    def _made_of(self, codes: SparseCodes) -> Tensor:
        """Rows [rows, d_in] that amounts make."""
        if len(codes.index) == 0:
            return self.world.bias.expand(codes.batch, -1).clone()
        summed = functional.embedding_bag(
            codes.index,
            self.world.directions,
            codes.row_ptr[:-1],
            mode="sum",
            per_sample_weights=codes.value,
        )
        return summed + self.world.bias

    def _codes(self, first: int, count: int) -> SparseCodes:
        number = torch.arange(first, first + count, device=self.device)
        causes = self._common_causes(number)
        firing = self._tops_that_fire(number, causes)
        generations = [firing]
        for _ in range(self.world.config.depth):
            firing = self._children_that_fire(number, causes, firing)
            generations.append(firing)
        row, feature, value = (torch.cat(each) for each in zip(*generations, strict=True))
        width = self.world.config.features
        return SparseCodes.from_flat(row * width + feature, value.float(), count, width)

    def _common_causes(self, number: Tensor) -> Tensor:
        """Standard normal, float32 [rows, correlation_rank]."""
        rank = self.world.config.correlation_rank
        blocks = torch.arange(-(-rank // 4), device=self.device)
        word = philox.words(number[:, None], blocks, _CAUSES, self.key)
        first = philox.normal_pair(word[..., 0], word[..., 1])
        second = philox.normal_pair(word[..., 2], word[..., 3])
        return torch.stack([*first, *second], dim=-1).flatten(1)[:, :rank].float()

    def _tops_that_fire(self, number: Tensor, causes: Tensor) -> _Firing:
        tops = self.tops
        blocks = torch.arange(len(tops.feature) // 4, device=self.device)
        word = philox.words(number[:, None], blocks, _TOPS, self.key)
        # neighbours in a tile are one word each of neighbouring blocks
        word = word.unflatten(1, (-1, TILE // 4)).transpose(2, 3).flatten(1)
        chance = torch.special.ndtr((causes @ tops.slope.T + tops.offset).double())
        row, slot = (philox.uniform(word) < chance).nonzero(as_tuple=True)
        feature = tops.feature[slot]
        value, _ = self._amounts(number[row], feature)
        some = value > 0
        return _Firing(row[some], feature[some], value[some])

    def _children_that_fire(self, number: Tensor, causes: Tensor, above: _Firing) -> _Firing:
        world = self.world
        config, trees = world.config, world.trees
        row, parent, amount = (each[trees.children[above.feature] > 0] for each in above)
        which = torch.arange(config.children, device=self.device)
        there = which < trees.children[parent][:, None]
        child = torch.where(there, trees.first_child[parent][:, None] + which, 0)
        blocks = range(-(-config.children // 4))
        word = torch.cat(
            [philox.words(number[row], parent, _CHILDREN + n, self.key) for n in blocks], dim=-1
        )[:, : config.children]
        level = (self.world.slope[child] * causes[row][:, None]).sum(-1) + self.world.offset[child]
        chance = torch.special.ndtr(level.double())
        at, which = (there & (philox.uniform(word) < chance)).nonzero(as_tuple=True)
        feature = child[at, which]
        value, score = self._amounts(number[row[at]], feature)
        kept = value > 0
        if config.exclusive:
            # the largest score stays; of equal ones the first child's
            score = torch.where(kept, (score + 1) * config.children - which, -1)
            best = torch.full_like(parent, -1).scatter_reduce(0, at, score, "amax")
            kept &= score == best[at]
        if config.scale_children:
            value = value * (amount[at] / self.world.mean[parent[at]])
        return _Firing(row[at[kept]], feature[kept], value[kept])

    def _amounts(self, number: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Amounts (of at least 0) of features on rows, and scores by which one of several stays."""
        word = philox.words(number, feature, _AMOUNTS, self.key)
        normal, _ = philox.normal_pair(word[..., 0], word[..., 1])
        value = self.world.mean[feature] + self.world.deviation[feature].double() * normal
        return value.clamp_min(0), word[..., 2]
