"""Which positions of a window become rows, and in which order sequences are run.

A row is a kept position's activation, or a sequence's mean over its kept positions (of a site
without positions, its vector). A mean stands at the last position that it is over: that one alone
is marked in `keep`, and is the row's `row_token`.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activations.corpora.sequences import Sequences
from activations.harvesting.config import RowKind
from activations.models.base import HarvestModel
from saescope.errors import InputError


class WindowRows:
    """The rows of a window's sequences.

    Sequences are run the longest first, so that little of a batch is padding; `order` puts their
    rows where they would be in any other order of running.
    """

    def __init__(
        self,
        model: HarvestModel,
        group: Sequences,
        kind: RowKind,
        keep: NDArray[np.bool_] | None = None,
    ) -> None:
        """keep: bool [sequence, position], the positions that count, where that is known."""
        real = group.document >= 0
        self._kind = kind
        if keep is None:
            keep = model.keep_mask(torch.from_numpy(group.tokens)).numpy() & real
        self._counted = keep.copy()
        self.running = running_order(real.sum(1))
        """numbers of the sequences in the order in which they are run"""

    @property
    def keep(self) -> NDArray[np.bool_]:
        """bool [sequence, position]: where a row is."""
        return self._counted if self._kind == "position" else last_of(self._counted)

    @property
    def flat_positions(self) -> NDArray[np.int64]:
        """sequence * context + position of each row, in the order in which they are computed."""
        numbers = np.arange(self._counted.size).reshape(self._counted.shape)
        return numbers[self.running][self.keep[self.running]]

    def keep_only(self, batch: NDArray[np.int64], which: NDArray[np.bool_]) -> None:
        """Of some sequences only the positions `which` [batch, position] count from now on.

        What is padding for all of them may be missing at the end.
        """
        self._counted[batch, : which.shape[1]] &= which

    def order(self, seed: tuple[int, ...]) -> NDArray[np.int64]:
        """The shuffled order in which the rows are written."""
        flat_positions = self.flat_positions
        return np.argsort(flat_positions)[
            np.random.default_rng(seed).permutation(len(flat_positions))
        ]

    def of(self, site: str, x: Tensor, batch: NDArray[np.int64]) -> Tensor:
        """The rows [row, d_in] of some sequences' activations [batch, position, d_in].

        These may leave out padding at the end. Raises InputError if the site has other positions
        than the sequences.
        """
        counted = self._counted[batch]
        here = torch.from_numpy(counted[:, : x.shape[1]]).to(x.device)
        if self._kind == "mean":
            return _means(x, here, torch.from_numpy(counted.any(1)).to(x.device), counted.shape[1])
        if x.shape[:2] != here.shape or counted[:, x.shape[1] :].any():
            raise InputError(
                "its positions are not those of the sequences",
                where=site,
                given=tuple(x.shape),
                allowed=f"{counted.shape} and the width",
            )
        return x.flatten(0, 1).index_select(0, here.flatten().nonzero()[:, 0])


def running_order(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers of sequences, the longest first.

    >>> running_order(np.array([3, 5, 3, 8])).tolist()
    [3, 1, 0, 2]
    """
    return np.argsort(-lengths, kind="stable")


def last_of(counted: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The last of the positions that count in each sequence [sequence, position].

    >>> last_of(np.array([[False, True, True, False], [False] * 4])).tolist()
    [[False, False, True, False], [False, False, False, False]]
    """
    last = counted.shape[1] - 1 - counted[:, ::-1].argmax(1)
    return counted & (np.arange(counted.shape[1]) == last[:, None])


def _means(x: Tensor, counted: Tensor, some: Tensor, context: int) -> Tensor:
    """Means [row, d_in] of the sequences in which some position counts, in float32."""
    x = x.float()[some]
    if context == 1 or x.shape[1] == 1:
        return x.mean(1)  # of the places of a picture; or there is but one
    weight = counted[some].float()
    return torch.einsum("bpd,bp->bd", x, weight) / weight.sum(1, keepdim=True)
