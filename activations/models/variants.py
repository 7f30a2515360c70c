"""What a model makes of many variants of one activation of a text, computed together.

A variant differs from the text's own activation at one position of one site, so what comes before
the site, and all that earlier positions computed, is the same for all of them: it is computed once,
and only the layers behind the site, at that one position, run for each variant.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations.models.language import Model
from activations.models.unembedding import Unembedding
from activations.sites.hooks import HookTarget, run_until_captured, splicing

_AGREEMENT = 1e-3
"""largest relative difference from a plain run at which the shared computation is trusted"""


class Variants:
    """Runs variants of texts' activations at one site of a language model.

    >>> variants = Variants(model, "blocks.9.hook_resid_post")  # doctest: +SKIP
    >>> text = variants.text(model.tokenize("In the town of Paris"))  # doctest: +SKIP
    >>> variants.logits(text.after(5, changes)).shape  # doctest: +SKIP
    torch.Size([64, 49152])

    Raises InputError for an unknown site, and for a model whose logits are not its final norm and
    unembedding alone.
    """

    def __init__(self, model: Model, site: str) -> None:
        self.model = model
        self.site = site
        self.logits = Unembedding(model)
        """from residual streams behind the last block to logits, float32"""
        self.target: HookTarget = model.site_map.target(site)
        self.last: HookTarget = model.site_map.target(self.logits.site)

    def text(self, tokens: Sequence[int]) -> "Text":
        """A text, run once as it is."""
        return Text(self, torch.tensor([list(tokens)], device=self.model.device))

    @cached_property
    def shares(self) -> bool:
        """Whether this model lets variants share what they have in common.

        Tried on a few tokens, and compared with a plain run: some models keep no keys and values,
        keep them otherwise, or have blocks that ask for one size of batch throughout.
        """
        tokens = self.model.example(1, min(6, self.model.n_ctx or 6)).to(self.model.device)
        text = Text(self, tokens, shares=True)
        at = tokens.shape[1] - 1
        change = torch.linspace(-1, 1, 3)[:, None] * text.activation[at].abs().mean()
        change = change.expand(-1, text.activation.shape[1])
        plain = text.plainly_after(at, change)
        try:
            found = text.after(at, change)
        except Exception:  # whatever the model's own code makes of it
            return False
        return _agree(found, plain)

    @cached_property
    def mixes(self) -> bool:
        """Whether variants at several positions of one text can be run together, tried likewise."""
        if not self.shares:
            return False
        tokens = self.model.example(1, min(6, self.model.n_ctx or 6)).to(self.model.device)
        text = Text(self, tokens)
        at = torch.arange(1, tokens.shape[1])
        change = torch.zeros(len(at), text.activation.shape[1], device=tokens.device)
        try:
            found = text.together(at, change)
        except Exception:  # whatever the model's own code makes of it
            return False
        return _agree(found, text.residual[1:])

    @property
    def window(self) -> int | None:
        """How many positions back the shortest-sighted layer looks; None where all look at all."""
        config = self.model.hf.config.get_text_config()
        return getattr(config, "sliding_window", None)


class Text:
    """A text that was run once, of which variants are wanted."""

    def __init__(self, variants: Variants, tokens: Tensor, *, shares: bool | None = None) -> None:
        self._of = variants
        self._tokens = tokens
        self._shares = variants.shares if shares is None else shares
        self._cache = _empty_cache() if self._shares else None
        cached = {"past_key_values": self._cache, "use_cache": True}
        wanted = {each.site: each for each in (variants.target, variants.last)}
        with torch.no_grad():
            found = run_until_captured(
                list(wanted.values()),
                lambda: variants.model.hf.base_model(
                    input_ids=tokens, **(cached if self._shares else {"use_cache": False})
                ),
                tokens.shape,
            )
        self.activation: Float[Tensor, "pos d_in"] = found[variants.site][0].float()
        """at the site"""
        self.residual: Float[Tensor, "pos d_model"] = found[variants.last.site][0].float()
        """behind the last block"""

    def after(self, position: int, change: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_model"]:
        """Residual streams behind the last block, at the position, float32.

        Args: change is what is added to the activation there, a row a variant.
        """
        if not self._shares:
            return self.plainly_after(position, change)
        tokens = self._tokens[:, position : position + 1]
        at = torch.tensor([[position]], device=tokens.device)

        def run() -> object:
            return self._of.model.hf.base_model(
                input_ids=tokens,
                position_ids=at,
                past_key_values=_shared(self._cache, position),
                use_cache=True,
            )

        last = self._of.last
        with torch.no_grad(), self._adding(change):
            found = run_until_captured([last], run, (len(change), 1))[last.site]
        return found[:, 0].float()

    def after_each(
        self, position: Int[Tensor, " n"], change: Float[Tensor, "n d_in"]
    ) -> Float[Tensor, "n d_model"]:
        """`after` of changes that are each at a position of their own."""
        window = self._of.window
        if self._of.mixes and (window is None or window >= self._tokens.shape[1]):
            return self.together(position, change)
        found = self.residual.new_empty(len(position), self.residual.shape[1])
        for at in position.unique().tolist():
            mine = position == at
            found[mine] = self.after(at, change[mine])
        return found

    def together(self, position: Tensor, change: Tensor) -> Tensor:
        """Each variant as a text of its own that goes on from the same keys and values.

        The row at position p is the token after all of them; those from p on are hidden from it.
        """
        length = self._tokens.shape[1]
        position = position.to(self._tokens.device)
        seen = torch.arange(length + 1, device=position.device) < position[:, None]
        seen[:, -1] = True
        last = self._of.last

        shape = (len(change), 1)
        with torch.no_grad(), self._adding(change):
            found = run_until_captured(
                [last],
                lambda: self._of.model.hf.base_model(
                    input_ids=self._tokens[0, position][:, None],
                    position_ids=position[:, None],
                    attention_mask=seen.long(),
                    past_key_values=_shared(self._cache, length),
                    use_cache=True,
                ),
                shape,
            )[last.site]
        return found[:, 0].float()

    def _adding(self, change: Tensor) -> AbstractContextManager[None]:
        """While it lasts, a pass over one token goes on with each of the changes from the site."""
        target = _Widened(**vars(self._of.target), count=len(change))

        def edit(h: Tensor, _position: Tensor) -> Tensor:
            return h + change[:, None].to(h.device, h.dtype)

        return splicing(self._of.model.hf, [(target, edit)])

    def plainly_after(self, position: int, change: Tensor) -> Tensor:
        """The same by running the whole text anew for each variant."""

        def edit(h: Tensor, _position: Tensor) -> Tensor:
            moved = h.clone()
            moved[:, position] += change.to(h.device, h.dtype)
            return moved

        last = self._of.last.site
        batch = self._tokens[:, : position + 1].expand(len(change), -1)
        with self._of.model.edit({self._of.site: edit}):
            return self._of.model.capture(batch, [last])[last][:, position].float()


def _agree(found: Tensor, plain: Tensor) -> bool:
    same = found.shape == plain.shape
    return same and bool((found - plain).norm() <= _AGREEMENT * plain.norm())


@dataclass(frozen=True, kw_only=True)
class _Widened(HookTarget):
    """A target whose activation, of one text, is read as that of so many."""

    count: int

    def read(self, value: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        return super().read(value, shape).expand(self.count, -1, -1)


def _empty_cache() -> Any:
    """A cache of keys and values that keeps all of them, whatever window a layer looks through."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache()


def _shared(cache: Any, length: int) -> Any:
    """The first positions of a cache, for any number of texts that go on from it, and unchanged."""
    from transformers.cache_utils import Cache, DynamicLayer

    class Shared(DynamicLayer):
        """One text's keys and values, seen by each row of a batch."""

        def update(
            self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            several = (len(key_states), -1, -1, -1)
            keys, values = self.keys, self.values
            assert keys is not None
            assert values is not None
            return (
                torch.cat([keys.expand(several), key_states], dim=-2),
                torch.cat([values.expand(several), value_states], dim=-2),
            )

    layers = []
    for each in cache.layers:
        layer = Shared()
        layer.lazy_initialization(each.keys, each.values)
        layer.keys, layer.values = each.keys[..., :length, :], each.values[..., :length, :]
        layers.append(layer)
    return Cache(layers=layers)
