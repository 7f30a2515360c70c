"""Long texts, tokenised a piece at a time so that memory stays bounded."""

import re
from collections.abc import Callable, Iterator, Sequence

LONG_CHARACTERS = 1 << 20
"""A text of more characters is tokenised in pieces."""


_PIECE_CHARACTERS = 1 << 18


def encoded_in_pieces(
    text: str, encode: Callable[[Sequence[str]], list[list[int]]]
) -> Iterator[list[int]]:
    """Token ids of a text, a piece at a time where it is long, so that memory stays bounded.

    A tokenizer takes some 300 bytes a character. Texts are cut between a line's end and what is no
    white space, where tokens do not join; a tokenizer that puts something before a text's first
    word gets the line's end before each later piece.
    """
    if len(text) <= LONG_CHARACTERS:
        yield encode([text])[0]
        return
    (anchor,) = encode(["\n"])
    start = 0
    while start < len(text):
        end = _cut(text, start + _PIECE_CHARACTERS)
        follows = start > 0 and text[start - 1] == "\n"
        (ids,) = encode([text[start - follows : end]])
        known = follows and ids[: len(anchor)] == anchor
        if known:
            yield ids[len(anchor) :]
        else:
            yield encode([text[start:end]])[0] if follows else ids
        start = end


def _cut(text: str, end: int) -> int:
    """Where to cut a text: before a line of its own, or a word, after `end`."""
    for pattern in (_LINE, _WORD):
        found = pattern.search(text, end, end + _PIECE_CHARACTERS)
        if found:
            return found.end()
    return min(end + _PIECE_CHARACTERS, len(text))


_LINE, _WORD = re.compile(r"\n(?=\S)"), re.compile(r"\S(?=\s)")
