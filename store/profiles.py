"""Which tokens, and which positions of a sequence, a feature fires on: counted, and read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from saescope.errors import ArtefactError
from store.counting import count_bins
from store.database import ADDED, Database
from store.results import PositionProfile, TokenShare
from store.vocabulary import Vocabulary

TOKENS = 20
POSITION_BINS = 32

Ints = NDArray[np.integer]


@dataclass(frozen=True)
class Kept:
    """The kept positions of a store being built, counted.

    by_token: [vocabulary]; by_bin, first: [bins], how many lie in each bin, and the index in the
    sequence at which it begins.
    """

    by_token: NDArray[np.int64]
    by_bin: NDArray[np.int64]
    first: NDArray[np.int64]
    context: int

    @classmethod
    def count(cls, token: Ints, kept: NDArray[np.bool_], *, n_tokens: int, context: int) -> "Kept":
        """From the token of each position [positions], and whether it is kept."""
        bins = min(POSITION_BINS, context)
        first = -(-np.arange(bins) * context // bins)
        at = np.flatnonzero(kept)
        by_bin = np.bincount(at % context * bins // context, minlength=bins)
        return cls(np.bincount(token[at], minlength=n_tokens), by_bin, first, context)

    def bins_of(self, position: Ints) -> NDArray[np.int64]:
        """How many of these positions lie in each bin."""
        bins = len(self.by_bin)
        bin_of = np.arange(self.context) * bins // self.context
        return count_bins(position, self.context, bin_of, bins)


def commonest_tokens(
    token: Ints, activation: NDArray[np.float32], kept: Kept
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """The tokens that a feature fires on most often, at most TOKENS, ties by token id.

    Args: token, activation: [n], where it is active.

    Returns token ids, counts, shares of the token's kept positions, and mean activations.
    """
    if len(token) < len(kept.by_token) // 4:
        ids, inverse, counts = np.unique(token, return_inverse=True, return_counts=True)
        sums = np.bincount(inverse, weights=activation, minlength=len(ids))
    else:  # counting all tokens is quicker than sorting those
        every = np.bincount(token)
        ids = np.flatnonzero(every)
        counts = every[ids]
        sums = np.bincount(token, weights=activation)[ids]
    best = np.lexsort((ids, -counts))[:TOKENS]
    chosen, count = ids[best].astype(np.int64), counts[best].astype(np.int64)
    return chosen, count, count / kept.by_token[chosen], sums[best] / count


class ProfileRows:
    """Rows of the profiles' tables, collected feature by feature."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self._tokens: list[tuple[NDArray[Any], ...]] = []
        self._bins: list[tuple[int, NDArray[np.int64]]] = []

    def add(self, feature: int, position: Ints, token: Ints, activation: NDArray) -> None:
        """Count a feature: its positions [n], their tokens, its activations there."""
        found = commonest_tokens(token, activation, self.kept)
        number = np.full(len(found[0]), feature)
        self._tokens.append((number, np.arange(len(number)), *found))
        self._bins.append((feature, self.kept.bins_of(position)))

    def tables(self) -> dict[str, pa.Table]:
        """The rows, by the name of their table."""
        kept = self.kept
        bins = {"bin": np.arange(len(kept.by_bin)), "first": kept.first, "kept": kept.by_bin}
        found = {"position_bin": pa.table(bins)}
        if self._tokens:
            names = ("feature", "rank", "token_id", "count", "share", "mean")
            columns = [np.concatenate(pieces) for pieces in zip(*self._tokens, strict=True)]
            found["token_profile"] = pa.table(dict(zip(names, columns, strict=True)))
            counts = np.stack([each for _, each in self._bins])
            row, bin_ = np.nonzero(counts)
            feature = np.array([number for number, _ in self._bins])[row]
            found["position_profile"] = pa.table(
                {"feature": feature, "bin": bin_, "count": counts[row, bin_]}
            )
        return found


def has_profiles(schema: int) -> bool:
    """Whether stores of this schema have the tables."""
    return schema >= ADDED["token_profile"]


def _check(db: Database, schema: int) -> None:
    if not has_profiles(schema):
        raise ArtefactError(
            f"was built by an older saescope (schema {schema}), which did not count this; "
            "`saescope index RUN --out FOLDER --replace` builds it anew, and labels stay",
            where=str(db.file),
        )


def read_tokens(
    db: Database, vocabulary: Vocabulary, schema: int, feature: int, n: int
) -> list[TokenShare]:
    """See `FeatureStore.token_profile`."""
    _check(db, schema)
    rows = db.rows(
        "SELECT token_id, count, share, mean FROM db.token_profile WHERE feature = ?"
        " ORDER BY rank LIMIT ?",
        [feature, n],
    )
    db.check_fits(all(0 <= token < len(vocabulary) for token, *_ in rows), "token_profile")
    return [TokenShare(token, vocabulary.text(token), *rest) for token, *rest in rows]


def read_positions(db: Database, schema: int, feature: int, context: int) -> PositionProfile:
    """See `FeatureStore.position_profile`."""
    _check(db, schema)
    bins: Sequence[tuple[int, int, int]] = db.rows(
        "SELECT bin, first, kept FROM db.position_bin ORDER BY bin"
    )
    known = [first for _, first, _ in bins]
    fits = [number for number, *_ in bins] == list(range(len(bins))) and known == sorted(known)
    db.check_fits(fits and len(bins) > 0 and known[-1] < context, "position_bin")
    counts = np.zeros(len(bins), np.int64)
    for number, count in db.rows(
        "SELECT bin, count FROM db.position_profile WHERE feature = ?", [feature]
    ):
        db.check_fits(0 <= number < len(bins), "position_profile")
        counts[number] = count
    kept = np.array([each for *_, each in bins], np.int64)
    return PositionProfile(np.array([*known, context], np.int64), counts, kept)
