"""Where the positions of a site stand in a picture, and masks of parts of it.

The positions of a feature map [batch, channel, height, width] are its cells, row by row, and so are
those of a transformer's patches [batch, position, width], behind its class token and registers.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from activations.sites.kept import TokenPositions
from saescope.errors import InputError

Size = tuple[int, int]
_CLASSES = 2
"""the most class tokens that a transformer of pictures has: a class, and a teacher's"""
StepOf = Callable[[Mapping[str, Any]], int | None]
"""from what the model is called with to the denoising step that this is"""


@dataclass(frozen=True)
class GridPositions(TokenPositions):
    """Where the positions of a site stand in a picture; all of them are kept."""

    grid: Size | None = None
    """height and width of the feature map; None where it is not known"""
    before: int = 0
    """positions before the first cell: a class token, registers"""
    step: int | None = None
    """the denoising step, from 0; None where there is none"""

    @cached_property
    def kept(self) -> Bool[Tensor, "batch pos"]:
        """Every position counts."""
        return torch.ones_like(self.position, dtype=torch.bool)

    @property
    def prompt(self) -> Tensor:
        """Raises InputError: pictures continue nothing."""
        raise InputError("these are no positions of a text", where="positions", given="prompt")

    def inside(self, region: Bool[Tensor, "*batch height width"]) -> Bool[Tensor, "batch pos"]:
        """Which positions are in a part of the picture, of any size that `fitted` takes.

        Raises InputError for a site whose cells are not known, and for another number of pictures.
        """
        batch, count = self.position.shape
        if self.grid is None:
            raise InputError(
                "where this site's positions stand in a picture is not known",
                where="region",
                given=f"{count} positions",
            )
        cells = fitted(region, self.grid).flatten(-2).to(self.position.device)
        if cells.ndim == 2 and len(cells) != batch:
            raise InputError(
                "another number of pictures", where="region", given=len(cells), allowed=str(batch)
            )
        found = torch.zeros_like(self.position, dtype=torch.bool)
        found[:, self.before :] = cells
        return found


def fitted(region: Bool[Tensor, "*batch height width"], size: Size) -> Tensor:
    """A part of a picture at another size, exactly: each cell is inside or outside as a whole.

    Raises InputError where a side is no whole multiple of the other size's, or a cell is cut.

    >>> fitted(torch.tensor([[True, True, False, False]] * 2), (1, 2)).tolist()
    [[True, False]]
    """
    for axis, wanted in zip((-2, -1), size, strict=True):
        given = region.shape[axis]
        if wanted % given == 0:
            region = region.repeat_interleave(wanted // given, axis)
        elif given % wanted == 0:
            blocks = region.unflatten(axis, (wanted, given // wanted))
            within = axis % region.ndim + 1
            region = blocks.any(within)
            if bool((region != blocks.all(within)).any()):
                raise InputError(
                    "cuts through a cell of this site's feature map",
                    where="region",
                    given=f"{given} along a side of {wanted} cells",
                    allowed="a part of whole cells",
                )
        else:
            raise InputError(
                "cannot be made the size of this site's feature map exactly",
                where="region",
                given=f"{given} along a side of {wanted} cells",
                allowed="a multiple of it, or of which it is one",
            )
    return region


class GridRun:
    """What is known of the pass over pictures that goes on now, seen where the model is called."""

    shape: None = None
    """sites are read as they are: there are no tokens that they would have to fit"""

    def __init__(self, module: nn.Module, step_of: StepOf | None = None) -> None:
        config = getattr(module, "config", None)
        self._patch = _patch_size(config)
        self._most_before = _CLASSES + int(getattr(config, "num_register_tokens", None) or 0)
        self._step_of = step_of
        self._size: Size | None = None
        self._step: int | None = None

    def watch(self, modules: Collection[nn.Module]) -> list[Any]:
        """Hooks on the modules that may be called with a picture."""
        return [
            module.register_forward_pre_hook(self._begin, with_kwargs=True)
            for module in dict.fromkeys(modules)
        ]

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        names = inspect.signature(module.forward).parameters
        known = {**dict(zip(names, args, strict=False)), **kwargs}
        pictures = [x for x in known.values() if isinstance(x, Tensor) and x.ndim == 4]
        self._size = (pictures[0].shape[2], pictures[0].shape[3]) if pictures else None
        self._step = None if self._step_of is None else self._step_of(known)

    def at(self, value: Tensor, x: Tensor) -> GridPositions:
        """Where the positions of a site stand, by its tensor and that read as [batch, pos, d]."""
        batch, count = x.shape[:2]
        position = torch.arange(count, device=x.device).expand(batch, -1)
        grid, before = self._cells(value, count)
        return GridPositions(position, None, frozenset(), grid=grid, before=before, step=self._step)

    def _cells(self, value: Tensor, count: int) -> tuple[Size | None, int]:
        """Height and width of the feature map, and how many positions come before it."""
        if value.ndim == 4:
            return (value.shape[2], value.shape[3]), 0
        if self._size is None:
            return None, 0
        high, wide = self._size
        if self._patch is not None and not (high % self._patch[0] or wide % self._patch[1]):
            grid = high // self._patch[0], wide // self._patch[1]
            before = count - grid[0] * grid[1]
            if 0 <= before <= self._most_before:
                return grid, before
        # of a picture that is made smaller by the same whole number along both sides
        factor = isqrt(high * wide // count)
        exact = factor and not (high % factor or wide % factor)
        if exact and (high // factor) * (wide // factor) == count:
            return (high // factor, wide // factor), 0
        return None, 0


def _patch_size(config: Any) -> Size | None:
    """Height and width of a transformer's patches, if its configuration says so."""
    found = getattr(config, "patch_size", None)
    if isinstance(found, int):
        return found, found
    if isinstance(found, list | tuple) and len(found) == 2:
        return int(found[0]), int(found[1])
    return None
