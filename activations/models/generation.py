"""Continuing a text: one token after the other, the likeliest or one that is drawn."""

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from activations.sites.kept import prompt_of
from saescope.errors import InputError

Choose = Callable[[Tensor], int]
"""From the logits [d_vocab] of the last position to the next token."""


def continued(
    hf: Any,
    prompt: Sequence[int],
    *,
    new_tokens: int,
    choose: Choose,
    ends: Container[int | None],
    device: torch.device,
    use_cache: bool = True,
    stop_at_eos: bool = True,
) -> Iterator[int]:
    """The tokens that follow a prompt, each as soon as it is known, at most `new_tokens`.

    Args: hf is a causal language model of transformers; ends are the tokens that end a text, which
    are not part of it. use_cache: each position is computed once, if the model has a KV cache.
    """
    past, new, ids = None, list(prompt), list(prompt)
    for _ in range(new_tokens):
        # a model without a KV cache, or one of another kind, reads all of it again
        inputs = torch.tensor([ids if past is None else new], device=device)
        cached = {} if past is None else {"past_key_values": past}
        with torch.no_grad(), prompt_of(len(prompt)):
            out = hf(input_ids=inputs, use_cache=use_cache, **cached)
        past = getattr(out, "past_key_values", None) if use_cache else None
        new = [choose(out.logits[0, -1])]
        if stop_at_eos and new[0] in ends:
            return
        ids += new
        yield new[0]


def chooser(temperature: float, seed: int) -> Choose:
    """The rule that picks the next token: the likeliest at 0, else drawn, the same for one seed."""
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> int:
        if temperature == 0:
            return int(logits.argmax())
        chances = (logits.float().cpu() / temperature).softmax(-1)
        return int(torch.multinomial(chances, 1, generator=generator))

    return choose


def check_room(n_ctx: int | None, tokens: int) -> None:
    """InputError if a prompt and its continuation have more tokens than the model's context."""
    if n_ctx is not None and tokens > n_ctx:
        raise InputError(
            "prompt and continuation are longer than the model's context",
            where="generate",
            given=tokens,
            allowed=f"up to {n_ctx}",
        )
