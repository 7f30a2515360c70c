"""Text encoders such as BERT: each text by itself, between its special tokens, padded."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from activations.corpora.documents import Document
from activations.corpora.sequences import PLAIN, Described, PackingCounts, PackingOptions, Sequences
from activations.models.files import folder_of
from activations.models.foreign_code import loading
from activations.models.module_model import ModuleModel
from activations.models.tokenizer import TextCodec
from activations.sites.hf_facts import longest_text
from saescope.errors import InputError

_BATCH_DOCUMENTS = 64
_EXAMPLE_TOKENS = 4


def load_text_encoder(
    spec: str,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device,
    *,
    trusted: bool = False,
) -> "TextEncoder":
    """Load an encoder, or the encoder of an encoder-decoder. Raises InputError."""
    from transformers import AutoModel, AutoTokenizer

    folder, commit = folder_of(spec, revision, with_code=trusted)
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trusted}
    with loading(spec, folder, "text encoder", trusted=trusted):
        hf: Any = AutoModel.from_pretrained(folder, dtype=dtype, weights_only=True, **local)
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    module = hf.get_encoder() if hf.config.is_encoder_decoder else hf
    return TextEncoder(module.to(device), tokenizer, spec=spec, folder=folder, revision=commit)


class TextEncoder(ModuleModel):
    """An encoder with its tokenizer.

    A document is a sequence, or several where it is longer than the context: each has the special
    tokens that the tokenizer puts around a text, and padding at its end.
    """

    kind = "text_encoder"

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any,
        *,
        spec: str,
        folder: Path,
        revision: str | None = None,
    ) -> None:
        super().__init__(module, spec=spec, folder=folder, revision=revision)
        if tokenizer.pad_token_id is None:
            raise InputError("this encoder's tokenizer has no padding token", where=spec)
        self._text = TextCodec(tokenizer)
        self._pad = int(tokenizer.pad_token_id)
        self._before, self._after = _around(tokenizer)
        limits = [longest_text(module), tokenizer.model_max_length]
        self._n_ctx = min(int(limit) for limit in limits if limit is not None)

    def _hash_of_inputs(self) -> str:
        return self._text.hash

    @property
    def n_ctx(self) -> int:
        """The most tokens of a sequence, special ones included."""
        return self._n_ctx

    def example(
        self, count: int, positions: int | None = None
    ) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
        """Tokens, and which of them are no padding."""
        shape = (count, positions or _EXAMPLE_TOKENS)
        return torch.full(shape, self._pad), torch.ones(shape, dtype=torch.bool)

    def _run(self, inputs: tuple[Tensor, Tensor]) -> object:
        tokens, real = (part.to(self.device) for part in inputs)
        return self.module(input_ids=tokens.long(), attention_mask=real.long())

    def sequences(
        self,
        documents: Iterable[Document],
        *,
        context: int,
        per_group: int,
        counts: PackingCounts,
        limit: int | None = None,
        packing: PackingOptions = PLAIN,
    ) -> Iterator[Sequences]:
        """See `HarvestModel.sequences`; `document` is -1 at padding."""
        del packing
        left = sys.maxsize if limit is None else limit
        rows: list[list[int]] = []
        ids: list[int] = []
        waiting: list[Described] = []

        def group(n: int) -> Sequences:
            nonlocal rows, ids, waiting, left
            left -= n
            tokens = np.full((n, context), self._pad, np.int32)
            document = np.full((n, context), -1, np.int32)
            for number, (row, of) in enumerate(zip(rows[:n], ids, strict=False)):
                tokens[number, : len(row)] = row
                document[number, : len(row)] = of
            beginning = [entry for entry in waiting if entry[0] <= ids[n - 1]]
            waiting = waiting[len(beginning) :]
            rows, ids = rows[n:], ids[n:]
            return Sequences(tokens, document, beginning)

        for document, pieces in self._tokenised(documents, context, counts):
            rows += pieces
            ids += [document.id] * len(pieces)
            waiting.append((document.id, document.key, document.title))
            while left and len(rows) >= min(per_group, left):
                yield group(min(per_group, left))
            if not left:
                return
        if rows:
            yield group(len(rows))

    def _tokenised(
        self, documents: Iterable[Document], context: int, counts: PackingCounts
    ) -> Iterator[tuple[Document, list[list[int]]]]:
        """Each document with the tokens of its sequences."""
        size = context - len(self._before) - len(self._after)
        for batch in _batched(documents):
            encoded = self._text.encode_batch([document.text for document in batch])
            for document, ids in zip(batch, map(self._own, encoded), strict=True):
                starts = range(0, max(1, len(ids)), size)
                parts = [[*self._before, *ids[s : s + size], *self._after] for s in starts]
                counts.add(document, sum(map(len, parts)))
                yield document, parts

    def _own(self, ids: list[int]) -> list[int]:
        """A text's tokens without the special ones before it, where it brings them itself."""
        own = len(self._before) if self._before and ids[: len(self._before)] == self._before else 0
        return ids[own:]

    def inputs(
        self, group: Sequences, chosen: NDArray[np.int64]
    ) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
        """Tokens, and which of them are no padding, up to the longest of the sequences."""
        real = group.document[chosen] >= 0
        longest = int(real.sum(1).max())
        tokens = group.tokens[chosen][:, :longest]
        return torch.from_numpy(tokens), torch.from_numpy(real[:, :longest])

    def vocabulary(self) -> list[str | bytes]:
        """The text of every token id, by itself (bytes, for one that is part of a character)."""
        return self._text.vocabulary(len(self._text.tokenizer))

    def keep_mask(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """All but special tokens, padding among them."""
        special = torch.tensor(sorted(self._text.special_token_ids), device=tokens.device)
        return ~torch.isin(tokens, special.to(tokens.dtype))

    def _check_site(self, site: str, rows: str, context: int) -> None:
        """Rows of positions need a site with one position a token."""
        least = len(self._before) + len(self._after) + 1
        if not least <= context <= self.n_ctx:
            raise InputError(
                f"no number of tokens for {self.name}",
                where="context",
                given=context,
                allowed=f"{least} to {self.n_ctx}, special tokens included",
            )
        if self.positions(site) not in (
            (_EXAMPLE_TOKENS,) if rows == "position" else (_EXAMPLE_TOKENS, 1)
        ):
            raise InputError(
                f"has {self.positions(site)} positions for {_EXAMPLE_TOKENS} tokens",
                where=site,
                given=f"rows = {rows}",
                allowed="rows = mean" if self.positions(site) == 1 else "another site",
            )


def _batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise InputError("this tokenizer changes a text's tokens between special ones", where="model")
