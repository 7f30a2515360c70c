"""Per-feature summaries of a store being built: histogram, documents, examples, co-activation.

Plain numpy over memory-mapped files in a scratch folder: each feature's rows are one slice, sorted
from strong to weak, so every summary is a short function of that slice, and memory does not grow
with the number of activations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saescope.system import reserve, system_errors
from store import counting
from store.counting import mark_documents, rows_in_marked

BINS = 40
INTERVALS = 5
TOP_EXAMPLES = 20
INTERVAL_EXAMPLES = 5
COACTIVE = 20
NOT_KEPT = -2
_BLOCK = 1 << 20

Floats = NDArray[np.float32]
Ints = NDArray[np.integer]


@dataclass(frozen=True)
class Scratch:
    """The store's n activations and its positions as arrays in files, for work while it is built.

    position, activation [n]: by feature, strong to weak. other [n]: the features, by position;
    start [positions + 1]: where each position's features begin. document, token [positions]; a
    position that is not kept has document NOT_KEPT.
    """

    position: NDArray[np.int64]
    activation: Floats
    other: NDArray[np.int32]
    start: NDArray[np.int64]
    document: NDArray[np.int32]
    token: NDArray[np.int32]

    @classmethod
    def create(cls, folder: Path, *, n: int, positions: int) -> "Scratch":
        """Empty arrays in `folder`, documents marked NOT_KEPT.

        Raises ArtefactError if there is no room for them on the disk.
        """

        def array(name: str, size: int, dtype: str) -> np.ndarray:
            # a file cannot be mapped with no bytes, so it has one element more, which is sliced off
            with system_errors(folder / name):
                reserve(folder / name, (size + 1) * np.dtype(dtype).itemsize)
            mapped = np.memmap(folder / name, mode="r+", shape=(size + 1,), dtype=dtype)
            return np.asarray(mapped)[:size]

        scratch = cls(
            position=array("position", n, "int64"),
            activation=array("activation", n, "float32"),
            other=array("other", n, "int32"),
            start=array("start", positions + 1, "int64"),
            document=array("document", positions, "int32"),
            token=array("token", positions, "int32"),
        )
        scratch.document[:] = NOT_KEPT
        return scratch


def histogram(activation: Floats) -> NDArray[np.int64]:
    """Counts in BINS equal bins over (0, max]; activation is sorted, strongest first.

    >>> histogram(np.array([8.0, 4.0, 0.1], dtype=np.float32)).nonzero()[0].tolist()
    [0, 19, 39]
    """
    counts = np.zeros(BINS, dtype=np.int64)
    top = float(activation[0])
    for begin in range(0, len(activation), _BLOCK):
        block = activation[begin : begin + _BLOCK].astype(np.float64)
        bins = np.clip(np.ceil(block * BINS / top) - 1, 0, BINS - 1).astype(np.int64)
        counts += np.bincount(bins, minlength=BINS)
    return counts


def count_documents(position: Ints, document: Ints, seen: NDArray[np.bool_]) -> int:
    """In how many documents these positions lie; -1 if one of them is not a kept position.

    seen is work space: two elements more than there are document numbers.
    """
    seen[:] = False
    for begin in range(0, len(position), _BLOCK):
        mark_documents(position[begin : begin + _BLOCK], document, NOT_KEPT, seen)
    return -1 if seen[0] else int(np.count_nonzero(seen[2:]))


def first_of_each(sequence: Ints, limit: int) -> NDArray[np.int64]:
    """Indices of the first row of each sequence, in order, at most `limit` of them.

    >>> first_of_each(np.array([7, 7, 3, 7, 9]), 2).tolist()
    [0, 2]
    """
    _, first = np.unique(sequence, return_index=True)
    return np.sort(first)[:limit]


def top_rows(position: Ints, context: int) -> NDArray[np.int64]:
    """Rows of the strongest activations, at most one a sequence."""
    reach = 4 * TOP_EXAMPLES
    while True:
        rows = first_of_each(position[:reach] // context, TOP_EXAMPLES)
        if len(rows) == TOP_EXAMPLES or reach >= len(position):
            return rows
        reach *= 4


def interval_rows(
    position: Ints, counts: NDArray[np.int64], context: int, random: np.random.Generator
) -> list[tuple[int, NDArray[np.int64]]]:
    """Random rows of each interval, strongest interval first, at most one a sequence in each.

    As rows are sorted by activation, an interval is a range of rows: `counts` (of the bins) says
    which. An example is drawn with equal chance from all rows; a second one of a sequence is
    passed over.
    """
    sizes = counts.reshape(INTERVALS, BINS // INTERVALS).sum(axis=1)
    chosen = []
    begin = 0
    for interval in range(INTERVALS - 1, -1, -1):
        size = int(sizes[interval])
        drawn = min(size, 8 * INTERVAL_EXAMPLES)
        while size:
            rows = begin + random.choice(size, drawn, replace=False)
            picked = rows[first_of_each(position[rows] // context, INTERVAL_EXAMPLES)]
            if len(picked) == INTERVAL_EXAMPLES or drawn == size:
                chosen.append((interval, np.sort(picked)))
                break
            drawn = min(size, 16 * drawn)
        begin += size
    return chosen


def windows(
    position: Ints,
    activation: Floats,
    rows: NDArray[np.int64],
    context: int,
    marked: NDArray[np.int32],
) -> list[tuple[NDArray[np.int32], Floats]]:
    """For each chosen row, where and how much the feature is active in the row's whole sequence.

    marked has an element a sequence, all -1, and is left so.
    """
    wanted = np.unique(position[rows] // context)
    marked[wanted] = np.arange(len(wanted), dtype=np.int32)
    pieces = []
    for begin in range(0, len(position), _BLOCK):
        at = position[begin : begin + _BLOCK]
        inside = rows_in_marked(at, context, marked)
        pieces.append((at[inside], activation[begin : begin + _BLOCK][inside]))
    marked[wanted] = -1
    at = np.concatenate([piece[0] for piece in pieces])
    value = np.concatenate([piece[1] for piece in pieces])
    order = np.argsort(at)
    at, value = at[order], value[order]
    begins = np.searchsorted(at, wanted * context)
    ends = np.searchsorted(at, (wanted + 1) * context)
    found = []
    for sequence in position[rows] // context:
        index = int(np.searchsorted(wanted, sequence))
        inside = slice(begins[index], ends[index])
        found.append(((at[inside] - sequence * context).astype(np.int32), value[inside]))
    return found


def moments(activation: Floats) -> tuple[float, float]:
    """Mean and population standard deviation, in float64 and in one order of summing.

    >>> moments(np.array([3.0, 1.0], dtype=np.float32))
    (2.0, 1.0)
    """
    mean = _total(activation, lambda block: block) / len(activation)
    return mean, math.sqrt(_total(activation, lambda block: (block - mean) ** 2) / len(activation))


def _total(activation: Floats, of: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> float:
    begins = range(0, len(activation), _BLOCK)
    return math.fsum(of(activation[b : b + _BLOCK].astype(np.float64)).sum() for b in begins)


@dataclass(frozen=True)
class Coactive:
    """The features most correlated with one feature in where they fire, best first."""

    other: NDArray[np.int64]
    together: NDArray[np.int64]
    """positions at which both fire"""
    share: NDArray[np.float64]
    pmi: NDArray[np.float64]
    correlation: NDArray[np.float64]


def count_together(
    position: Ints, scratch: Scratch, n_features: int, block: int = _BLOCK
) -> NDArray[np.int64]:
    """At how many of these positions each feature is active [n_features].

    block: how many activations are looked at at once, so that memory does not grow with them.
    """
    counts = np.zeros(n_features, dtype=np.int64)
    per_position = max(len(scratch.other) // (len(scratch.start) - 1), 1)
    step = max(block // per_position, 1)
    for first in range(0, len(position), step):
        at = np.sort(position[first : first + step])  # one after another on the disk
        counting.count_together(at, scratch.start, scratch.other, counts)
    return counts


def coactive(
    feature: int, together: NDArray[np.int64], n_active: NDArray[np.int64], kept: int
) -> Coactive:
    """Features whose firing correlates most with this one's, from the counts over all positions.

    With N kept positions, n_a and n_b active ones and n_ab common ones: the correlation is
    Pearson's of the two firings (0 or 1 at each position), that is the phi coefficient,
    (N n_ab - n_a n_b) / sqrt(n_a n_b (N - n_a) (N - n_b)); one that is always active has none.
    The pointwise mutual information is ln(N n_ab / (n_a n_b)), in nats; the share n_ab / n_a.
    """
    others = np.flatnonzero(together)
    others = others[others != feature]
    both = together[others]
    a, b = float(n_active[feature]), n_active[others].astype(np.float64)
    scale = np.sqrt(a * b * (kept - a) * (kept - b))
    excess = float(kept) * both - a * b
    correlation = np.divide(excess, scale, out=np.zeros_like(excess), where=scale > 0)
    chosen = np.flatnonzero(correlation > 0)
    if len(chosen) > COACTIVE:  # all that may be among the best, ties included
        least = np.partition(correlation[chosen], -COACTIVE)[-COACTIVE]
        chosen = chosen[correlation[chosen] >= least]
    best = chosen[np.lexsort((others[chosen], -correlation[chosen]))[:COACTIVE]]
    pmi = np.log(kept * both[best] / (a * b[best]))
    return Coactive(others[best], both[best], both[best] / a, pmi, correlation[best])
