"""Tensors of a foreign file, taken one by one: each checked, none left over."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saescope.errors import ArtefactError, InputError


class Weights:
    """The tensors of a file, as float32."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        self.left = dict(tensors)
        self.where = where

    @classmethod
    def safetensors(cls, path: Path) -> "Weights":
        """Read a safetensors file; ArtefactError if it is missing or damaged."""
        try:
            return cls(load_file(path), str(path))
        except FileNotFoundError:
            raise ArtefactError("weights are missing", where=str(path)) from None
        except (SafetensorError, OSError, ValueError) as error:
            raise ArtefactError(f"damaged weights: {error}", where=str(path)) from error

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; ArtefactError if it is not there."""
        if name not in self.left:
            raise ArtefactError(f"{name} is missing", where=self.where, allowed=sorted(self.left))
        return tuple(self.left[name].shape)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of a known shape.

        Raises ArtefactError if it is not there, of another shape, or not finite.
        """
        found = self.shape(name)
        if found != shape:
            turned = len(shape) == 2 and found == shape[::-1]
            raise ArtefactError(
                f"{name} is transposed" if turned else f"{name} has the wrong shape",
                where=self.where, given=found, allowed=str(shape),
            )  # fmt: skip
        value = self.left.pop(name).detach().to(torch.float32)
        if not torch.isfinite(value).all():
            raise ArtefactError(f"{name} is not finite everywhere", where=self.where)
        return value

    def finish(self) -> None:
        """InputError if tensors are left whose meaning is not known."""
        if self.left:
            raise InputError(
                "tensors that this reader does not know, so the SAE would be another",
                where=self.where, given=sorted(self.left),
            )  # fmt: skip


def layer_of(site: str) -> int | None:
    """The layer that a site's name has.

    >>> layer_of("blocks.12.hook_resid_post"), layer_of("hook_embed")
    (12, None)
    """
    numbers = [part for part in site.replace("_", ".").split(".") if part.isdigit()]
    return int(numbers[0]) if numbers else None
