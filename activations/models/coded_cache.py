"""A KV cache that holds codes: what attention reads of older tokens is what their codes say.

The newest tokens are kept as they are, in 16 bits. Older ones are coded in groups, oldest first:
before the token at position t is read, all groups that end at or before t - window are coded. Codes
are decoded as soon as they are made, which gives what decoding them at each pass would.

So a pass of one token and a pass of a whole group, from a multiple of `group` to the next, read the
same cache: a text that is known can be run a group at a time and gives, up to rounding, what
reading it token by token gives. A longer pass reads its own tokens as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from activations.models.language import Model
from saescope.errors import InputError
from saescope.integers import as_index

EXACT_BITS = 16
"""of each number that is not coded"""

Vectors = Float[Tensor, "batch head position d_head"]


class Coded(NamedTuple):
    """Keys or values after a round trip through a code."""

    x_hat: Vectors
    """as attention reads them"""
    bits: int
    """what their codes take"""


Codec = Callable[[Vectors, int], Coded]
"""Of some tokens' keys or values, and the position of the first, to what their codes say."""


class CodedLayer(DynamicLayer):
    """One layer's cache, coded up to `window` tokens before the present."""

    def __init__(self, keys: Codec, values: Codec, *, window: int, group: int) -> None:
        super().__init__()
        self.codecs = (keys, values)
        self.window, self.group = window, group
        self.coded = 0
        """tokens that are coded"""
        self.coded_bits = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Code what is old enough by now, take in new tokens, and give all that attention reads."""
        self._code(self.get_seq_length())
        both = (_kept(each) for each in (key_states, value_states))
        return super().update(*both, *args, **kwargs)

    def _code(self, now: int) -> None:
        due = max(0, now - self.window) // self.group * self.group
        if due <= self.coded:
            return
        for codec, held in zip(self.codecs, self._held(), strict=True):
            for first in range(self.coded, due, self.group):
                old = held[:, :, first : first + self.group]
                found = codec(old, first)
                old.copy_(found.x_hat)
                self.coded_bits += found.bits
        self.coded = due

    @property
    def bits(self) -> int:
        """Of all that is held, codes and what is not coded."""
        exact = sum(each[:, :, self.coded :].numel() for each in self._held())
        return self.coded_bits + EXACT_BITS * exact

    @property
    def numbers(self) -> int:
        """How many numbers are held: tokens, heads and channels of keys and values."""
        return sum(each.numel() for each in self._held())

    def _held(self) -> tuple[Tensor, ...]:
        """Keys and values; none before the first pass."""
        return tuple(each for each in (self.keys, self.values) if each is not None)


def _kept(x: Tensor) -> Tensor:
    """In the 16 bits in which a cache holds them; float32 only to be computed with."""
    return x.to(torch.float16).to(x.dtype) if x.dtype == torch.float32 else x


class CodedCache(Cache):
    """A cache with a codec for keys and one for values in each layer.

    >>> cache = CodedCache(codecs, window=32, group=32)  # doctest: +SKIP
    >>> model.hf(input_ids=tokens, past_key_values=cache)  # doctest: +SKIP
    """

    def __init__(
        self, codecs: Sequence[tuple[Codec, Codec]], *, window: int = 32, group: int = 32
    ) -> None:
        """Args: codecs are of each layer; window tokens are never coded; group are coded at once.

        Raises InputError for a window or group that is no count.
        """
        known = {"window": as_index(window, where="window", low=0)}
        known["group"] = as_index(group, where="group", low=1)
        self.layers: list[Any]
        super().__init__(layers=[CodedLayer(keys, values, **known) for keys, values in codecs])

    @property
    def bits(self) -> int:
        """Of all that is held now, codes and what is not coded; dictionaries are not in it."""
        return sum(layer.bits for layer in self.layers)

    @property
    def bits_a_number(self) -> float:
        """Bits for each channel of each key and value that is held now."""
        return self.bits / sum(layer.numbers for layer in self.layers)


@torch.no_grad()
def losses(
    model: Model, tokens: Int[Tensor, "batch pos"], cache: CodedCache, *, step: int | None = None
) -> Float[Tensor, "batch pos-1"]:
    """Cross-entropy of each next token, nats, read with an empty cache `step` tokens at a time.

    step: the cache's group, if not given; 1 reads token by token.

    Raises InputError for a step over which tokens would be read that are due to be coded.
    """
    group = cache.layers[0].group
    each = group if step is None else as_index(step, where="step", low=1)
    if group % each:
        raise InputError(
            "passes cross groups", where="step", given=each, allowed=f"a divisor of {group}"
        )
    tokens = tokens.to(model.device)
    found = []
    for first in range(0, tokens.shape[1], each):
        own = tokens[:, first : first + each]
        logits = model.hf(input_ids=own, past_key_values=cache, use_cache=True).logits
        after = tokens[:, first + 1 : first + 1 + each]
        logits = logits[:, : after.shape[1]].float()
        found.append(torch.nn.functional.cross_entropy(logits.mT, after, reduction="none"))
    return torch.cat(found, dim=1)


@torch.no_grad()
def keys_and_values(
    model: Model, tokens: Int[Tensor, "batch pos"]
) -> list[tuple[Vectors, Vectors]]:
    """What a cache holds of texts, of each layer: keys, rotated as attention reads them, values."""
    out = model.hf.base_model(input_ids=tokens.to(model.device), use_cache=True)
    return [(layer.keys, layer.values) for layer in out.past_key_values.layers]


class Unrotated:
    """A codec of keys as they were before rotary position embedding; they are rotated when read."""

    def __init__(self, model: Model, codec: Codec) -> None:
        rotary = getattr(model.hf.base_model, "rotary_emb", None)
        if rotary is None:
            raise InputError("its keys are not rotated", where="Unrotated", given=model.name)
        self._rotary, self._codec = rotary, codec

    def __call__(self, x: Vectors, first: int) -> Coded:
        """Keys as the cache has them, to what is read of their codes."""
        found = self._codec(rotated(self._rotary, x, first, back=True), first)
        return Coded(rotated(self._rotary, found.x_hat, first), found.bits)


def rotated(rotary: Any, x: Vectors, first: int, *, back: bool = False) -> Vectors:
    """Keys [batch, head, position, d_head] turned by their positions, from `first` on.

    rotary: the model's rotary embedding, in transformers' layout (halves are pairs).
    """
    position = torch.arange(first, first + x.shape[2], device=x.device)[None]
    cos, sin = rotary(x, position)
    low, high = x.chunk(2, dim=-1)
    turned = torch.cat([-high, low], dim=-1)
    return x * cos[:, None] + (-turned if back else turned) * sin[:, None]
