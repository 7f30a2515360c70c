"""Which logits a graph explains: the likeliest next tokens, or those that are asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from activations import Model
from saescope.errors import InputError, check_range
from saescope.integers import as_index

Output = int | str | tuple[int | str, int | str]
"""a token, by its id or text, or two whose logits' difference is meant"""


@dataclass(frozen=True)
class Outputs:
    """Logits at a prompt's last position, each above the mean of all, or a difference of two."""

    token: list[int]
    """of a difference the first"""
    text: list[str]
    probability: Tensor
    """[outputs]: the model's own, of a difference the first token's"""
    weight: Tensor
    """[outputs]: how much each counts: the probability, or 1 for a difference"""
    direction: Tensor
    """[outputs, d_model]: the logit is x . direction + bias, x behind the final norm"""
    bias: Tensor
    """[outputs]"""
    pairs: list[int | tuple[int, int]]
    """what they are, as `outputs_of` takes them"""


@torch.no_grad()
def outputs_of(
    model: Model,
    tokens: Sequence[int],
    wanted: Sequence[Output] | None,
    *,
    most: int,
    probability: float,
) -> Outputs:
    """The outputs asked for, or the likeliest tokens: so many that they have this probability.

    Raises InputError for a text that is not one token, a token that the model does not have, and a
    model whose logits are not its final norm and unembedding alone.
    """
    check_range("probability", probability, above=0, high=1)
    most = as_index(most, where="max_outputs", low=1)
    found = model.logits(torch.tensor([list(tokens)]))[0, -1].float().cpu().softmax(0)
    w_u, _ = model.unembedding()
    w_u = w_u.float().cpu()
    own: Any = getattr(model.hf.get_output_embeddings(), "bias", None)
    bias = torch.zeros(w_u.shape[1]) if own is None else own.detach().float().cpu()
    if wanted is None:
        top = found.topk(min(most, len(found)))
        count = int(torch.searchsorted(top.values.cumsum(0), probability)) + 1
        pairs: list[tuple[int, int | None]] = [(int(i), None) for i in top.indices[:count]]
    else:
        pairs = [_pair(model, each) for each in wanted]
        if not pairs:
            raise InputError("wants at least one", where="outputs", given=[])
    firsts = [first for first, _ in pairs]
    if len(set(firsts)) < len(firsts):
        raise InputError("a token comes first twice", where="outputs", given=list(wanted or []))
    directions, biases, texts, weights = [], [], [], []
    for first, second in pairs:
        other = w_u.mean(1) if second is None else w_u[:, second]
        directions.append(w_u[:, first] - other)
        biases.append(bias[first] - (bias.mean() if second is None else bias[second]))
        text = model.token_strings([first])[0]
        texts.append(text if second is None else f"{text} - {model.token_strings([second])[0]}")
        weights.append(float(found[first]) if second is None else 1.0)
    return Outputs(
        firsts,
        texts,
        found[firsts],
        torch.tensor(weights),
        torch.stack(directions),
        torch.stack(biases),
        [first if second is None else (first, second) for first, second in pairs],
    )


def _pair(model: Model, wanted: Output) -> tuple[int, int | None]:
    if isinstance(wanted, tuple):
        if len(wanted) != 2:
            raise InputError("a difference is of two tokens", where="outputs", given=wanted)
        return _token(model, wanted[0]), _token(model, wanted[1])
    return _token(model, wanted), None


def _token(model: Model, wanted: int | str) -> int:
    """The id of a token. Raises InputError for none, or a text of several."""
    if not isinstance(wanted, str):
        return as_index(wanted, where="outputs", low=0, high=model.d_vocab - 1)
    ids = model.tokenize_batch([wanted])[0]
    if len(ids) != 1:
        raise InputError(
            "is not one token (a word within a text begins with its space)",
            where="outputs",
            given=wanted,
            allowed=f"one token; this is {model.token_strings(ids)}",
        )
    return int(ids[0])
