"""The site between a norm and its gain: TransformerLens' `hook_normalized` of an RMSNorm.

Transcoders are trained there when the gain is folded into what comes after (Gemma Scope 1's). No
module ends there, so it is the norm's output divided by the gain, which the module itself tells: of
a vector of equal numbers, whose norm is 1, it gives the gain alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from activations.sites.hooks import HookTarget
from saescope.errors import InputError

_FAR_ABOVE_EPSILON = 1e3


@dataclass(frozen=True, kw_only=True)
class NormalisedTarget(HookTarget):
    """A norm's output without its gain [width]."""

    gain: Tensor

    def read(self, value: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """The norm's output over its gain; an edit is multiplied by it."""
        return super().read(value, shape) / self.gain

    def keep(self, value: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """`read` makes a tensor of its own."""
        return self.read(value, shape)

    def write(self, value: Tensor, edited: Tensor) -> Tensor:
        """The norm's output with the site's part replaced."""
        return super().write(value, edited * self.gain)


def normalised_target(site: str, module: nn.Module) -> NormalisedTarget | None:
    """The target before a norm's gain; None for a norm that also takes the mean off.

    There TransformerLens' name means the output itself, or not, with how the model was loaded.
    Raises InputError for a gain that is 0 somewhere.
    """
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.LayerNorm) or not isinstance(weight, Tensor) or weight.ndim != 1:
        return None
    equal = torch.full_like(weight, _FAR_ABOVE_EPSILON)[None, None]
    with torch.no_grad():
        gain = module(equal)[0, 0].clone()
    if not bool((gain != 0).all()):
        raise InputError("this norm's gain is 0 somewhere; nothing is known before it", where=site)
    return NormalisedTarget(site=site, module=module, side="output", gain=gain)
