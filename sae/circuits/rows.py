"""Edges into nodes, a batch at a time: what each node before gives to what a node reads."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activations import Model
from sae.circuits.cut_run import EMBEDDING, FINAL, CutRun
from sae.circuits.parts import Part

_PREFIXES = 4
"""runs over beginnings of the text, each a quarter longer: a node at an early position needs the
gradients of no later one"""


@dataclass(frozen=True)
class Columns:
    """Where each possible source stands in a row: active features, errors, embeddings."""

    starts: list[int]
    """the first feature of each part; at the end the number of all"""
    n_pos: int

    @property
    def features(self) -> int:
        """Number of active features."""
        return self.starts[-1]

    @property
    def width(self) -> int:
        """Length of a row."""
        return self.features + (len(self.starts) - 1 + 1) * self.n_pos

    def errors(self, part: int) -> slice:
        """The errors of a part, by position."""
        start = self.features + part * self.n_pos
        return slice(start, start + self.n_pos)

    @property
    def embeddings(self) -> slice:
        """The embeddings, by position."""
        return slice(self.width - self.n_pos, self.width)


@dataclass
class EdgeRows:
    """Computes edges into features and logits of one prompt."""

    model: Model
    parts: Sequence[Part]
    tokens: Sequence[int]
    embedding: Tensor
    """[pos, d_model]"""
    linear: bool = True
    runs: dict[int, CutRun] = field(init=False)

    def __post_init__(self) -> None:
        counts = [len(part.number) for part in self.parts]
        self.columns = Columns(np.cumsum([0, *counts]).tolist(), len(self.tokens))
        whole = len(self.tokens)
        lengths = {whole * (n + 1) // _PREFIXES for n in range(_PREFIXES)} - {0}
        self.runs = {
            n: CutRun(self.model, self.parts, self.tokens[:n], linear=self.linear)
            for n in sorted(lengths)
        }

    @property
    def whole(self) -> CutRun:
        """The run over all of the text."""
        return self.runs[len(self.tokens)]

    def group(self, feature: NDArray[np.int64]) -> NDArray[np.int64]:
        """Features of one number here can be computed in one batch: of a part, and a run."""
        part = np.searchsorted(self.columns.starts, feature, side="right") - 1
        position = torch.cat([each.position for each in self.parts]).cpu().numpy()[feature]
        lengths = np.array(sorted(self.runs))
        return part * len(lengths) + np.searchsorted(lengths, position, side="right")

    def into_features(self, features: NDArray[np.int64]) -> NDArray[np.float32]:
        """Edges into features of one group [features, width]."""
        number = int(np.searchsorted(self.columns.starts, features[0], side="right")) - 1
        part = self.parts[number]
        chosen = torch.from_numpy(features - self.columns.starts[number])
        position = part.position[chosen]
        return self._rows(part.read, position, part.encoder[chosen])

    def into_outputs(self, direction: Tensor) -> NDArray[np.float32]:
        """Edges into outputs [outputs, width], each x . direction behind the final norm."""
        last = torch.full((len(direction),), len(self.tokens) - 1)
        return self._rows(FINAL, last, direction)

    def _rows(self, site: str, position: Tensor, direction: Tensor) -> NDArray[np.float32]:
        length = min(n for n in self.runs if n > int(position.max()))
        gradients = self.runs[length].gradients(site, position, direction)
        rows = np.zeros((len(position), self.columns.width), np.float32)
        for index, part in enumerate(self.parts):
            start = self.columns.starts[index]
            for site, decoder in {part.written: part.decoder, **part.later}.items():
                if (gradient := gradients.get(site)) is not None:
                    for at, first, end in _by_position(part.position, length):
                        found = gradient[:, at] @ decoder[first:end].T
                        rows[:, start + first : start + end] += found.cpu().numpy()
            gradient = gradients.get(part.written)
            if gradient is None:
                continue
            errors = torch.einsum("bpd,pd->bp", gradient, part.error[:length])
            own = self.columns.errors(index)
            rows[:, own.start : own.start + length] = errors.cpu().numpy()
        gradient = gradients.get(EMBEDDING)
        if gradient is not None:
            found = torch.einsum("bpd,pd->bp", gradient, self.embedding[:length])
            own = self.columns.embeddings
            rows[:, own.start : own.start + length] = found.cpu().numpy()
        return rows


def _by_position(position: Tensor, length: int) -> list[tuple[int, int, int]]:
    """Each position before `length` with the slice of the features that are at it."""
    edges = torch.searchsorted(position, torch.arange(length + 1, device=position.device)).tolist()
    return [(at, edges[at], edges[at + 1]) for at in range(length) if edges[at] < edges[at + 1]]
