"""Reading a feature store: typed queries, read-only, from any number of threads and processes."""

import random
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa

from saescope.errors import InputError
from store.database import open_read_only, store_file
from store.decoding import Vocabulary
from store.finishing import FEATURE_COLUMNS
from store.results import (
    Active,
    Coactivation,
    Example,
    Feature,
    FeatureFilter,
    FeaturePage,
    Histogram,
    LogitEffect,
    Logits,
    Neighbour,
    Overview,
)
from store.summaries import BINS

KINDS = ("top", "interval")
STATES = {"all": "", "live": "n_active > 0", "dead": "n_active = 0"}
_BOUNDS = {
    "feature_min": "feature >= ?",
    "feature_max": "feature <= ?",
    "density_min": "density >= ?",
    "density_max": "density <= ?",
    "activation_min": "max >= ?",
    "activation_max": "max <= ?",
}


class FeatureStore:
    """An open feature store; every method may be called from any thread.

    >>> with FeatureStore.open("stores/demo") as features:  # doctest: +SKIP
    ...     features.examples(123, "top", window=10)[0].tokens
    """

    def __init__(self, path: Path, con: Any, meta: Mapping[str, Any]) -> None:
        self.path = path
        self.meta = dict(meta)
        self.d_sae = int(meta["d_sae"])
        self.context = int(meta["context"])
        self._con = con
        self._lock = threading.Lock()
        self._vocabulary: Vocabulary | None = None
        self._statistics: dict[str, np.ndarray] | None = None
        names = [row[0] for row in self._rows("DESCRIBE db.feature")]
        self.columns = tuple(name for name in names if name != "first_row")

    @classmethod
    def open(
        cls, path: str | Path, *, threads: int = 1, memory_limit: str = "1GB"
    ) -> "FeatureStore":
        """Open a store's file, or the folder it is in.

        threads: a query's own. The queries here are so short that one is the fastest; several
        callers' queries run beside one another whatever it is.
        Raises ArtefactError if it is missing, no feature store, or of a newer version.
        """
        file = store_file(path)
        con, meta = open_read_only(file, threads=threads, memory_limit=memory_limit)
        return cls(file, con, meta)

    def close(self) -> None:
        """Close the file; queries then fail."""
        self._con.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _cursor(self) -> Any:
        # one cursor a query: a connection shared by threads gives errors or wrong rows
        with self._lock:
            return self._con.cursor()

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._cursor() as cursor:
            return cursor.execute(sql, list(values)).fetchall()

    def _columns(self, sql: str, values: Sequence[Any] = ()) -> dict[str, np.ndarray]:
        with self._cursor() as cursor:
            return cursor.execute(sql, list(values)).fetchnumpy()

    def _check(self, feature: int) -> int:
        if not 0 <= feature < self.d_sae:
            raise InputError(
                "no such feature", where="feature", given=feature, allowed=f"0 to {self.d_sae - 1}"
            )
        return int(feature)

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens' texts, read once."""
        if self._vocabulary is None:
            texts = [r[0] for r in self._rows("SELECT text FROM db.vocabulary ORDER BY token_id")]
            partial = self._rows("SELECT token_id, bytes FROM db.vocabulary WHERE bytes NOT NULL")
            self._vocabulary = Vocabulary(texts, dict(partial))
        return self._vocabulary

    def overview(self) -> Overview:
        """The store in numbers."""
        meta = self.meta
        kept = int(meta["n_kept"])
        counts = {
            key: int(meta[key])
            for key in ("n_live", "n_activations", "n_sequences", "n_tokens", "n_documents")
        }
        return Overview(
            name=str(meta.get("name") or self.path.parent.name),
            model=str(meta.get("model") or ""),
            site=str(meta.get("site") or ""),
            architecture=str(meta.get("architecture") or ""),
            **counts,
            d_sae=self.d_sae,
            context=self.context,
            n_dead=self.d_sae - counts["n_live"],
            n_kept=kept,
            mean_active=counts["n_activations"] / max(kept, 1),
            metrics=meta.get("metrics") or {},
            bytes=self.path.stat().st_size,
        )

    def features(
        self,
        filters: FeatureFilter | None = None,
        sort: str = "feature",
        descending: bool = False,
        limit: int = 50,
        offset: int = 0,
    ) -> FeaturePage:
        """One page of the feature table; ties are in the order of the features.

        Raises InputError for a column to sort by that is not in `columns`, or a wrong state.
        """
        if sort not in self.columns:
            raise InputError("no such column", where="sort", given=sort, allowed=self.columns)
        if limit < 1 or offset < 0:
            raise InputError(
                "out of range", where="limit, offset", given=(limit, offset), allowed="from 1, 0"
            )
        where, values = self._where(filters or FeatureFilter())
        total = self._rows(f"SELECT count(*) FROM db.feature{where}", values)[0][0]
        order = f'"{sort}" {"DESC" if descending else "ASC"} NULLS LAST, feature'
        columns = ", ".join(f'"{name}"' for name in self.columns)
        sql = f"SELECT {columns} FROM db.feature{where} ORDER BY {order} LIMIT ? OFFSET ?"
        found = self._rows(sql, [*values, limit, offset])
        arrays = zip(*found, strict=True) if found else [()] * len(self.columns)
        rows = pa.table({n: list(a) for n, a in zip(self.columns, arrays, strict=True)})
        return FeaturePage(rows, total)

    def _where(self, filters: FeatureFilter) -> tuple[str, list[Any]]:
        if filters.state not in STATES:
            raise InputError("no such state", where="state", given=filters.state, allowed=STATES)
        clauses = [STATES[filters.state]] if STATES[filters.state] else []
        values: list[Any] = []
        for name, clause in _BOUNDS.items():
            bound = getattr(filters, name)
            if bound is not None:
                clauses.append(clause)
                values.append(bound)
        if filters.ids is not None:
            clauses.append("feature IN (SELECT unnest(?::INTEGER[]))")
            values.append(list(filters.ids))
        return (f" WHERE {' AND '.join(clauses)}" if clauses else ""), values

    def feature(self, feature: int) -> Feature:
        """One feature's statistics; InputError if there is no such feature."""
        columns = ("first_row", *self.columns)
        names = ", ".join(f'"{name}"' for name in columns)
        sql = f"SELECT {names} FROM db.feature WHERE feature = ?"
        row = dict(zip(columns, self._rows(sql, [self._check(feature)])[0], strict=True))
        more = {name: row.pop(name) for name in list(row) if name not in FEATURE_COLUMNS}
        return Feature(**row, more=more)

    def _of_all(self, column: str) -> np.ndarray:
        """A statistic of every feature, [d_sae]; read once, so that lookups cost no query."""
        if self._statistics is None:
            sql = "SELECT n_active, density, max FROM db.feature ORDER BY feature"
            self._statistics = self._columns(sql)
        return self._statistics[column]

    def densities(self) -> np.ndarray:
        """Every feature's density, [d_sae]."""
        return self._of_all("density").copy()

    def histogram(self, feature: int) -> Histogram:
        """How often the feature has which activation: equal bins over (0, max]."""
        top = float(self._of_all("max")[self._check(feature)])
        rows = self._rows("SELECT bin, count FROM db.histogram WHERE feature = ?", [feature])
        counts = np.zeros(BINS, dtype=np.int64)
        for bin_, count in rows:
            counts[bin_] = count
        return Histogram(np.linspace(0.0, top, BINS + 1), counts)

    def examples(self, feature: int, kind: str = "top", window: int | None = None) -> list[Example]:
        """The strongest examples ("top"), or random ones of five intervals ("interval").

        window: how many tokens to show on each side; None shows the whole sequence. Interval
        examples come from the strongest interval to the weakest.
        """
        if kind not in KINDS:
            raise InputError("no such kind of example", where="kind", given=kind, allowed=KINDS)
        if window is not None and window < 0:
            raise InputError("out of range", where="window", given=window, allowed="0 and more")
        rows = self._rows(
            "SELECT interval, rank, position, activation, active_place, active_value"
            " FROM db.example WHERE feature = ? AND kind = ? ORDER BY interval DESC, rank",
            [self._check(feature), kind],
        )
        sequences = self._sequences(sorted({row[2] // self.context for row in rows}))
        titles = self._titles(
            {int(sequences[r[2] // self.context][1][r[2] % self.context]) for r in rows}
        )
        return [self._example(kind, row, sequences, titles, window) for row in rows]

    def _example(
        self,
        kind: str,
        row: tuple[Any, ...],
        sequences: Mapping[int, tuple[np.ndarray, np.ndarray]],
        titles: Mapping[int, str],
        window: int | None,
    ) -> Example:
        interval, rank, position, activation, places, values = row
        sequence, place = divmod(position, self.context)
        tokens, documents = sequences[sequence]
        reach = self.context if window is None else window
        shown = slice(max(place - reach, 0), place + reach + 1)
        active = np.zeros(self.context, dtype=np.float32)
        active[places] = values
        ids = tokens[shown].tolist()
        document = int(documents[place])
        return Example(
            kind=kind,
            interval=interval,
            rank=rank,
            sequence=sequence,
            place=place,
            start=shown.start,
            position=position,
            activation=activation,
            document=document,
            title=titles.get(document, ""),
            token_ids=ids,
            tokens=self.vocabulary.decode(ids),
            activations=active[shown].tolist(),
            same_document=(documents[shown] == document).tolist(),
        )

    def _sequences(self, numbers: Sequence[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        if not numbers:
            return {}
        marks = ", ".join("?" * len(numbers))
        found = self._columns(
            f"SELECT sequence, tokens, document FROM db.sequence WHERE sequence IN ({marks})",
            numbers,
        )
        columns = zip(found["sequence"], found["tokens"], found["document"], strict=True)
        return {int(n): (np.asarray(t), np.asarray(d)) for n, t, d in columns}

    def _titles(self, documents: set[int]) -> dict[int, str]:
        if not documents:
            return {}
        marks = ", ".join("?" * len(documents))
        sql = f"SELECT document, title FROM db.document WHERE document IN ({marks})"
        return dict(self._rows(sql, sorted(documents)))

    def top_tokens(self, features: Sequence[int], n: int = 5) -> dict[int, list[str]]:
        """For each feature, the n most frequent tokens among its strongest examples."""
        if not features:
            return {}
        rows = self._rows(
            "SELECT feature, token_id FROM db.example WHERE kind = 'top' AND feature IN"
            " (SELECT unnest(?::INTEGER[])) GROUP BY feature, token_id"
            " ORDER BY feature, count(*) DESC, min(rank)",
            [[self._check(feature) for feature in features]],
        )
        found: dict[int, list[str]] = {int(feature): [] for feature in features}
        for feature, token_id in rows:
            if len(found[feature]) < n:
                found[feature].append(self.vocabulary.text(token_id))
        return found

    def logits(self, feature: int) -> Logits:
        """The tokens that the feature's decoder direction raises and lowers most."""
        rows = self._rows(
            "SELECT sign, token_id, value FROM db.logit WHERE feature = ? ORDER BY rank",
            [self._check(feature)],
        )
        effects = [(sign, LogitEffect(t, self.vocabulary.text(t), v)) for sign, t, v in rows]
        return Logits([e for s, e in effects if s > 0], [e for s, e in effects if s < 0])

    def neighbours(self, feature: int) -> list[Neighbour]:
        """Features with the nearest decoder directions, nearest first."""
        rows = self._rows(
            "SELECT other, cosine FROM db.neighbour WHERE feature = ? ORDER BY rank",
            [self._check(feature)],
        )
        density, top = self._of_all("density"), self._of_all("max")
        return [Neighbour(o, cosine, float(density[o]), float(top[o])) for o, cosine in rows]

    def coactivating(self, feature: int, n: int = 10) -> list[Coactivation]:
        """The n features whose firing correlates most with this one's (at most 20 are stored)."""
        rows = self._rows(
            "SELECT other, share, correlation, sampled FROM db.coactivation"
            " WHERE feature = ? ORDER BY rank LIMIT ?",
            [self._check(feature), n],
        )
        density = self._of_all("density")
        return [Coactivation(o, s, r, float(density[o]), sampled) for o, s, r, sampled in rows]

    def activations(self, feature: int, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The feature's positions [n] and activations [n], strongest first; all without limit."""
        row = self.feature(feature)
        last = row.first_row + min(row.n_active, row.n_active if limit is None else limit)
        found = self._columns(
            "SELECT position, activation FROM db.activation_by_feature"
            " WHERE rowid >= ? AND rowid < ? ORDER BY rowid",
            [row.first_row, last],
        )
        return found["position"], found["activation"]

    def features_of_position(self, sequence: int, place: int) -> Active:
        """All features active at one token, strongest first."""
        if not 0 <= place < self.context:
            raise InputError(
                "no such place", where="place", given=place, allowed=f"0 to {self.context - 1}"
            )
        position = sequence * self.context + place
        return self._active(position, position + 1)

    def features_of_sequence(self, sequence: int) -> Active:
        """All features active anywhere in one sequence, token by token."""
        return self._active(sequence * self.context, (sequence + 1) * self.context)

    def _active(self, begin: int, end: int) -> Active:
        found = self._columns(
            "SELECT position, feature, activation FROM db.activation_by_position"
            " WHERE position >= ? AND position < ?",
            [begin, end],
        )
        keys = (found["feature"], -found["activation"], found["position"])
        order = np.lexsort(keys)
        return Active(*(found[name][order] for name in ("position", "feature", "activation")))

    def _live(self) -> np.ndarray:
        return np.flatnonzero(self._of_all("n_active"))

    def next_live(self, feature: int) -> int | None:
        """The next feature that is active somewhere, or None."""
        live = self._live()
        at = int(np.searchsorted(live, feature, side="right"))
        return int(live[at]) if at < len(live) else None

    def previous_live(self, feature: int) -> int | None:
        """The previous feature that is active somewhere, or None."""
        live = self._live()
        at = int(np.searchsorted(live, feature, side="left"))
        return int(live[at - 1]) if at else None

    def random_live(self, seed: int | None = None) -> int | None:
        """A feature that is active somewhere, each with equal chance, or None."""
        live = self._live()
        return int(random.Random(seed).choice(live)) if len(live) else None
