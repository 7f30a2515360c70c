"""What a harvest's model was given, as a store shows it: the texts of tokens, or pictures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activations import ActivationStore, Model
from activations.corpora.pictures import thumbnail
from sae.data.harvests import kind_of_model, token_texts
from sae.indexing.drawn import SIDE
from saescope.errors import InputError
from saescope.progress import Progress, say
from store.pictures import GRID, Grid

_AT_ONCE = 256


@dataclass(frozen=True)
class Inputs:
    """The inputs of a harvest: tokens with their texts, or positions of feature maps."""

    texts: Sequence[str | bytes]
    """of each token id; of feature maps of each position"""
    grid: Grid | None = None
    """of feature maps: how positions lie on a picture"""
    has_pictures: bool = False
    draws: int = 0
    """how many pictures to draw again, of prompts"""
    trust_remote_code: bool = False
    """of the model that draws"""

    def tokens(self, harvest: ActivationStore, rows: slice) -> NDArray[Any]:
        """Token ids [sequence, position] of some sequences; of feature maps the positions."""
        tokens = harvest.tokens[rows]
        if self.grid is None:
            return tokens
        return np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)

    def meta(self) -> dict[str, Any]:
        """What the store says of them."""
        return {} if self.grid is None else {GRID: vars(self.grid)}

    def pictures(self, harvest: ActivationStore) -> Iterator[tuple[list[int], list[bytes]]]:
        """Thumbnails by document number, some at a time; what is gone or has changed is said."""
        if not self.has_pictures:
            return
        table = harvest.document_table()
        numbers, keys = (table[name].to_pylist() for name in ("document", "key"))
        marks = _marks(harvest)
        ids: list[int] = []
        images: list[bytes] = []
        missing: list[str] = []
        with Progress("thumbnails", len(numbers), "pictures") as progress:
            for number, key in zip(numbers, keys, strict=True):
                try:
                    images.append(thumbnail(key, marks[number], SIDE))
                    ids.append(number)
                except InputError as error:
                    missing.append(str(error))
                progress.advance(1)
                if len(ids) == _AT_ONCE:
                    yield ids, images
                    ids, images = [], []
        if ids:
            yield ids, images
        if missing:
            say(f"{len(missing)} pictures cannot be shown, such as {missing[0]}")


def _marks(harvest: ActivationStore) -> dict[int, int]:
    """31 bits of each picture's sha256, by document: the token at its first position."""
    marks: dict[int, int] = {}
    for first in range(0, harvest.n_sequences, _AT_ONCE):
        rows = slice(first, first + _AT_ONCE)
        pairs = zip(harvest.document[rows][:, 0], harvest.tokens[rows][:, 0], strict=True)
        marks |= {int(document): int(mark) for document, mark in pairs}
    return marks


def inputs_of(
    harvest: ActivationStore,
    model: Model | None,
    texts: Sequence[str] | None,
    *,
    draws: int = 0,
    trust_remote_code: bool = False,
) -> Inputs:
    """The inputs of a harvest.

    Args: model is that of a language model's harvest; texts those of token ids where nobody knows
    the model; draws, how many pictures of a diffusion model's harvest to draw again.

    Raises InputError as `token_texts` does.
    """
    kind = kind_of_model(harvest)
    if model is not None:
        return Inputs(model.vocabulary())
    if texts is not None or kind not in ("text_encoder", "vision", "diffusion"):
        return Inputs(texts or [""])
    if kind == "text_encoder":
        return Inputs(token_texts(harvest, trust_remote_code=trust_remote_code))
    grid = Grid.of(harvest.context)
    names = [grid.name(position) for position in range(harvest.context)]
    if kind == "vision":
        return Inputs(names, grid, has_pictures=True)
    return Inputs(names, grid, draws=draws, trust_remote_code=trust_remote_code)
