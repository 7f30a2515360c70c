"""Reading a feature store: typed queries, read-only, from any number of threads and processes."""

import random
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np

from saescope.errors import InputError, check_range
from saescope.integers import as_index
from saescope.metrics import metric_table
from saescope.paths import AnyPath
from store.checking import check_store
from store.co_occurrence import CoOccurrence
from store.database import COUNTS, quoted, store_file
from store.documents import DocumentQueries
from store.examples import EXAMPLE_COLUMNS, read_examples
from store.feature_facts import FeatureFacts
from store.feature_map import FeatureMap, read_map
from store.feature_table import FeatureTable
from store.parquet.database import open_database
from store.pictures import PictureQueries
from store.profiles import read_positions, read_tokens
from store.results import (
    Active,
    Coactivation,
    Example,
    Histogram,
    LogitEffect,
    Logits,
    Neighbour,
    Overview,
    PositionProfile,
    TokenShare,
)
from store.sql import SqlQueries
from store.store_base import MOST
from store.summaries import BINS

KINDS = ("top", "interval")


class FeatureStore(
    FeatureTable, FeatureFacts, DocumentQueries, CoOccurrence, PictureQueries, SqlQueries
):
    """An open feature store; every method may be called from any thread.

    >>> with FeatureStore.open("stores/demo") as features:  # doctest: +SKIP
    ...     features.examples(123, "top", window=10)[0].tokens
    """

    @classmethod
    def open(
        cls,
        path: str | AnyPath,
        *,
        threads: int = 1,
        memory_limit: str = "1GB",
        query_seconds: float = 120.0,
    ) -> "FeatureStore":
        """Open a store's file, or the folder it is in; files of unknown origin are safe to open.

        path: also the folder, or URL (s3://bucket/name), of a store in Parquet, which gives the
        same answers. What was read last from an object store stays in memory, 64 MiB.

        threads: of one query. Queries are so short that one thread is fastest; queries of several
        callers run at the same time in any case.
        query_seconds: a query that takes longer is ended.
        Raises ArtefactError if it is missing, no feature store, of another version, or has in it
        what a feature store has not: nothing in the file is run, and no other file is read.
        """
        check_range("query_seconds", query_seconds, above=0)
        db = open_database(
            store_file(path),
            threads=as_index(threads, where="threads", low=1),
            memory_limit=memory_limit,
            seconds=query_seconds,
        )
        try:
            return cls(db, check_store(db))
        except BaseException:
            db.close()
            raise

    def close(self) -> None:
        """Close the file; queries then fail."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def overview(self) -> Overview:
        """The store in numbers."""
        meta = self.meta
        kept = int(meta["n_kept"])
        counts = {key: int(meta[key]) for key in COUNTS if key != "n_kept"}
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
            table=metric_table(meta.get("metric_rows"), where=str(self.path)),
            bytes=self._db.bytes,
        )

    def histogram(self, feature: int) -> Histogram:
        """How often the feature has which activation: equal bins over (0, max]."""
        [found] = self.histograms_of([feature]).values()
        return found

    def histograms_of(self, features: Sequence[int]) -> dict[int, Histogram]:
        """`histogram` of each of these features, all in one query, as in the methods below.

        Cost: a few milliseconds, and under 0.1 ms a feature; of examples some 0.5 ms a feature.
        """
        found = {}
        of_each = self._rows_by_feature("histogram", "bin, count", features, "")
        for number, rows in of_each.items():
            counts = np.zeros(BINS, dtype=np.int64)
            for bin_, count in rows:
                self._db.check_fits(0 <= bin_ < BINS, "histogram")
                counts[bin_] = count
            top = float(self._of_all("max")[number])
            found[number] = Histogram(np.linspace(0.0, top, BINS + 1), counts)
        return found

    def activations_below(self, feature: int, activation: float) -> int:
        """How many of the feature's activations are below this one, of those above zero."""
        mine = self._rows_of(self._check(feature))["activation"]
        return int((mine < np.float32(activation)).sum())

    def examples(self, feature: int, kind: str = "top", window: int | None = None) -> list[Example]:
        """The strongest examples ("top"), or random ones of five intervals ("interval").

        window: how many tokens to show on each side; None shows the whole sequence. Interval
        examples come from the strongest interval to the weakest.
        """
        [found] = self.examples_of([feature], (kind,), window).values()
        return found

    def examples_of(
        self, features: Sequence[int], kinds: Sequence[str] = KINDS, window: int | None = None
    ) -> dict[int, list[Example]]:
        """`examples` of each of these features, of these kinds; the strongest first."""
        for kind in kinds:
            if kind not in KINDS:
                raise InputError("no such kind of example", where="kind", given=kind, allowed=KINDS)
        if window is not None:
            window = as_index(window, where="window", low=0, high=MOST)
        among = f"kind IN ({', '.join(map(quoted, kinds))})" if kinds else "false"
        order = ("kind = 'top' DESC, " if len(kinds) > 1 else "") + "interval DESC, rank"
        rows = self._rows_by_feature("example", EXAMPLE_COLUMNS, features, order, among)
        return read_examples(self._db, self.vocabulary, self.context, rows, window)

    def top_tokens(self, features: Sequence[int], n: int = 5) -> dict[int, list[str]]:
        """For each feature, the n most frequent tokens among its strongest examples."""
        numbers = self._check_all(features)
        n = as_index(n, where="n", low=0)
        if not numbers:
            return {}
        rows = self._rows(
            "SELECT feature, token_id FROM db.example WHERE kind = 'top' AND feature IN"
            " (SELECT unnest(?::INTEGER[])) GROUP BY feature, token_id"
            " ORDER BY feature, count(*) DESC, min(rank)",
            [numbers],
        )
        found: dict[int, list[str]] = {number: [] for number in numbers}
        for number, token_id in rows:
            if len(found[number]) < n:
                found[number].append(self._text(token_id))
        return found

    def token_profile(self, feature: int, n: int = 20) -> list[TokenShare]:
        """The tokens that the feature fires on most often (at most 20 are stored).

        Raises ArtefactError for a store of schema 2, which does not have them.
        """
        n = as_index(n, where="n", low=0, high=MOST)
        schema, number = int(self.meta["schema"]), self._check(feature)
        return read_tokens(self._db, self.vocabulary, schema, number, n)

    def position_profile(self, feature: int) -> PositionProfile:
        """Where in the sequences the feature fires. Raises ArtefactError as `token_profile`."""
        schema, number = int(self.meta["schema"]), self._check(feature)
        return read_positions(self._db, schema, number, self.context)

    def logits(self, feature: int) -> Logits:
        """The tokens that the feature's decoder direction raises and lowers most."""
        [found] = self.logits_of([feature]).values()
        return found

    def logits_of(self, features: Sequence[int]) -> dict[int, Logits]:
        """`logits` of each of these features."""
        found = {}
        of_each = self._rows_by_feature("logit", "sign, token_id, value", features)
        for number, rows in of_each.items():
            effects = [(sign, LogitEffect(t, self._text(t), v)) for sign, t, v in rows]
            raised, lowered = ([e for s, e in effects if s * side > 0] for side in (1, -1))
            found[number] = Logits(raised, lowered)
        return found

    def neighbours(self, feature: int) -> list[Neighbour]:
        """Features with the nearest decoder directions, nearest first."""
        [found] = self.neighbours_of([feature]).values()
        return found

    def neighbours_of(self, features: Sequence[int]) -> dict[int, list[Neighbour]]:
        """`neighbours` of each of these features."""
        of_each = self._rows_by_feature("neighbour", "other, cosine", features)
        return {
            number: [Neighbour(o, c, self._of("density", o), self._of("max", o)) for o, c in rows]
            for number, rows in of_each.items()
        }

    def feature_map(self) -> FeatureMap | None:
        """Where each feature lies on the map of decoder directions, all at once.

        None where the store has no map: it was built by an older saescope, or not by `saescope
        index`. Cost: the whole table and a search of neighbours; 0.1 s for 16,384 features.
        """
        return read_map(self._db, int(self.meta["schema"]), self.d_sae)

    def coactivating(self, feature: int, n: int = 10) -> list[Coactivation]:
        """The n features whose firing correlates most with this one's (at most 20 are stored)."""
        [found] = self.coactivating_of([feature], n).values()
        return found

    def coactivating_of(
        self, features: Sequence[int], n: int = 10
    ) -> dict[int, list[Coactivation]]:
        """`coactivating` of each of these features."""
        most = as_index(n, where="n", low=0, high=MOST)
        columns = "other, together, share, pmi, correlation"
        return {
            number: [
                Coactivation(other, together, share, pmi, r, self._of("density", other))
                for other, together, share, pmi, r in rows[:most]
            ]
            for number, rows in self._rows_by_feature("coactivation", columns, features).items()
        }

    def activations(self, feature: int, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The feature's positions [n] and activations [n], strongest first; all without limit."""
        if limit is not None:
            limit = as_index(limit, where="limit", low=0)
        found = self._rows_of(self._check(feature), limit)
        return found["position"], found["activation"]

    def features_of_position(self, sequence: int, index: int) -> Active:
        """All features active at one token, given by its index in a sequence, strongest first."""
        index = as_index(index, where="index")
        if not 0 <= index < self.context:
            raise InputError(
                "no such position", where="index", given=index, allowed=f"0 to {self.context - 1}"
            )
        position = self._sequence(sequence) * self.context + index
        return self._active(position, position + 1)

    def features_of_sequence(self, sequence: int) -> Active:
        """All features active anywhere in one sequence, token by token."""
        begin = self._sequence(sequence) * self.context
        return self._active(begin, begin + self.context)

    def _live(self) -> np.ndarray:
        return np.flatnonzero(self._of_all("n_active"))

    def live_features(self) -> list[int]:
        """All features that are active somewhere, in order."""
        return [int(number) for number in self._live()]

    def next_live(self, feature: int) -> int | None:
        """The next feature that is active somewhere, or None."""
        live = self._live()
        at = int(np.searchsorted(live, as_index(feature, where="feature"), side="right"))
        return int(live[at]) if at < len(live) else None

    def previous_live(self, feature: int) -> int | None:
        """The previous feature that is active somewhere, or None."""
        live = self._live()
        at = int(np.searchsorted(live, as_index(feature, where="feature"), side="left"))
        return int(live[at - 1]) if at else None

    def random_live(self, seed: int | None = None) -> int | None:
        """A feature that is active somewhere, each with equal chance, or None."""
        live = self._live()
        chosen = random.Random(None if seed is None else as_index(seed, where="seed"))
        return int(chosen.choice(live)) if len(live) else None
