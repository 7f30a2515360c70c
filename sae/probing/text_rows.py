"""Activations of labelled texts at one site: computed once, kept on disk, read again.

A text is tokenised as the model's tokenizer does, BOS in front where it adds one, and its last
`max_tokens` tokens are run by themselves: nothing is packed, and texts of one length are run
together, so that nothing is padded. Rows are those of kept positions (`activations.sites.kept`):
never position 0, whose norm is ten to a hundred times that of others in many models and would fill
a mean, and no special tokens.

    last    the last kept position of each text: one row
    mean    all kept positions: the features of each are averaged
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from saescope.artefact import atomic_path, check_seal, read_json, sha256_json
from saescope.errors import ArtefactError
from saescope.paths import remove
from saescope.progress import say
from saescope.replacing import Kind
from saescope.seals import FILES, check_files, seals_of, write_sealed
from saescope.system import system_errors

if TYPE_CHECKING:
    from activations import Model

Representation = Literal["last", "mean"]
VERSION = 1
_TOKENS = 4096
"""tokens of a run of the model. Fixed, as its size decides the last bits of activations"""
_ROWS, _DESCRIBED = "rows.safetensors", "rows.json"
_ROWS_KIND = Kind("activations of texts", lambda folder: (folder / _DESCRIBED).is_file())


@dataclass(frozen=True, kw_only=True)
class TextRows:
    """Activations of texts at their kept positions."""

    x: Tensor
    """[rows, d_in], in the model's precision"""
    text: NDArray[np.int64]
    """[rows], which text each row is of, rising; texts without a kept position have none"""

    def known(self, count: int) -> NDArray[np.bool_]:
        """Which of so many texts have a row: bool [count]."""
        found = np.zeros(count, np.bool_)
        found[self.text] = True
        return found


def protocol(
    facts: Mapping[str, Any], site: str, representation: Representation, max_tokens: int
) -> dict[str, Any]:
    """What decides the rows of a text, from the facts that a harvest tells of its model."""
    return {
        "version": VERSION,
        **{name: facts[name] for name in ("weights_hash", "tokenizer_hash", "dtype")},
        "site": site,
        "representation": representation,
        "max_tokens": max_tokens,
    }


@dataclass(frozen=True, kw_only=True)
class TextModel:
    """A model at one site, and how texts are shown to it."""

    model: "Model"
    site: str
    representation: Representation
    max_tokens: int

    def protocol(self) -> dict[str, Any]:
        """What decides the rows of a text."""
        return protocol(self.model.facts(), self.site, self.representation, self.max_tokens)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text: its last ones, after BOS where the tokenizer adds one."""
        first = [] if self.model.bos_token_id is None else [self.model.bos_token_id]
        room = self.max_tokens - len(first)
        return [[*first, *ids[-room:]] for ids in self.model.tokenize_batch(texts)]

    def rows(self, texts: Sequence[str], tokens_a_run: int = _TOKENS) -> TextRows:
        """The activations of texts; `tokens_a_run` bounds how many tokens are run together."""
        ids = self.tokens(texts)
        found: dict[int, Tensor] = {}
        for together in of_one_length(ids, tokens_a_run):
            tokens = torch.tensor([ids[each] for each in together])
            keep = self.model.keep_mask(tokens)
            if not keep.any():
                continue
            x = self.model.capture(tokens, [self.site])[self.site]
            for index, own, kept in zip(together, x, keep, strict=True):
                rows = own[kept.to(own.device)].cpu()
                found[index] = rows[-1:] if self.representation == "last" else rows
        number = [np.full(len(found[index]), index, np.int64) for index in sorted(found)]
        x = torch.cat([found[index] for index in sorted(found)]) if found else torch.zeros(0, 0)
        return TextRows(x=x, text=np.concatenate([np.zeros(0, np.int64), *number]))


def of_one_length(ids: Sequence[Sequence[int]], tokens_a_run: int) -> Iterator[list[int]]:
    """Indices of texts of one length, that are run together; none of empty texts."""
    by_length: dict[int, list[int]] = {}
    for index, each in enumerate(ids):
        by_length.setdefault(len(each), []).append(index)
    by_length.pop(0, None)
    for length in sorted(by_length):
        size = max(1, tokens_a_run // length)
        for start in range(0, len(by_length[length]), size):
            yield by_length[length][start : start + size]


class RowCache:
    """Activations of texts in a folder, one folder a set, each with checksums.

    A set is written whole or not at all, so that after a kill the sets that are there are read and
    the others computed. Where a set would take the folder beyond `limit` bytes it is not kept, and
    is computed whenever it is wanted.
    """

    def __init__(self, folder: Path, of: TextModel, limit: int) -> None:
        self.of, self.limit = of, limit
        self.root = folder
        self._folder = folder / sha256_json(of.protocol())[:16]
        self._told = False

    def rows(self, name: str, texts: Sequence[str]) -> TextRows:
        """The activations of a set's texts: those that are kept, or computed now."""
        key = sha256_json({**self.of.protocol(), "texts": list(texts)})
        folder = self._folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)[:60]}-{key[:16]}"
        if (folder / _DESCRIBED).is_file():
            try:
                return _read(folder, key)
            except ArtefactError as error:
                say(f"{error}; its texts are run again")
                remove(folder)
        found = self.of.rows(texts)
        size = found.x.numel() * found.x.element_size() + found.text.nbytes
        if self._used() + size <= self.limit:
            _write(folder, key, found, {"set": name, **self.of.protocol()})
        elif not self._told:
            self._told = True
            say(
                f"{self.root}: holds as much as it may (--probing.cache-gb): activations of {name} "
                "and of what follows are computed again in each evaluation"
            )
        return found

    def _used(self) -> int:
        total = 0
        for path in self.root.rglob("*"):
            with suppress(FileNotFoundError):  # another process may put a set in its place
                total += path.stat().st_size if path.is_file() else 0
        return total


def _write(folder: Path, key: str, rows: TextRows, about: Mapping[str, Any]) -> None:
    with system_errors(str(folder)), atomic_path(folder, _ROWS_KIND, replace=True) as temporary:
        temporary.mkdir()
        tensors = {"x": rows.x.contiguous(), "text": torch.from_numpy(rows.text)}
        save_file(tensors, temporary / _ROWS)
        described = {"schema": 1, "key": key, **about, FILES: seals_of(temporary, [_ROWS])}
        write_sealed(temporary / _DESCRIBED, described)


def _read(folder: Path, key: str) -> TextRows:
    """The rows that were written; ArtefactError if they are damaged or others."""
    described = read_json(folder / _DESCRIBED)
    if not isinstance(described, dict) or described.get("key") != key:
        raise ArtefactError("are activations of other texts", where=str(folder))
    check_seal(described, must=True, where=str(folder / _DESCRIBED))
    check_files(folder, described, [_ROWS], "activations of texts")
    tensors = load_file(folder / _ROWS)
    return TextRows(x=tensors["x"], text=tensors["text"].numpy())
