"""Measured effects summed up: each direction's mean change of log-probabilities, and its null."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from saescope.progress import Progress

_VALUES = 1 << 24
"""numbers of a table [pairs, d_vocab] that is made at once"""
Logits = Callable[[Tensor], Tensor]
"""from residual streams [n, d_model] behind the last block to logits [n, d_vocab]"""


@dataclass(frozen=True)
class Measured:
    """What was measured, a row for each pair of a direction and a position."""

    direction: NDArray[np.int64]
    """[pairs]"""
    after: NDArray[np.float32]
    """residual streams behind the last block with the direction added [pairs, d_model]"""
    before: NDArray[np.float32]
    """and without"""


@dataclass(frozen=True)
class Effect:
    """One direction's effect on the next token."""

    direction: int
    change: Float[Tensor, "positions d_vocab"]
    """of the log-probabilities, in nats"""
    kl: Float[Tensor, " positions"]
    """of the next token's distribution from what it is without, in nats"""

    @property
    def mean(self) -> Float[Tensor, " d_vocab"]:
        """The mean change over positions."""
        return self.change.mean(0)

    @property
    def error(self) -> Float[Tensor, " d_vocab"] | None:
        """The standard error of the mean; None of one position."""
        count = len(self.change)
        return self.change.std(0) / count**0.5 if count > 1 else None


def effects(measured: Measured, logits: Logits) -> Iterator[Effect]:
    """The effect of each direction, in order of their numbers."""
    order = np.argsort(measured.direction, kind="stable")
    ends = np.flatnonzero(np.diff(measured.direction[order])) + 1
    groups = np.split(order, ends) if len(order) else []
    with Progress("effects on log-probabilities", len(order), "positions") as progress:
        for batch in _batches(groups, logits, measured):
            rows = np.concatenate(batch)
            before = logits(torch.from_numpy(measured.before[rows])).log_softmax(1)
            change = logits(torch.from_numpy(measured.after[rows])).log_softmax(1) - before
            kl = -(before.exp() * change).sum(1)
            sizes = [len(each) for each in batch]
            for own, values, loss in zip(batch, change.split(sizes), kl.split(sizes), strict=True):
                yield Effect(int(measured.direction[own[0]]), values, loss)
            progress.advance(len(rows))


def _batches(
    groups: list[NDArray[np.int64]], logits: Logits, measured: Measured
) -> Iterator[list[NDArray[np.int64]]]:
    """Whole directions together, as many as may be unembedded at once."""
    if not groups:
        return
    d_vocab = logits(torch.from_numpy(measured.before[:1])).shape[1]
    most, batch, size = max(1, _VALUES // d_vocab), [], 0
    for group in groups:
        if batch and size + len(group) > most:
            yield batch
            batch, size = [], 0
        batch.append(group)
        size += len(group)
    yield batch


class Summary:
    """Rows of a store from effects, one after the other, and what random directions do."""

    def __init__(self, d_sae: int, tokens: int) -> None:
        self._d_sae, self._tokens = d_sae, tokens
        self.kl = np.full(d_sae, np.nan, np.float32)
        self.positions = np.zeros(d_sae, np.int32)
        self._rows: list[tuple[Any, ...]] = []
        self._null: dict[str, list[float]] = {"measured_kl": [], "rise": []}
        self._halves: list[tuple[float, float, float]] = []
        self._last: Tensor | None = None

    def add(self, effect: Effect, direct: Callable[[int], Tensor]) -> None:
        """Count one effect. direct: from a feature to its direct effect on logits [d_vocab]."""
        mean, error = effect.mean, effect.error
        if effect.direction >= self._d_sae:
            self._null["measured_kl"].append(float(effect.kl.mean()))
            self._null["rise"].append(float(mean.max()))
            return
        self.kl[effect.direction] = float(effect.kl.mean())
        self.positions[effect.direction] = len(effect.change)
        for sign in (1, -1):
            value, token = (sign * mean).topk(min(self._tokens, len(mean)))
            for rank, (size, number) in enumerate(zip(value.tolist(), token.tolist(), strict=True)):
                wrong = None if error is None else float(error[number])
                self._rows.append((effect.direction, sign, rank, number, sign * size, wrong))
        if len(effect.change) > 1:
            self._compare(effect, direct)

    def _compare(self, effect: Effect, direct: Callable[[int], Tensor]) -> None:
        """Which foretells the effect at the other half of a feature's positions."""
        held_out, half = effect.change[::2].mean(0), effect.change[1::2].mean(0)
        other = half if self._last is None else self._last
        foretold = (half, direct(effect.direction), other)
        a, b, c = (pearson(each, held_out) for each in foretold)
        if self._last is not None:
            self._halves.append((a, b, c))
        self._last = half

    def rows(self) -> dict[str, list[Any]]:
        """Columns of the table `measured_logit`."""
        names = ("feature", "sign", "rank", "token_id", "value", "error")
        columns = zip(*self._rows, strict=True) if self._rows else [()] * len(names)
        return {name: list(column) for name, column in zip(names, columns, strict=True)}

    def null(self) -> dict[str, list[float]]:
        """2.5 %, 50 % and 97.5 % of what random directions do."""
        return {name: quantiles(values) for name, values in self._null.items() if values}

    def agreement(self) -> dict[str, list[float]]:
        """Correlations over the vocabulary with the effect at held-out positions, 25 %, 50 % and
        75 % of features: of what was measured at other positions, of the direct effect, and of what
        was measured of another feature, the null."""
        if not self._halves:
            return {}
        names = ("measured", "direct", "other_feature")
        found = np.quantile(np.array(self._halves), (0.25, 0.5, 0.75), axis=0).T
        return {name: [float(x) for x in row] for name, row in zip(names, found, strict=True)}


def quantiles(values: Any) -> list[float]:
    """2.5 %, 50 % and 97.5 %."""
    return [float(each) for each in np.quantile(np.asarray(values), (0.025, 0.5, 0.975))]


def pearson(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of two vectors; 0 where one is constant.

    >>> round(pearson(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([5.0, 3.0, 1.0])), 6)
    -1.0
    """
    a, b = a - a.mean(), b - b.mean()
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm else 0.0
