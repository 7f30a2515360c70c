"""A model without a tokenizer: token ids can be run, and text is refused with one line."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saescope.artefact import sha256_json
from saescope.errors import InputError


class NoText:
    """In place of `TextCodec`; what is special is what the model's configuration says.

    Args: config is the model's own, n_tokens the size of its vocabulary.
    """

    tokenizer = None
    bos_token_id = None

    def __init__(self, config: Any, n_tokens: int) -> None:
        self._size = n_tokens
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        found = {name: getattr(config, name, None) for name in names}
        lists = [each if isinstance(each, list) else [each] for each in found.values()]
        known = [each for ids in lists for each in ids if isinstance(each, int)]
        self.special_token_ids = frozenset(each for each in known if 0 <= each < n_tokens)
        eos = found["eos_token_id"]
        eos = eos[0] if isinstance(eos, list) and eos else eos
        self.eos_token_id: int | None = eos if eos in self.special_token_ids else None

    @property
    def hash(self) -> str:
        """Of what is special, as there are no words."""
        return sha256_json(["no tokenizer", self._size, sorted(self.special_token_ids)])

    def _refuse(self) -> InputError:
        return InputError(
            "this model has no tokenizer, so it reads token ids alone (a corpus of them: "
            "corpus.tokens_field)"
        )

    def encode(self, text: str) -> list[int]:
        """Raises InputError."""
        raise self._refuse()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Raises InputError."""
        raise self._refuse()

    def begins_with_bos(self, text: str) -> bool:
        """Raises InputError."""
        raise self._refuse()

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Raises InputError."""
        raise self._refuse()

    def spell(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int32], str]:
        """Token ids of a document without an EOS behind, and their numbers as its text.

        Raises InputError for an id that the model does not have.
        """
        strange = ids[(ids < 0) | (ids >= self._size)]
        if len(strange):
            raise InputError(
                "is no token of this model",
                given=int(strange[0]),
                allowed=f"0 to {self._size - 1}",
            )
        if len(ids) and ids[-1] == self.eos_token_id:
            ids = ids[:-1]
        return ids.astype(np.int32), self.decode(ids.tolist())

    def decode(self, ids: Sequence[int]) -> str:
        """The numbers of tokens."""
        return "".join(self.pieces(ids))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token's number."""
        return [f"<{each}>" for each in ids]

    def vocabulary(self, size: int) -> list[str | bytes]:
        """The number of every token."""
        return [f"<{each}>" for each in range(size)]
