"""What is counted in C++ is what NumPy counts."""

from collections.abc import Callable

import numpy as np
import pytest

from store import counting
from store.profiles import Kept, commonest_tokens

CONTEXT, SEQUENCES, FEATURES = 12, 40, 30


def both(patch: pytest.MonkeyPatch, work: Callable[[], np.ndarray]) -> tuple[np.ndarray, ...]:
    """What C++ and NumPy give."""
    if counting.library() is None:
        pytest.skip("no compiler")
    compiled = work()
    patch.setattr(counting, "library", lambda: None)
    return compiled, work()


@pytest.mark.parametrize("n", [0, 1, 7, 200])
def test_compiled_and_plain_agree(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(n)
    positions = CONTEXT * SEQUENCES
    position = np.sort(random.choice(positions, n, replace=False))
    lengths = random.integers(0, 9, positions)
    start = np.concatenate([[0], np.cumsum(lengths)])
    other = random.integers(0, FEATURES, lengths.sum()).astype(np.int32)
    marked = random.integers(-1, 1, SEQUENCES).astype(np.int32)
    document = random.integers(-2, 20, positions).astype(np.int32)
    bin_of = np.arange(CONTEXT) * 5 // CONTEXT

    def all_counts() -> np.ndarray:
        together = np.arange(FEATURES)  # what is there is added to
        counting.count_together(position, start, other, together)
        seen = np.zeros(22, dtype=bool)
        counting.mark_documents(position, document, -2, seen)
        rows = counting.rows_in_marked(position, CONTEXT, marked)
        bins = counting.count_bins(position, CONTEXT, bin_of, 5)
        return np.concatenate([together, seen, rows, bins])

    compiled, plain = both(monkeypatch, all_counts)
    assert compiled.tolist() == plain.tolist()
    expected = np.arange(FEATURES)
    for at in position:
        for feature in other[start[at] : start[at + 1]]:
            expected[feature] += 1
    assert compiled[:FEATURES].tolist() == expected.tolist()
    inside = [row for row, at in enumerate(position) if marked[at // CONTEXT] >= 0]
    assert compiled[FEATURES + 22 : -5].tolist() == inside
    assert compiled[-5:].sum() == n


def test_tokens_counted_all_at_once_are_those_that_are_sorted() -> None:
    random = np.random.default_rng(0)
    token = random.integers(0, 50, 400).astype(np.int32)
    activation = random.random(400).astype(np.float32)
    found = []
    for vocabulary in (50, 5000):  # few tokens are sorted, many are counted
        by_token = np.full(vocabulary, 40)
        kept = Kept(by_token, np.ones(1, np.int64), np.zeros(1, np.int64), CONTEXT)
        found.append(commonest_tokens(token, activation, kept))
    for one, other in zip(*found, strict=True):
        assert one.tolist() == other.tolist()
    top = int(np.bincount(token).argmax())
    assert found[0][0][0] == top
    assert found[0][3][0] == pytest.approx(activation[token == top].mean())
