"""Attention whose patterns are frozen: each pass attends as the model does when nothing is edited.

An edit changes what later layers of attention move (their values) and from where (their patterns,
which are made of queries and keys). With frozen patterns only the first changes: what a head adds
to the residual stream is then linear in the values, and, with the scale of the norm before them
held as well, in the residual stream (Elhage et al. 2021, "A Mathematical Framework for Transformer
Circuits", on QK and OV circuits).

(`activations.models.frozen` holds norms as well, for gradients at one text; this is for edits.)

Each pass is made twice: without any edit of ours, which tells the queries and keys of every layer;
then as it was asked for, with these in place of its own. Both are made by the attention that the
model uses anyway, so a pass without edits keeps every bit, and no pattern is ever stored. In a
continuation with a KV cache the first pass has a cache of its own: the patterns of a new token are
those of the model without edits on the same tokens, the ones that were generated included.
"""

import copy
import inspect
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from activations.sites.hooks import no_hooks
from saescope.errors import InputError

_NAME = "saescope_frozen_"
_CACHE = "past_key_values"
_MOVES = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset")
"""what `generate` of transformers does to a cache besides filling it"""
_SPREAD = "_hf_hook"


class _Pass:
    """Queries and keys of one pass, by attention module, in the order of its calls."""

    def __init__(self) -> None:
        self.recording = True
        self.known: dict[nn.Module, deque[tuple[Tensor, Tensor]]] = {}


_NOW: ContextVar[_Pass | None] = ContextVar("pass", default=None)
_FROZEN: "WeakKeyDictionary[nn.Module, _Frozen]" = WeakKeyDictionary()


def _attention_like(own: str) -> Callable[..., Any]:
    """The attention that transformers calls `own`, on the queries and keys of `_NOW`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw):
        eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        function: Any = ALL_ATTENTION_FUNCTIONS.get_interface(own, eager)
        now = _NOW.get()
        if now is not None and now.recording:
            now.known.setdefault(module, deque()).append((query, key))
        elif now is not None:
            query, key = now.known[module].popleft()
        return function(module, query, key, value, *args, **kw)

    return attention


@contextmanager
def frozen_attention(model: Any) -> Iterator[None]:
    """Within the block, every pass of a language model has the patterns of an unedited pass.

    Edits of ours (`Model.edit`, `sae.steer`) are left out of that pass, wherever they were begun;
    it costs as much as the pass itself. Blocks may be nested.

    Raises InputError for a model whose attention does not go through transformers' interface of
    attention functions in every layer (state-space and linear layers, code of its own, a
    TransformerBridge), or is spread over devices; in the block, for a text that continues a KV
    cache which was filled before the block.

    >>> with frozen_attention(model), model.edit({site: edit}):  # doctest: +SKIP
    ...     model.logits(tokens)
    """
    if not hasattr(model, "hf"):
        raise InputError(
            "only the attention of language models is frozen",
            where="freeze_attention",
            given=getattr(model, "spec", type(model).__name__),
        )
    frozen = _FROZEN.get(model.hf)
    if frozen is None:
        if hasattr(model, "sites"):
            model.sites()  # found out by a pass that is made once, which would be made twice
        frozen = _Frozen(model)
        frozen.check()
        _FROZEN[model.hf] = frozen
    frozen.blocks += 1
    try:
        frozen.hold()
        yield
    finally:
        frozen.blocks -= 1
        if not frozen.blocks:
            _FROZEN.pop(model.hf, None)
            frozen.release()


class _Frozen:
    """A model whose attention is frozen, for as many blocks as are open."""

    def __init__(self, model: Any) -> None:
        self.blocks = 0
        self._hf: Any = model.hf
        self._spec: str = model.spec
        self._layers: int | None = getattr(model, "n_layers", None)
        self._device = getattr(model, "device", None)
        self._own: str | None = None
        self._handles: list[Any] = []
        self._caches: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        """of each cache, that of the same tokens without edits"""
        self._made: Any = None
        self._depth = 0

    def check(self) -> None:
        """Raise InputError unless every layer's attention can be frozen, tried on a few tokens."""
        if self._layers is None or any(hasattr(m, _SPREAD) for m in self._hf.modules()):
            raise InputError(
                "the attention of this model cannot be frozen",
                where="freeze_attention",
                given=f"{self._spec} ({type(self._hf).__name__})",
                allowed="a language model of transformers, on one device",
            )
        tokens = torch.arange(3, device=self._device)[None]
        with torch.no_grad(), no_hooks():
            wanted = self._hf.base_model(input_ids=tokens, use_cache=False)[0]
            self.hold()
            try:
                made = _Pass()
                found = self._passed(made, tokens)
                layers = len(made.known)
                made.recording = False
                again = self._passed(made, tokens)
            finally:
                self.release()
        if layers != self._layers:
            raise InputError(
                "the attention of this model cannot be frozen: not every layer's goes through "
                "transformers' interface of attention functions",
                where="freeze_attention",
                given=f"{self._spec} ({type(self._hf).__name__}): {layers} of {self._layers}",
            )
        if not (torch.equal(found, wanted) and torch.equal(again, wanted)):
            raise InputError(
                "the attention of this model cannot be frozen: it makes something else of the "
                "same queries and keys",
                where="freeze_attention",
                given=f"{self._spec} ({type(self._hf).__name__})",
            )

    def _passed(self, now: _Pass, tokens: Tensor) -> Tensor:
        token = _NOW.set(now)
        self._depth += 1  # so that `_begin` makes no pass of its own
        try:
            return self._hf.base_model(input_ids=tokens, use_cache=False)[0]
        finally:
            self._depth -= 1
            _NOW.reset(token)

    def hold(self) -> None:
        """Begin: the model's attention is looked up under a name of ours."""
        if self._handles:
            return
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self._own = self._hf.config._attn_implementation
        own = self._own or "eager"
        ALL_ATTENTION_FUNCTIONS.register(_NAME + own, _attention_like(own))
        masks = ALL_MASK_ATTENTION_FUNCTIONS
        if own in masks:
            masks.register(_NAME + own, masks[own])
        self._hf.config._attn_implementation = _NAME + own
        for module in dict.fromkeys([self._hf, self._hf.base_model]):
            self._handles.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._end, always_call=True))

    def release(self) -> None:
        """End: the model, and the caches that it was given, are as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hf.config._attn_implementation = self._own
        for cache in list(self._caches):
            for name in _MOVES:
                vars(cache).pop(name, None)
        self._caches.clear()

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        named = dict(zip(inspect.signature(module.forward).parameters, args, strict=False))
        call = {**named, **kwargs}
        cache = call.get(_CACHE)
        if cache is not None:
            call[_CACHE] = self._unedited(cache)
        now = _Pass()
        _NOW.set(now)
        with torch.no_grad(), no_hooks():
            made = module(**call)
        now.recording = False
        self._made = getattr(made, _CACHE, None) if cache is None else None

    def _end(self, _module: nn.Module, _args: tuple, output: Any) -> None:
        self._depth = max(self._depth - 1, 0)
        if self._depth:
            return
        _NOW.set(None)
        cache, made = getattr(output, _CACHE, None), self._made
        self._made = None
        if cache is not None and made is not None:
            self._follow(cache, made)

    def _unedited(self, cache: Any) -> Any:
        """The cache of the same tokens without edits. InputError for one of a pass before."""
        if not int(cache.get_seq_length()):
            self._follow(cache, copy.deepcopy(cache))
        if cache not in self._caches:
            raise InputError(
                "the patterns of tokens that a KV cache held before are not known: begin the text "
                "within the block",
                where="freeze_attention",
                given=f"a cache of {int(cache.get_seq_length())} tokens",
            )
        return self._caches[cache]

    def _follow(self, cache: Any, unedited: Any) -> None:
        """Do to the cache without edits what is done to a cache: beams change places, say."""
        self._caches[cache] = unedited
        for name in _MOVES:
            vars(cache).pop(name, None)
            own, other = getattr(cache, name, None), getattr(unedited, name, None)
            if own is None or other is None:
                continue

            def both(*args: Any, own: Any = own, other: Any = other, **kwargs: Any) -> Any:
                other(*args, **kwargs)
                return own(*args, **kwargs)

            setattr(cache, name, both)
