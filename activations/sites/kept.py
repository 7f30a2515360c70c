"""Which positions of a text count: one rule, for harvests, edits, evaluation and live text.

A token's position is its index among the tokens of its own text, from 0; padding, on whatever side,
has none (-1). A text is what one pass reads as one: in a harvest a whole sequence, even if it holds
the end of one document and the beginning of another. Position 0 and special tokens (BOS, EOS,
padding, ...) are not kept: SAEs are neither trained nor measured on them. (A harvest may leave out
positions with outlier norms besides: `activations.harvesting.outliers`.)
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from saescope.errors import InputError

_CACHES = ("past_key_values", "cache_params", "state")
"""What models of transformers call their memory of earlier tokens."""
_PROMPT: ContextVar[Tensor | int | None] = ContextVar("prompt", default=None)


def real_tokens(
    tokens: Int[Tensor, "batch pos"], attention_mask: Tensor | None
) -> Bool[Tensor, "batch pos"]:
    """Which tokens are no padding: those whose mask, [batch, pos] of 0 and 1, is 1; without, all.

    Raises InputError for a mask of another shape or kind, or a row without a token.
    """
    if attention_mask is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    if attention_mask.shape != tokens.shape:
        raise InputError(
            "must be of the tokens' shape",
            where="attention_mask",
            given=tuple(attention_mask.shape),
            allowed=str(tuple(tokens.shape)),
        )
    real = attention_mask.to(tokens.device) == 1
    if not bool((real | (attention_mask.to(tokens.device) == 0)).all()):
        raise InputError(
            "is 1 at tokens and 0 at padding",
            where="attention_mask",
            given=attention_mask.unique().tolist()[:8],
        )
    if not bool(real.any(1).all()):
        raise InputError(
            "a row has no token",
            where="attention_mask",
            given=f"row {int((~real.any(1)).nonzero()[0, 0])}",
        )
    return real


def positions_of(real: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """The position of each token in its text, -1 at padding.

    >>> positions_of(torch.tensor([[False, True, True], [True, True, False]])).tolist()
    [[-1, 0, 1], [0, 1, -1]]
    """
    return (real.long().cumsum(1) - 1).masked_fill(~real, -1)


def kept(
    tokens: Int[Tensor, "batch pos"],
    position: Int[Tensor, "batch pos"],
    special: Collection[int],
) -> Bool[Tensor, "batch pos"]:
    """Which tokens count: not a text's first, no special token, no padding.

    >>> kept(torch.tensor([[2, 2, 7, 9, 1]]), torch.tensor([[-1, 0, 1, 2, 3]]), {1, 2}).tolist()
    [[False, False, True, True, False]]
    """
    known = torch.tensor(sorted(special), device=tokens.device, dtype=tokens.dtype)
    return (position > 0) & ~torch.isin(tokens, known)


@dataclass(frozen=True)
class TokenPositions:
    """Where the tokens that a forward pass is run on stand in their texts."""

    position: Int[Tensor, "batch pos"]
    """-1 at padding; what a KV cache holds is counted"""
    tokens: Int[Tensor, "batch pos"] | None
    """None where the model is given embeddings"""
    special: frozenset[int]
    lengths: Int[Tensor, " batch"] | int | None = None
    """how many tokens each text's prompt has; None where it was not seen"""

    @property
    def prompt(self) -> Int[Tensor, " batch"]:
        """How many tokens each text's prompt has, padding not counted.

        A pass that continues nothing is a prompt as a whole. Raises InputError for one that goes on
        from a cache which was filled before anybody looked.
        """
        if self.lengths is None:
            raise InputError(
                "where the prompt ends is not known: its pass was before the edit",
                where="positions",
                given="prompt or generated",
                allowed="a slice, a list, a mask",
            )
        lengths, batch = (
            torch.as_tensor(self.lengths, device=self.position.device),
            len(self.position),
        )
        if lengths.ndim and len(lengths) != batch:
            raise InputError(
                "another number of texts than there were prompts",
                where="positions",
                given=batch,
                allowed=str(len(lengths)),
            )
        return lengths.expand(batch)

    @cached_property
    def shared(self) -> Int[Tensor, " pos"] | None:
        """The positions, where all rows have the same and none is padding."""
        first = self.position[0]
        same = bool((first >= 0).all()) and bool((self.position == first).all())
        return first if same else None

    @cached_property
    def kept(self) -> Bool[Tensor, "batch pos"]:
        """See `kept`. Raises InputError where the model is given embeddings and no tokens."""
        if self.tokens is None:
            raise InputError(
                "which positions are kept is known from tokens, and the model was given embeddings",
                where="positions",
                given="kept",
                allowed="all, a slice, a list",
            )
        return kept(self.tokens, self.position, self.special)


@contextmanager
def prompt_of(lengths: Int[Tensor, " batch"] | int) -> Iterator[None]:
    """Within the block, passes continue prompts of so many tokens each."""
    token = _PROMPT.set(lengths)
    try:
        yield
    finally:
        _PROMPT.reset(token)


@contextmanager
def generating(model: Any) -> Iterator[None]:
    """Within the block, `generate` of a model of transformers says where the prompts end.

    Without a KV cache every pass of it looks like a prompt.
    """
    own = getattr(model, "generate", None)
    if own is None:
        yield
        return
    telling = own if isinstance(own, _TellingGenerate) else _TellingGenerate(model, own)
    telling.blocks += 1
    try:
        yield
    finally:
        telling.blocks -= 1
        if not telling.blocks:
            telling.remove()


class _TellingGenerate:
    """A model's `generate` that says where the prompts end, for as many blocks as are open."""

    def __init__(self, model: Any, own: Callable[..., Any]) -> None:
        self.blocks = 0
        self._model, self._own = model, own
        self._before = vars(model).get("generate")
        model.generate = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        known = inspect.signature(self._own).bind_partial(*args, **kwargs).arguments
        known = {**known.pop("kwargs", {}), **known}
        tokens = next((known[n] for n in ("input_ids", "inputs", "input") if n in known), None)
        if isinstance(tokens, str) and hasattr(self._model, "to_tokens"):
            tokens = self._model.to_tokens(tokens)
        if not isinstance(tokens, Tensor):
            return self._own(*args, **kwargs)
        repeats = _texts_each(self._model, known)
        lengths = real_tokens(tokens, known.get("attention_mask")).sum(1)
        with prompt_of(lengths.repeat_interleave(repeats)):
            return self._own(*args, **kwargs)

    def remove(self) -> None:
        """Give the model its own `generate` back, unless somebody has replaced this one since."""
        if vars(self._model).get("generate") is not self:
            return
        if self._before is None:
            del self._model.generate
        else:
            self._model.generate = self._before


def _texts_each(model: Any, known: Mapping[str, Any]) -> int:
    """How many texts `generate` keeps for each prompt: beams, or several samples."""
    settings = [known.get("generation_config"), getattr(model, "generation_config", None)]
    given = [
        known.get(name) or next((getattr(s, name, None) for s in settings if s is not None), None)
        for name in ("num_beams", "num_return_sequences")
    ]
    return max(int(each or 1) for each in given)


class Run:
    """What is known of the forward pass that goes on now, seen where the model is called."""

    def __init__(self, special: frozenset[int]) -> None:
        self._special = special
        self._depth = 0
        self._token_positions: TokenPositions | None = None
        self._cache: tuple[Any, int | None] = (None, None)
        """one that does not say what it holds, and what it holds"""
        self._prompt: Tensor | None = None
        """tokens of the last texts that were begun"""

    @property
    def positions(self) -> TokenPositions:
        """Where the tokens of this pass stand."""
        if self._token_positions is None:
            raise InputError("the model was not given tokens or embeddings", where="edit")
        return self._token_positions

    @property
    def shape(self) -> torch.Size:
        """[batch, position] of this pass's tokens."""
        return self.positions.position.shape

    def at(self, value: Tensor, x: Tensor) -> TokenPositions:
        """The positions that a site's tensor has: those of the tokens, whatever the site."""
        del value, x
        return self.positions

    def watch(self, modules: Collection[nn.Module]) -> list[Any]:
        """Hooks on the modules that may be called with a text."""
        handles: list[Any] = []
        for module in dict.fromkeys(modules):
            handles.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
            handles.append(module.register_forward_hook(self._end, always_call=True))
        return handles

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._token_positions is not None:
            return  # the outer module was given more: not every one passes its mask on
        known = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        known = {**known.pop("kwargs", {}), **known}
        tokens = known.get("input_ids")
        given = known.get("inputs_embeds") if tokens is None else tokens
        if isinstance(given, Tensor) and given.ndim >= 2:
            past = self._in_cache(known, given.shape[1])
            position = _positions(given.shape[0], given.shape[1], past, given.device, known)
            if past == 0:
                self._prompt = position.amax(1) + 1
            said = _PROMPT.get()
            lengths = self._prompt if said is None else said
            self._token_positions = TokenPositions(position, tokens, self._special, lengths)

    def _in_cache(self, known: Mapping[str, Any], length: int) -> int | None:
        """How many tokens came before in the cache of a call; None if that cannot be told.

        A cache of recurrent layers does not say, so its tokens are counted from its beginning on.
        """
        caches = [known[name] for name in _CACHES if known.get(name) is not None]
        if not caches:
            return 0
        past = _said(caches[0])
        if past is None:
            before = caches[0] is self._cache[0]
            past = self._cache[1] if before else 0 if _is_new(caches[0]) else None
            self._cache = caches[0], None if past is None else past + length
        return past

    def _end(self, _module: nn.Module, _args: tuple, _output: Any) -> None:
        # a pass that fails in another's hook before `_begin` is ended all the same
        self._depth = max(self._depth - 1, 0)
        if not self._depth:
            self._token_positions = None


def _positions(
    batch: int, length: int, past: int | None, device: torch.device, known: Mapping[str, Any]
) -> Int[Tensor, "batch pos"]:
    """Positions of a call's tokens: by its mask, else by position_ids, else by its cache."""
    mask, ids = known.get("attention_mask"), known.get("position_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= length + (past or 0):
        end = mask.shape[1] if past is None else past + length
        return positions_of(mask[:, :end] > 0)[:, end - length :].to(device)
    if isinstance(ids, Tensor) and ids.ndim == 2 and ids.shape[1] == length:
        return ids.expand(batch, -1).to(device)
    if past is None:
        raise InputError(
            "this model's cache does not say how many tokens it holds: give attention_mask",
            where="edit",
        )
    return torch.arange(past, past + length, device=device).expand(batch, -1)


def _said(cache: Any) -> int | None:
    """How many tokens a cache says that it holds."""
    count = getattr(cache, "get_seq_length", None)
    try:
        return None if count is None else int(count())
    except ValueError:
        return None


def _is_new(cache: Any) -> bool:
    """Whether a cache of recurrent layers holds nothing yet."""
    holds = getattr(cache, "has_previous_state", None)
    return holds is not None and not holds()
