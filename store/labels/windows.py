"""Windows of text in which a feature fires, and in which it is silent: to explain, and to score.

A window is a stretch of `size` tokens of one sequence. Documents are dealt into two halves: a label
is made from windows of one (fit), and scored on windows of the other (held out), so that no window
and no document has a share in both.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from store.feature_store import FeatureStore

NO_TOKEN = -1


@dataclass(frozen=True)
class Windows:
    """Windows of text and one feature's activations there, n windows of `size` tokens."""

    tokens: NDArray[np.int32]
    """[n, size]; NO_TOKEN after the end of a sequence"""
    activation: NDArray[np.float32]
    """[n, size]"""
    document: NDArray[np.int64]
    """[n], of the window's last token"""

    @property
    def active(self) -> NDArray[np.bool_]:
        """Whether the feature fires somewhere in the window [n]."""
        return self.activation.max(axis=1, initial=0.0) > 0

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Split:
    """A feature's windows to make a label from, and those to score it on."""

    fit: Windows
    held_out: Windows


class Sampler:
    """Draws windows from a store's corpus; the same ones for the same seed.

    Takes 5 bytes of memory a token, besides the store's corpus.
    """

    def __init__(self, store: FeatureStore, *, size: int = 32, seed: int = 0) -> None:
        corpus, context = store.corpus, store.context
        self._store, self._seed = store, seed
        self.size = min(size, context)
        self._each = -(-context // self.size)
        missing = self._each * self.size - context

        def windows(values: NDArray, fill: int) -> NDArray:
            rows = np.pad(values.reshape(-1, context), ((0, 0), (0, missing)), constant_values=fill)
            return rows.reshape(-1, self.size)

        self._tokens = windows(corpus.tokens, NO_TOKEN)
        self._document = np.asarray(windows(corpus.document, NO_TOKEN).max(axis=1), np.int64)
        kept = windows(corpus.keep, 0).astype(bool).any(axis=1)
        numbers, which = np.unique(self._document, return_inverse=True)
        held_out = np.random.default_rng(seed).random(len(numbers)) < 0.5
        self._pool = (kept & ~held_out[which], kept & held_out[which])

    def sample(self, feature: int, *, fit: int, held_out: int) -> Split:
        """A feature's windows: up to `fit` and `held_out` active ones, and as many silent ones.

        The active ones are spread evenly over the ranks of their strongest activation, so that weak
        ones count as strong ones do (delphi's quantiles); the silent ones are random.
        """
        position, value = self._store.activations(feature)
        index = self._store.corpus.indices(position)
        sequence, at = np.divmod(index, self._store.context)
        window, column = sequence * self._each + at // self.size, at % self.size
        found, first = np.unique(window, return_index=True)
        by_strength = found[np.argsort(first, kind="stable")]
        random = np.random.default_rng([self._seed, feature])
        halves = []
        for pool, count in zip(self._pool, (fit, held_out), strict=True):
            mine = by_strength[pool[by_strength]]
            spread = np.linspace(0, len(mine) - 1, min(count, len(mine))).round().astype(np.int64)
            silent = pool.copy()
            silent[found] = False
            others = np.flatnonzero(silent)
            others = random.choice(others, min(count, len(others)), replace=False)
            halves.append(
                self._gather(np.concatenate([mine[spread], others]), window, column, value)
            )
        return Split(*halves)

    def _gather(self, chosen: NDArray, window: NDArray, column: NDArray, value: NDArray) -> Windows:
        row_of = np.full(len(self._tokens), -1, np.int64)
        row_of[chosen] = np.arange(len(chosen))
        row = row_of[window]
        inside = row >= 0
        activation = np.zeros((len(chosen), self.size), np.float32)
        activation[row[inside], column[inside]] = value[inside]
        return Windows(self._tokens[chosen], activation, self._document[chosen])
