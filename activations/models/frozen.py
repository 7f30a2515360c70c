"""A model made linear around one text: attention patterns and norms' scales held as they were.

With these held, everything between an embedding or an MLP's output and what a later MLP reads is
linear (Ameisen et al. 2025, "Circuit Tracing"), so that one backward
pass gives exactly what each part of the residual stream is worth. MLPs are not made linear: whoever
asks cuts the computation where they write.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from activations.models.language import Model
from saescope.errors import InputError

_ATTENTION = "saescope_frozen"
"""the name by which transformers knows the attention that holds its pattern"""
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""by how much, relative, a norm may differ from scale * gain * x + bias"""
_FAR_ABOVE_EPSILON = 1e3


class FrozenModel:
    """Runs of a model on one text in which attention patterns and norms' scales are those of the
    first.

    Within `frozen(model)`; weights get no gradients meanwhile.
    """

    def __init__(self, model: Model, *, hold: bool = True) -> None:
        self.model = model
        self._hold = hold
        self._running = False
        self._norms: dict[nn.Module, _HeldNorm] = {}
        self._patterns: dict[nn.Module, Tensor] = {}

    def run(self, tokens: Tensor) -> None:
        """A forward pass over tokens [1, pos], up to the final norm; with gradients, if enabled."""
        self._running = True
        try:
            self.model.hf.base_model(input_ids=tokens.to(self.model.device), use_cache=False)
        finally:
            self._running = False

    def check(self) -> None:
        """Raise InputError after a run in which some layer's attention was none that is held."""
        if len(self._patterns) != self.model.n_layers:
            raise InputError(
                "the attention of some layer cannot be held: transformers does not run it by the "
                "interface that its other models have",
                where=self.model.spec,
                given=f"{len(self._patterns)} of {self.model.n_layers} layers",
            )

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """Attention whose pattern is held: that of the module's own "eager" one at first."""
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if eager is None:
            raise InputError("this model's attention tells no weights", where=type(module).__name__)
        if not (self._hold and self._running):
            return eager(module, q, k, v, mask, **more)
        if module not in self._patterns:
            with torch.no_grad():
                _, pattern = eager(module, q, k, v, mask, **more)
            if not isinstance(pattern, Tensor) or pattern.ndim != 4:
                raise InputError(
                    "this model's attention tells no weights", where=type(module).__name__
                )
            self._patterns[module] = pattern.detach()
        pattern = self._patterns[module]
        values = v.repeat_interleave(pattern.shape[1] // v.shape[1], dim=1)  # grouped queries
        return (pattern @ values).transpose(1, 2), pattern

    def hold(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """A norm's output with its scale held."""
        if not (self._hold and self._running):
            return output  # sites are found by calls of norms and of the model, of their own inputs
        if module not in self._norms:
            self._norms[module] = _HeldNorm.of(module, args[0].detach(), output.detach())
        return self._norms[module](args[0])


@dataclass(frozen=True)
class _HeldNorm:
    """scale * gain * (x, less its mean where the norm centres) + bias."""

    centres: bool
    factor: Tensor
    """scale * gain, [batch, pos, width]"""
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centres else x
        return x * self.factor if self.bias is None else x * self.factor + self.bias

    @classmethod
    def of(cls, module: nn.Module, x: Tensor, y: Tensor) -> "_HeldNorm":
        """What a norm did to x. Raises InputError if that is not a scale for each row."""
        weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
        without = y if bias is None else y - bias
        with torch.no_grad():
            # of equal numbers far above epsilon an RMSNorm gives its gain, a LayerNorm its bias
            equal = module.forward(torch.full_like(x[:1, :1], _FAR_ABOVE_EPSILON))
            for centres, gain in ((False, equal), (True, 1.0 if weight is None else weight)):
                wide = (x - x.mean(-1, keepdim=True) if centres else x) * gain
                scale = (without * wide).sum(-1, keepdim=True)
                scale = scale / wide.square().sum(-1, keepdim=True).clamp_min(1e-30)
                off = (scale * wide - without).norm()
                if bool(off <= _TOLERANCE[y.dtype] * without.norm()):
                    return cls(centres, scale * gain, bias)
        raise InputError(
            "this norm is not a scale and a gain, so it cannot be held",
            where=type(module).__name__,
        )


@contextmanager
def frozen(model: Model, *, hold: bool = True) -> Iterator[FrozenModel]:
    """While the context lasts, a model's norms and attention are held as they are in the first run.

    Args: without hold nothing is held, and the model is its nonlinear self.

    Raises InputError in that run for attention or norms that cannot be held.

    >>> with frozen(model) as held, model.edit(cuts):                     # doctest: +SKIP
    ...     held.run(tokens)
    """
    held = FrozenModel(model, hold=hold)
    norms = [each for each in model.hf.modules() if _is_norm(each)]
    free = [each for each in model.hf.parameters() if each.requires_grad]
    handles = [each.register_forward_hook(held.hold) for each in norms]
    try:
        for each in free:
            each.requires_grad_(requires_grad=False)
        with _attention(model.hf, held.attend):
            yield held
    finally:
        for handle in handles:
            handle.remove()
        for each in free:
            each.requires_grad_()


@contextmanager
def _attention(hf: Any, function: Callable[..., Any]) -> Iterator[None]:
    """While the context lasts, all of a model's attention is computed by a function."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    configs = {id(each.config): each.config for each in hf.modules() if hasattr(each, "config")}
    before = {key: each._attn_implementation for key, each in configs.items()}
    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_ATTENTION, eager_mask)
    try:
        for each in configs.values():
            each._attn_implementation = _ATTENTION
        yield
    finally:
        for key, each in configs.items():
            each._attn_implementation = before[key]


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not list(module.children())
