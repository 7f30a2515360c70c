"""A language model whose KV cache is coded: training keys and values, held-out texts, losses.

Held-out sequences are new text, then a stretch of it once more: what the copy costs says whether
the older cache can still be read precisely, which ordinary text hardly needs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Int
from torch import Tensor

from activations import CorpusConfig, Model, load_model
from activations.models.coded_cache import keys_and_values, rotated
from sae.analysis.cache_codecs import Rows
from saescope.config import Config
from saescope.errors import InputError

_HELD_OUT = 0.05
"""share of documents that nothing is fitted on"""


@dataclass(frozen=True, kw_only=True)
class Scale(Config):
    """Sizes of the experiment, and its model."""

    model: str = "smollm2-135m"
    """As `saescope harvest` names models."""
    dtype: str = "float32"
    """Precision in which it is run."""
    device: str = "cpu"
    """Where it is run."""
    source: str = "wikipedia"
    """Texts, as `[corpus] source` of a harvest names them."""
    training_tokens: int = 6144
    """Tokens of training text whose keys and values codecs are fitted on."""
    vectors: int = 8192
    """Of those, the vectors that a seed draws for each dictionary, all heads together."""
    atoms: int = 1024
    """Of each layer's dictionary for keys, and of that for values."""
    trained_k: int = 4
    """Atoms a vector in training; the dictionary is used at all sizes."""
    passes: float = 3.0
    """Over the vectors in training."""
    texts: int = 1
    """Held-out sequences of each seed."""
    context: int = 512
    """Tokens of a sequence."""
    copied: int = 192
    """How many of them, at the end, repeat an earlier stretch."""
    copied_from: int = 32
    """Where that stretch begins."""
    copy_seen: int = 16
    """Tokens of the copy that are not scored, by which it shows itself as one."""
    window: int = 32
    """Newest tokens that are never coded."""
    group: int = 32
    """Tokens that are coded at once."""
    held: int = 8192
    """Tokens of the cache that bits are stated for: the model's context."""
    caches: int = 16
    """How many such caches share the dictionaries."""

    def __post_init__(self) -> None:
        if self.fresh < self.copied_from + self.copied or self.copied <= self.copy_seen:
            raise InputError(
                "the stretch is not in the new text, or no more than what is not scored",
                where="copied",
                given=self.copied,
                allowed=f"{self.copy_seen + 1} to {self.fresh - self.copied_from}",
            )
        if self.fresh <= self.window + self.group + 1:
            raise InputError(
                "no token of the new text reads codes",
                where="context",
                given=self.context,
                allowed=f"above {self.copied + self.window + self.group + 1}",
            )

    @property
    def fresh(self) -> int:
        """Tokens of new text."""
        return self.context - self.copied


@cache
def model_of(scale: Scale) -> Model:
    """The model, loaded once."""
    return load_model(scale.model, dtype=scale.dtype, device=scale.device)


def documents(scale: Scale, *, held_out: bool) -> Iterator[str]:
    """The texts of one split: what is held out is told by a text alone."""
    for document in model_of(scale).documents(CorpusConfig(source=scale.source)):
        if not document.is_empty and document.is_held_out(_HELD_OUT) == held_out:
            yield document.text


def _stream(scale: Scale, *, held_out: bool) -> Iterator[int]:
    """Tokens of the documents of one split, EOS after each."""
    model = model_of(scale)
    for text in documents(scale, held_out=held_out):
        yield from model.tokenize_batch([text])[0]
        if model.eos_token_id is not None:
            yield model.eos_token_id


def _sequences(
    scale: Scale, count: int, length: int, *, held_out: bool, skip: int = 0
) -> Int[Tensor, "text pos"]:
    stream = _stream(scale, held_out=held_out)
    tokens = [token for token, _ in zip(stream, range((skip + count) * length), strict=False)]
    if len(tokens) < (skip + count) * length:
        split = "held-out" if held_out else "training"
        raise InputError(
            f"has too few {split} tokens",
            where="source",
            given=f"{scale.source}: {len(tokens)}",
            allowed=f"at least {(skip + count) * length}",
        )
    return torch.tensor(tokens[skip * length :]).view(count, length)


def texts(scale: Scale, seed: int) -> Int[Tensor, "text pos"]:
    """Held-out sequences of a seed, no other's: new text, then a stretch of it once more."""
    new = _sequences(scale, scale.texts, scale.fresh, held_out=True, skip=seed * scale.texts)
    return torch.cat([new, new[:, scale.copied_from : scale.copied_from + scale.copied]], dim=1)


def scored(scale: Scale) -> dict[str, slice]:
    """Which of the next-token losses count: all are of tokens that read codes."""
    return {
        "text": slice(scale.window + scale.group, scale.fresh - 1),
        "recall": slice(scale.fresh - 1 + scale.copy_seen, None),
    }


@cache
def training_rows(scale: Scale) -> list[tuple[Rows, Rows]]:
    """Keys and values [row, head, d_head] of training text, of each layer."""
    count = -(-scale.training_tokens // scale.fresh)
    batches = [
        keys_and_values(model_of(scale), each)
        for each in _sequences(scale, count, scale.fresh, held_out=False).split(4)
    ]
    return [
        tuple(  # type: ignore[misc]
            torch.cat([batch[layer][which].transpose(1, 2).flatten(0, 1) for batch in batches])
            for which in range(2)
        )
        for layer in range(len(batches[0]))
    ]


def unrotated_rows(scale: Scale, keys: Rows) -> Rows:
    """Training keys as they were before their positions turned them."""
    x = keys.unflatten(0, (-1, scale.fresh)).transpose(1, 2)
    rotary = model_of(scale).hf.base_model.rotary_emb
    return rotated(rotary, x, 0, back=True).transpose(1, 2).flatten(0, 1)


@cache
def exact_losses(scale: Scale, seed: int) -> Tensor:
    """Losses without a cache."""
    model, tokens = model_of(scale), texts(scale, seed)
    found = []
    for each in tokens.split(1):
        logits = model.logits(each)[:, :-1].float()
        after = each[:, 1:].to(logits.device)
        found.append(torch.nn.functional.cross_entropy(logits.mT, after, reduction="none"))
    return torch.cat(found)
