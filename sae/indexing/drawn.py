"""Pictures of a diffusion model's harvest: what it drew from the prompts that features fire on.

A harvest has no pictures, only prompts; those on which some feature is strongest are drawn again.
"""

import io
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from activations import ActivationStore
from activations.corpora.documents import Document
from activations.corpora.sequences import PackingCounts
from activations.harvesting.segments import segments
from activations.models.diffusion import DiffusionModel
from activations.recompute.window import model_of
from saescope.errors import InputError
from saescope.progress import Progress, say

_EXAMPLES = 10
"""positions of each feature whose prompts may be drawn"""
_AT_ONCE = 16
SIDE = 192
"""pixels of a thumbnail's longer side"""


class Strongest:
    """The positions at which each feature is strongest, of activations that go by."""

    def __init__(self, d_sae: int) -> None:
        self._position = np.zeros((d_sae, _EXAMPLES), np.int64)
        self._activation = np.zeros((d_sae, _EXAMPLES), np.float32)

    def add(
        self,
        position: Int[NDArray[np.int64], " n"],
        feature: Int[NDArray[np.int32], " n"],
        activation: Float[NDArray[np.float32], " n"],
    ) -> None:
        """Activations above zero, in any order."""
        order = np.lexsort((position, -activation, feature))
        which = feature[order]
        rank = np.arange(len(which)) - np.searchsorted(which, which)
        order, which, rank = (each[rank < _EXAMPLES] for each in (order, which, rank))
        new_position, new = np.zeros_like(self._position), np.zeros_like(self._activation)
        new_position[which, rank], new[which, rank] = position[order], activation[order]
        both = np.concatenate([self._activation, new], 1)
        positions = np.concatenate([self._position, new_position], 1)
        best = np.argsort(-both, axis=1, kind="stable")[:, :_EXAMPLES]
        self._activation = np.take_along_axis(both, best, 1)
        self._position = np.take_along_axis(positions, best, 1)

    def sequences(self, context: int) -> list[int]:
        """Sequences with these positions, each once: all features' strongest first."""
        found = (self._position // context).T[self._activation.T > 0]
        return list(dict.fromkeys(found.tolist()))


def drawn(
    harvest: ActivationStore, sequences: Sequence[int], most: int, *, trust_remote_code: bool
) -> Iterator[tuple[list[int], list[bytes]]]:
    """JPEG pictures by document, some at a time, of the first `most` documents of sequences.

    They are as the harvest's model draws them, in all steps of its run. Nothing is drawn where the
    model is not to be had; prompts that are not what they were are left out. Both are said.
    """
    documents = harvest.document[:][:, 0]
    wanted = list(dict.fromkeys(int(documents[n]) for n in sequences))[:most]
    if not wanted:
        return
    try:
        model = model_of(harvest, trust_remote_code=trust_remote_code)
        assert isinstance(model, DiffusionModel)
        with Progress("pictures", len(wanted), "prompts") as progress:
            done = 0
            for ids, images in _draw(harvest, model, set(wanted)):
                done += len(ids)
                progress.advance(len(ids))
                yield ids, images
        if done < len(wanted):
            say(f"{len(wanted) - done} prompts are not what they were, and have no picture")
    except InputError as error:
        say(f"pictures: left out, as the model cannot draw them: {error}")


def _draw(
    harvest: ActivationStore, model: DiffusionModel, wanted: set[int]
) -> Iterator[tuple[list[int], list[bytes]]]:
    marks = dict(
        zip(harvest.document[:][:, 0].tolist(), harvest.tokens[:][:, 0].tolist(), strict=True)
    )  # of each prompt's last step
    groups = model.sequences(
        _documents(harvest, model, wanted),
        context=harvest.context,
        per_group=_AT_ONCE,
        counts=PackingCounts(),
    )
    for group in groups:
        assert group.inputs is not None
        known = {
            int(document): prompt
            for document, mark, prompt in zip(
                group.document[:, 0], group.tokens[:, 0], group.inputs, strict=True
            )
            if marks.get(int(document)) == int(mark)
        }
        if known:
            pictures = model.pictures([*known.values()])
            yield [*known], [_jpeg(each) for each in pictures]


def _documents(
    harvest: ActivationStore, model: DiffusionModel, wanted: set[int]
) -> Iterator[Document]:
    """Prompts of these numbers, from the corpora that were harvested."""
    left = set(wanted)
    for segment in segments(harvest):
        if not left:
            return
        for document in model.documents(segment.corpus, first=segment.first_document):
            if document.id in left:
                left.remove(document.id)
                yield document
            if not left:
                return


def _jpeg(picture: Float[Tensor, "3 height width"]) -> bytes:
    """A picture in [0, 1], no side longer than a thumbnail's; a small one with larger pixels."""
    from PIL import Image

    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels)
    times = SIDE // max(image.size)
    if times > 1:
        size = (image.width * times, image.height * times)
        image = image.resize(size, Image.Resampling.NEAREST)
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return stream.getvalue()
