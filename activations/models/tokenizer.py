"""Text and tokens of one tokenizer: BOS, special tokens, and each token's own piece of text."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activations.corpora.long_texts import LONG_CHARACTERS, encoded_in_pieces
from saescope.artefact import sha256_json
from saescope.errors import InputError

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_TOKENIZER_FILES = ("token*", "vocab*", "merges*", "*.model", "*.tiktoken", "spiece*")


class TextCodec:
    """A tokenizer as saescope uses it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        plain = tokenizer("a", add_special_tokens=False).input_ids
        ids = tokenizer("a").input_ids
        adds_bos = len(ids) > len(plain) and ids[0] == tokenizer.bos_token_id
        self.bos_token_id: int | None = tokenizer.bos_token_id if adds_bos else None
        self.eos_token_id: int | None = tokenizer.eos_token_id
        added = tokenizer.added_tokens_decoder.items()
        self.special_token_ids = frozenset(
            [*tokenizer.all_special_ids, *(number for number, token in added if token.special)]
        )
        self._anchor: list[int] = plain[-1:]
        self._size = len(tokenizer)

    @property
    def hash(self) -> str:
        """Of the whole tokenizer where it is a fast one, else of its vocabulary."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        content = backend.to_str() if backend is not None else self.tokenizer.get_vocab()
        return sha256_json([content, self.bos_token_id, self.eos_token_id])

    def encode(self, text: str) -> list[int]:
        """Token ids, with BOS first where the model's tokenizer adds one, and no EOS."""
        ids = self.encode_batch([text])[0]
        return ids if self.bos_token_id is None else [self.bos_token_id, *ids]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, no special tokens added.

        A BOS that a text brings itself (what chat templates and copied text do) is left out where
        the model's tokenizer adds one.
        """
        if any(len(text) > LONG_CHARACTERS for text in texts):
            return [
                list(chain.from_iterable(encoded_in_pieces(t, self.encode_batch))) for t in texts
            ]
        found = self.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
        return found if self.bos_token_id is None else [self._without_bos(ids) for ids in found]

    def spell(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int32], str]:
        """A document's token ids [position] without BOS in front and EOS behind, and its text.

        These two are put where the harvest's sequences want them.

        Raises InputError for an id that the tokenizer does not have.
        """
        strange = ids[(ids < 0) | (ids >= self._size)]
        if len(strange):
            raise InputError(
                "is no token of this model's tokenizer: was the corpus made with another one?",
                given=int(strange[0]),
                allowed=f"0 to {self._size - 1}",
            )
        bos, eos = self.bos_token_id, self.eos_token_id
        if bos is not None and len(ids) and ids[0] == bos:
            ids = ids[1:]
        if eos is not None and len(ids) and ids[-1] == eos:
            ids = ids[:-1]
        return ids.astype(np.int32), self.decode(ids.tolist())

    def _without_bos(self, ids: list[int]) -> list[int]:
        first = next((n for n, each in enumerate(ids) if each != self.bos_token_id), len(ids))
        return ids[first:] if first else ids

    def begins_with_bos(self, text: str) -> bool:
        """Whether a text brings the BOS that the model's tokenizer adds."""
        return self.bos_token_id is not None and text.startswith(self.tokenizer.bos_token)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, with_answer_begun: bool = False
    ) -> str:
        """What the tokenizer's chat template makes of a conversation, without a BOS in front.

        Args: with_answer_begun: the text ends where the model's answer begins.

        Raises InputError if it has no template, or if that refuses the conversation.
        """
        if not self.tokenizer.chat_template:
            raise InputError("this model's tokenizer has no chat template")
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=with_answer_begun
            )
        except MemoryError:
            raise
        except Exception as error:  # a template is a program of its author's
            raise InputError(f"the chat template refuses this conversation: {error}") from error
        # every sequence begins with a BOS already, where the model uses one
        bos = self.tokenizer.bos_token if self.bos_token_id is not None else None
        return text.removeprefix(bos) if bos else text

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens spelled out."""
        return self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token's own text; joined, they are the text of the whole.

        A character whose bytes are spread over several tokens is shown by the token that completes
        it, and the tokens before show ''. Bytes that never become a character show as U+FFFD.
        """
        # An ordinary token comes first, since some tokenizers drop the space that begins a text.
        # Decoding goes on from the last token that is whole by itself, so it stays linear.
        tokens, start, before = list(ids), 0, self._anchor
        shown = self.decode(before)
        pieces = []
        for end in range(1, len(tokens) + 1):
            text = self.decode([*before, *tokens[start:end]])
            if text.endswith(_REPLACEMENT) and end < len(tokens):
                pieces.append("")
                continue
            last = tokens[end - 1]
            pieces.append(text[len(shown) :] if last < self._size else _unused(last))
            start, before, shown = end, [last], self.decode([last])
            if _REPLACEMENT in shown:  # the end of a character, which would spoil what follows
                before, shown = self._anchor, self.decode(self._anchor)
        return pieces

    def vocabulary(self, size: int) -> list[str | bytes]:
        """The text of each token id below `size`, by itself; bytes where it is part of a character.

        A model may have more rows than its tokenizer has tokens; those are named as unused.
        """
        first = len(self.decode(self._anchor))
        known = range(min(size, self._size))
        texts = self.tokenizer.batch_decode(
            [[*self._anchor, number] for number in known],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        found = [self._whole_or_bytes(n, text[first:]) for n, text in enumerate(texts)]
        return found + [_unused(n) for n in range(len(known), size)]

    def _whole_or_bytes(self, number: int, text: str) -> str | bytes:
        if _REPLACEMENT not in text:
            return text
        token = self.tokenizer.convert_ids_to_tokens(number)
        fallback = _BYTE_TOKEN.fullmatch(token)
        if fallback:
            return bytes.fromhex(fallback[1])
        known = _byte_of_character()
        return bytes(known[c] for c in token) if all(c in known for c in token) else text


def tokenizer_of(folder: Path, load: Callable[[], Any]) -> Any:
    """A folder's tokenizer; None if it has none, though a library may make an empty one then.

    Raises what loading one raises, if there is something to load.
    """
    try:
        tokenizer = load()
    except Exception:
        if any(next(folder.glob(name), None) for name in _TOKENIZER_FILES):
            raise
        return None
    return tokenizer if tokenizer("a", add_special_tokens=False).input_ids else None


@cache
def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 is itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(rest)}


def _unused(number: int) -> str:
    return f"<unused {number}>"
