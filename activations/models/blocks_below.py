"""Running a model again on the same tokens, without the blocks below a site.

What the blocks below a site give does not depend on what is put in at the site. So it is kept from
a first pass, and in later passes none of these blocks is run.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from activations.models.language import Model


class BlocksBelow:
    """The blocks below a site's own.

    There are none for a site outside of the blocks, nor where blocks hand something on beside
    their output (found by trying), so that such a model runs as a whole.

    >>> below = BlocksBelow(model, "blocks.9.hook_resid_post")  # doctest: +SKIP
    >>> with below.keeping() as kept:  # doctest: +SKIP
    ...     model.logits(tokens)
    >>> with below.skipping(kept[-1]):  # doctest: +SKIP
    ...     model.logits(tokens)  # the same, from the site's block on
    """

    def __init__(self, model: Model, site: str) -> None:
        layer = re.match(r"blocks\.(\d+)\.", site)
        count = int(layer.group(1)) if layer else 0
        blocks = model.hf.get_submodule(model.adapter.get_component_mapping()["blocks"].name)
        self._blocks: list[nn.Module] = list(blocks)[:count]
        if self._blocks and not self._exact(model):
            self._blocks = []

    def __len__(self) -> int:
        return len(self._blocks)

    @contextmanager
    def keeping(self) -> Iterator[list[Any]]:
        """A list that gains, with each pass, what the last of the blocks gives.

        A model that looks at its sites for the first time runs some tokens of its own before.
        """
        kept: list[Any] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            kept.append(_copied(output))

        with ExitStack() as stack:
            if self._blocks:
                stack.callback(self._blocks[-1].register_forward_hook(keep).remove)
            yield kept

    @contextmanager
    def skipping(self, output: Any) -> Iterator[None]:
        """While the context lasts, each of the blocks gives this output and computes nothing."""
        own = [vars(block).get("forward") for block in self._blocks]
        try:
            for block in self._blocks:
                block.forward = _giving(output)
            yield
        finally:
            for block, forward in zip(self._blocks, own, strict=True):
                if forward is not None:
                    block.forward = forward
                else:
                    vars(block).pop("forward", None)

    def _exact(self, model: Model) -> bool:
        """Whether the model's logits are the same without the blocks."""
        tokens = model.example(2, min(4, model.n_ctx or 4))
        with self.keeping() as kept:
            whole = model.logits(tokens)
        try:
            with self.skipping(kept[-1]):
                found = model.logits(tokens)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return False  # a later block looks for what one of these would have left
        return torch.equal(whole, found)


def _giving(output: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: _copied(output)


def _copied(output: Any) -> Any:
    """An output, safe from blocks that work in place."""
    if isinstance(output, Tensor):
        return output.clone()
    return type(output)(_copied(each) for each in output) if isinstance(output, tuple) else output
