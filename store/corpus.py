"""The corpus of a store in memory: which token, of which document, is at each position."""

from functools import cached_property

import numpy as np

from store.database import Database


class Corpus:
    """The store's tokens in the order of their positions, read once when they are first needed.

    It takes 10 bytes of memory a token, and about 60 ms a million tokens to read.
    """

    def __init__(self, db: Database, context: int, n_words: int) -> None:
        self._db = db
        self._context = context
        self._n_words = n_words

    def _column(self, name: str) -> np.ndarray:
        found = self._db.columns(
            f"SELECT unnest({name}) AS x FROM (SELECT {name} FROM db.sequence ORDER BY sequence)"
        )["x"]
        whole = len(found) == len(self.sequence) * self._context
        self._db.check_fits(whole and not np.ma.is_masked(found), "sequence")
        return np.asarray(found)

    @cached_property
    def sequence(self) -> np.ndarray:
        """The sequences' numbers [n_sequences], ascending."""
        wrong = " OR ".join(
            f"len({name}) IS DISTINCT FROM ?" for name in ("tokens", "document", "keep")
        )
        sql = f"SELECT count(*) FROM db.sequence WHERE {wrong}"
        self._db.check_fits(self._db.rows(sql, [self._context] * 3) == [(0,)], "sequence")
        sql = "SELECT sequence FROM db.sequence ORDER BY sequence"
        return self._db.columns(sql)["sequence"]

    @cached_property
    def tokens(self) -> np.ndarray:
        """Token ids [n_tokens]."""
        found = self._column("tokens")
        fits = not len(found) or (found.min() >= 0 and found.max() < self._n_words)
        self._db.check_fits(bool(fits), "sequence")
        return found

    @cached_property
    def document(self) -> np.ndarray:
        """The number of each token's document [n_tokens]."""
        return self._column("document")

    @cached_property
    def keep(self) -> np.ndarray:
        """Whether a feature can fire there [n_tokens]: not at position 0 and special tokens."""
        return self._column("keep")

    @cached_property
    def joined(self) -> np.ndarray:
        """Whether a token follows one of the same document in its sequence [n_tokens]."""
        same = np.zeros(len(self.document), dtype=bool)
        same[1:] = self.document[1:] == self.document[:-1]
        same[:: self._context] = False
        return same

    def positions(self, index: np.ndarray) -> np.ndarray:
        """The positions in the store of indices into the arrays here."""
        return self.sequence[index // self._context] * self._context + index % self._context

    def indices(self, position: np.ndarray) -> np.ndarray:
        """The indices into the arrays here of positions in the store."""
        at = np.searchsorted(self.sequence, position // self._context)
        at = np.minimum(at, max(len(self.sequence) - 1, 0))
        known = self.sequence[at] == position // self._context
        self._db.check_fits(bool(known.all()), "activation_by_position")
        return at * self._context + position % self._context
