"""What all queries of a feature store stand on: the open file, its vocabulary and statistics."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saescope.errors import InputError
from saescope.integers import as_index, as_indices
from store.database import Database
from store.results import Active
from store.vocabulary import Vocabulary

_LARGEST_TABLE = 2**28
MOST = 2**62
"""upper bound of counts and offsets that are given to DuckDB as 64-bit integers"""


class StoreBase:
    """An open store's file; `FeatureStore` adds the queries, one file of them a theme."""

    def __init__(self, db: Database, meta: Mapping[str, Any]) -> None:
        self.path = db.file
        self.meta = dict(meta)
        self.d_sae = int(meta["d_sae"])
        self.context = int(meta["context"])
        self._db = db
        self._rows, self._columns = db.rows, db.columns
        self._vocabulary: Vocabulary | None = None
        self._statistics: dict[str, np.ndarray] | None = None
        described = self._rows("DESCRIBE db.feature")
        self._column_types = {name: kind for name, kind, *_ in described if name != "first_row"}
        self.columns = tuple(self._column_types)

    @property
    def database(self) -> Database:
        """The open file, for queries of other modules of this package."""
        return self._db

    def _check(self, feature: int) -> int:
        number = as_index(feature, where="feature")
        if not 0 <= number < self.d_sae:
            raise InputError(
                "no such feature", where="feature", given=number, allowed=f"0 to {self.d_sae - 1}"
            )
        return number

    def _check_all(self, features: Sequence[int]) -> list[int]:
        return [self._check(each) for each in as_indices(features, where="features")]

    def _rows_by_feature(
        self,
        table: str,
        columns: str,
        features: Sequence[int],
        order: str = "rank",
        condition: str = "true",
    ) -> dict[int, list[tuple[Any, ...]]]:
        """A table's rows of each of these features that fulfil a condition, all in one query.

        order: by which columns each feature's rows are; none for any order.
        """
        found: dict[int, list[tuple[Any, ...]]] = {f: [] for f in self._check_all(features)}
        by = f" ORDER BY {order}" if order else ""
        if len(found) == 1:  # this way it is quickest
            [one] = found
            sql = f"SELECT {columns} FROM db.{table} WHERE feature = ? AND {condition}{by}"
            return {one: self._rows(sql, [one])}
        rows = self._rows(
            f"SELECT feature, {columns} FROM db.{table}"
            f" WHERE feature IN (SELECT unnest(?::INTEGER[])) AND {condition}{by}",
            [list(found)],
        )
        for number, *row in rows:
            found[number].append(tuple(row))
        return found

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens' texts, read once."""
        if self._vocabulary is None:
            texts = [r[0] for r in self._rows("SELECT text FROM db.vocabulary ORDER BY token_id")]
            partial = self._rows("SELECT token_id, bytes FROM db.vocabulary WHERE bytes NOT NULL")
            ends = self._rows("SELECT min(token_id), max(token_id), count(*) FROM db.vocabulary")
            self._db.check_fits(ends == [(0, len(texts) - 1, len(texts))], "vocabulary")
            self._vocabulary = Vocabulary(texts, dict(partial))
        return self._vocabulary

    def _text(self, token_id: int) -> str:
        self._db.check_fits(0 <= token_id < len(self.vocabulary), "vocabulary")
        return self.vocabulary.text(token_id)

    def _of_all(self, column: str) -> np.ndarray:
        """A statistic of every feature, [d_sae]; read once, so that lookups cost no query."""
        if self._statistics is None:
            sql = "SELECT n_active, density, max FROM db.feature ORDER BY feature"
            self._statistics = self._columns(sql)
        return self._statistics[column]

    def _of(self, column: str, other: int) -> float:
        """A statistic of a feature whose number was read from the store."""
        self._db.check_fits(0 <= other < self.d_sae, "feature")
        return float(self._of_all(column)[other])

    def _sequence(self, sequence: int) -> int:
        number = as_index(sequence, where="sequence")
        known = "SELECT count(*) FROM db.sequence WHERE sequence = ?"
        if not 0 <= number < MOST or not self._rows(known, [number])[0][0]:
            raise InputError("no such sequence", where="sequence", given=number)
        return number

    def activations_between(self, begin: int, end: int) -> dict[str, np.ndarray]:
        """position, feature and activation [n] of all that is active from one position to another.

        Some milliseconds for each million of them.
        """
        return self._columns(
            "SELECT position, feature, activation FROM db.activation_by_position"
            " WHERE position >= ? AND position < ?",
            [begin, end],
        )

    def _active(self, begin: int, end: int) -> Active:
        found = self.activations_between(begin, end)
        keys = (found["feature"], -found["activation"], found["position"])
        order = np.lexsort(keys)
        return Active(*(found[name][order] for name in ("position", "feature", "activation")))

    def _rows_of(self, feature: int, limit: int | None = None) -> dict[str, np.ndarray]:
        """The positions [n] and activations [n] of a feature, strongest first."""
        sql = "SELECT first_row, n_active FROM db.feature WHERE feature = ?"
        first, count = self._rows(sql, [feature])[0]
        last = first + (count if limit is None else min(count, limit))
        return self._db.activations_of(
            "position, activation", (feature, feature + 1), (first, last)
        )


def is_among(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether each of the positions [n] is among others [m]; quick, as positions are dense."""
    if not len(values) or not len(others):
        return np.zeros(len(values), dtype=bool)
    span = int(others.max()) - int(others.min())
    return np.isin(values, others, kind="table" if span < _LARGEST_TABLE else "sort")
