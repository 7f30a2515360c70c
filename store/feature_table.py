"""Queries of the feature table: filters and orders over every statistic, page by page."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from saescope.errors import InputError
from saescope.integers import as_index, as_indices
from store.database import FEATURE_COLUMNS, identifier
from store.results import Feature, FeatureFilter, FeaturePage
from store.store_base import MOST, StoreBase

DENSE = 0.1
"""a feature that fires at more than this share of positions is called dense"""
STATES = {
    "all": "",
    "live": "n_active > 0",
    "dead": "n_active = 0",
    "dense": f"density > {DENSE}",
}
_BOUNDS = {
    "feature_min": "feature >= ?",
    "feature_max": "feature <= ?",
    "density_min": "density >= ?",
    "density_max": "density <= ?",
    "activation_min": "max >= ?",
    "activation_max": "max <= ?",
}
_TEXT = "VARCHAR"


class FeatureTable(StoreBase):
    """Queries of the table of features."""

    def features(
        self,
        filters: FeatureFilter | None = None,
        sort: str = "feature",
        descending: bool = False,
        limit: int = 50,
        offset: int = 0,
    ) -> FeaturePage:
        """One page of the feature table; ties are in the order of the features.

        Cost: one pass over the table, [d_sae] rows; a few milliseconds.
        Raises InputError for a column that is not in `columns` or of another kind, or a wrong
        state. Values are bound as parameters; nothing that is given becomes SQL.
        """
        if sort not in self.columns:
            raise InputError("no such column", where="sort", given=sort, allowed=self.columns)
        limit = as_index(limit, where="limit", low=1, high=MOST)
        offset = as_index(offset, where="offset", low=0, high=MOST)
        where, values = where_clause(filters or FeatureFilter(), self._column_types)
        total = self._rows(f"SELECT count(*) FROM db.feature{where}", values)[0][0]
        order = f"{identifier(sort)} {'DESC' if descending else 'ASC'} NULLS LAST, feature"
        columns = ", ".join(map(identifier, self.columns))
        sql = f"SELECT {columns} FROM db.feature{where} ORDER BY {order} LIMIT ? OFFSET ?"
        found = self._rows(sql, [*values, limit, offset])
        arrays = zip(*found, strict=True) if found else [()] * len(self.columns)
        rows = pa.table({n: list(a) for n, a in zip(self.columns, arrays, strict=True)})
        return FeaturePage(rows, total)

    def feature(self, feature: int) -> Feature:
        """One feature's statistics, in about a millisecond; InputError if there is none."""
        [found] = self.statistics_of([feature]).values()
        return found

    def statistics_of(self, features: Sequence[int]) -> dict[int, Feature]:
        """`feature` of each of these features, all in one query."""
        columns = ("first_row", *self.columns)
        names = ", ".join(map(identifier, columns))
        found = {}
        for number, rows in self._rows_by_feature("feature", names, features, "").items():
            self._db.check_fits(len(rows) == 1, "feature")
            row = dict(zip(columns, rows[0], strict=True))
            more = {name: row.pop(name) for name in list(row) if name not in FEATURE_COLUMNS}
            found[number] = Feature(**row, more=more)
        return found

    @property
    def number_columns(self) -> tuple[str, ...]:
        """The columns of numbers: those that a filter can bound."""
        return tuple(_of_numbers(self._column_types))

    def densities(self) -> np.ndarray:
        """Every feature's density, [d_sae]."""
        return self._of_all("density").copy()


def where_clause(filters: FeatureFilter, column_types: Mapping[str, str]) -> tuple[str, list[Any]]:
    """A filter as SQL (empty, or from " WHERE" on), and the values of its parameters."""
    if filters.state not in STATES:
        raise InputError("no such state", where="state", given=filters.state, allowed=STATES)
    clauses = [STATES[filters.state]] if STATES[filters.state] else []
    values: list[Any] = []
    for name, clause in _BOUNDS.items():
        bound = getattr(filters, name)
        if bound is not None:
            clauses.append(clause)
            values.append(_number(bound, name))
    for ids, clause in ((filters.ids, "IN"), (filters.not_ids, "NOT IN")):
        if ids is not None:
            clauses.append(f"feature {clause} (SELECT unnest(?::BIGINT[]))")
            values.append(as_indices(ids, where="ids", low=-MOST, high=MOST))
    numbers = _of_numbers(column_types)
    for between in filters.between:
        column = _column(between.column, numbers)
        for sign, limit in ((">=", between.low), ("<=", between.high)):
            if limit is not None:
                clauses.append(f"{column} {sign} ?")
                values.append(_number(limit, between.column))
    texts = [name for name, kind in column_types.items() if kind == _TEXT]
    for one_of in filters.one_of:
        clauses.append(f"{_column(one_of.column, texts)} IN (SELECT unnest(?::VARCHAR[]))")
        values.append([_words(value, one_of.column) for value in one_of.values])
    return (f" WHERE {' AND '.join(clauses)}" if clauses else ""), values


def _of_numbers(column_types: Mapping[str, str]) -> list[str]:
    return [name for name, kind in column_types.items() if kind not in (_TEXT, "BOOLEAN")]


def _column(name: str, known: list[str]) -> str:
    if name not in known:
        raise InputError("no such column to filter by", where="column", given=name, allowed=known)
    return identifier(name)


def _words(value: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError("is no text", where=where, given=value)
    return value


def _number(value: float, where: str) -> float:
    """A bound as a number of Python, from one of Python or NumPy; InputError for anything else."""
    if (
        isinstance(value, bool | np.bool_)
        or not isinstance(value, int | float | np.number)
        or value != value
    ):
        raise InputError("is not a number", where=where, given=value)
    return float(value) if isinstance(value, float | np.floating) else int(value)
