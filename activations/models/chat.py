"""Conversations as a model's chat template writes them, and whose message each token is of."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saescope.errors import InputError

_MARK = "\ue000{}\ue001"
_MARKED = re.compile("\ue000([0-9]+)\ue001")


@dataclass(frozen=True)
class ChatTokens:
    """A conversation's tokens, as `Model.generate` takes them, and whose each of them is."""

    ids: list[int]
    role: list[str | None]
    """who says each token; None for what the template adds"""
    text: str
    answer_begun: bool
    """whether what comes after these tokens is the assistant's"""


def chat_tokens(
    model: Any, messages: Sequence[Mapping[str, Any]], *, with_answer_begun: bool = True
) -> ChatTokens:
    """The tokens of a conversation, with the role of the message that each of them is part of.

    A token that is made of a message's end and of the template's text counts as the message's.

    Args: model is a language model with a tokenizer that has a chat template. messages have "role"
    and "content", a text. with_answer_begun: the tokens end where the model's answer begins.

    Raises InputError for a model without a template, a conversation that it refuses, a message that
    the template writes differently than it is (beyond spaces at its ends), and a tokenizer that
    does not say which characters its tokens are made of.

    >>> chat = chat_tokens(model, [{"role": "user", "content": "Who are you?"}])  # doctest: +SKIP
    >>> with sae.steer(model, dictionary, add={5: 8.0}, positions="user", chat=chat):
    ...     model.generate(chat.ids)  # doctest: +SKIP
    """
    codec = getattr(model, "codec", None)
    if codec is None or not getattr(getattr(codec, "tokenizer", None), "is_fast", False):
        raise InputError(
            "which tokens are whose is known from a fast tokenizer with a chat template",
            where="chat",
            given=getattr(model, "spec", type(model).__name__),
        )
    contents = [message.get("content") for message in messages]
    if not contents or not all(isinstance(content, str) and content for content in contents):
        raise InputError(
            "wants messages with a text each, as {'role': ..., 'content': ...}",
            where="chat",
            given=messages,
        )
    text = codec.render_chat(messages, with_answer_begun=with_answer_begun)
    marked = [{**each, "content": _MARK.format(n)} for n, each in enumerate(messages)]
    template = codec.render_chat(marked, with_answer_begun=with_answer_begun)
    spans = _spans(text, template, [str(content) for content in contents])
    encoded = codec.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded.input_ids), list(encoded.offset_mapping)
    while ids and ids[0] == codec.bos_token_id:  # one that the template brought
        ids, offsets = ids[1:], offsets[1:]
    whole = codec.encode(text)
    added = len(whole) - len(ids)
    if whole[added:] != ids:
        raise InputError("is too long to say whose each token is", where="chat", given=len(text))
    whose = [_role(spans, *offset) for offset in offsets]
    roles = [None if n is None else str(messages[n].get("role")) for n in whose]
    return ChatTokens(whole, [None] * added + roles, text, with_answer_begun)


def _spans(text: str, template: str, contents: Sequence[str]) -> list[tuple[int, int, int]]:
    """Where each message stands in a text: its first character, the one after its last, its number.

    Args: template is the same conversation with a mark of its number for each message.
    """
    written = _MARKED.split(template)
    at, found = len(written[0]), []
    fits = text.startswith(written[0])
    for number, after in zip(written[1::2], written[2::2], strict=True):
        content = contents[int(number)]
        shapes = (content, content.rstrip(), content.lstrip(), content.strip())
        shape = next((s for s in shapes if text.startswith(s + after, at)), None)
        if shape is None:
            fits = False
            break
        found.append((at, at + len(shape), int(number)))
        at += len(shape) + len(after)
    if not fits or at != len(text) or {n for *_, n in found} != set(range(len(contents))):
        raise InputError(
            "the chat template changes what is said, so which tokens are whose is not known",
            where="chat",
            given=text[:80],
        )
    return found


def _role(spans: Sequence[tuple[int, int, int]], start: int, end: int) -> int | None:
    """The number of the message that has one of these characters."""
    return next((n for first, last, n in spans if start < last and end > first), None)
