"""Queries that begin with a token or a phrase: where it stands, and which features fire on it."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from saescope.errors import InputError
from saescope.integers import as_index, as_indices
from store.corpus import Corpus
from store.examples import examples_at
from store.phrases import PhraseFinder, indices_in_row, indices_of
from store.results import Example, Occurrences, Spelling, TokenFeatures
from store.store_base import MOST, StoreBase, is_among

LONGEST_PHRASE = 200
MATCHES = ("whole", "begins")
ORDERS = ("dice", "share", "lift", "mean", "max")
_ROW_GROUP = 122_880
"""rows that DuckDB reads at once; each costs about 0.4 ms"""
_MOST_ROW_GROUPS = 40
_STRETCH, _STRETCHES = 1024, 32
"""positions in a stretch of text, and how many are read where reading all would take long"""
_MOST_EXAMPLES = 200


class TokenQueries(StoreBase):
    """Queries of tokens and phrases."""

    @cached_property
    def corpus(self) -> Corpus:
        """The tokens of the whole corpus; read into memory when first needed."""
        return Corpus(self._db, self.context, len(self.vocabulary))

    @cached_property
    def _finder(self) -> PhraseFinder:
        return PhraseFinder(self.vocabulary)

    @cached_property
    def _folding_finder(self) -> PhraseFinder:
        return PhraseFinder(self.vocabulary, ignore_case=True)

    def occurrences(
        self,
        of: str | int | Sequence[int] | Sequence[str],
        *,
        leading_space: bool | None = None,
        ignore_case: bool = False,
        match: str = "whole",
    ) -> Occurrences:
        """Where a token or a phrase stands in the corpus, in the order of the text.

        of: a text, however it was cut into tokens; or the id of one token; or the ids of several in
        a row; or several texts, for the places of any of them.
        leading_space: whether a space is before the text; None for both. A text that begins with
        white space is taken as it is.
        match: "whole" for whole tokens that together are the text, or "begins" for single tokens
        that begin with it.

        Cost: a pass over the token ids, about 2 ms a million tokens and word of the phrase (after
        the first call, which reads the corpus into memory).
        Raises InputError for an empty or too long text, and an id that is not in the vocabulary.
        """
        if match not in MATCHES:
            raise InputError("no such match", where="match", given=match, allowed=MATCHES)
        index, length = self._find(of, leading_space, ignore_case, match)
        # " a" is also the token "a" after the token " ": the longer one of the same place counts
        if not (np.diff(index) > 0).all():
            order = np.lexsort((length, index))
            last = np.append(index[order][1:] != index[order][:-1], True)
            index, length = index[order][last], length[order][last]
        kept = self.corpus.keep[index]
        return Occurrences(
            position=self.corpus.positions(index[kept]),
            length=length[kept],
            n_left_out=int(len(kept) - kept.sum()),
            spellings=self._spellings(index[kept], length[kept]),
        )

    def _find(
        self,
        of: str | int | Sequence[int] | Sequence[str],
        leading_space: bool | None,
        ignore_case: bool,
        match: str,
    ) -> tuple[np.ndarray, np.ndarray]:
        corpus, texts = self.corpus, _texts(of)
        if texts is None:
            ids = self._token_ids(of)
            index = indices_in_row(corpus.tokens, corpus.joined, ids)
            return index, np.full(len(index), len(ids))
        finder = self._folding_finder if ignore_case else self._finder
        found = []
        for text in dict.fromkeys(v for t in texts for v in _variants(t, leading_space)):
            if match == "whole":
                found.append(finder.find(text, corpus.tokens, corpus.joined))
                continue
            ids = finder.beginning(text)
            index = indices_of(corpus.tokens, ids, len(self.vocabulary))
            found.append((index, np.ones(len(index), dtype=np.int64)))
        index, length = map(np.concatenate, zip(*found, strict=True))
        return index, length

    def _token_ids(self, of: object) -> list[int]:
        most = len(self.vocabulary) - 1
        what = "no such token"
        if isinstance(of, Sequence):
            ids = as_indices(of, where="token", low=0, high=most, what=what)
            if not 0 < len(ids) <= LONGEST_PHRASE:
                raise InputError(
                    "a phrase has a token or more",
                    where="tokens",
                    given=f"{len(ids)} tokens",
                    allowed=f"1 to {LONGEST_PHRASE}",
                )
            return ids
        return [as_index(of, where="token", low=0, high=most, what=what)]

    def _spellings(self, index: np.ndarray, length: np.ndarray) -> tuple[Spelling, ...]:
        found = []
        for size in np.unique(length).tolist():
            ends = index[length == size]
            rows = self.corpus.tokens[ends[:, None] + np.arange(1 - size, 1)]
            # one number for each different row: much quicker than np.unique over rows
            code = rows[:, 0].astype(np.int64)
            for column in rows.T[1:]:
                code = np.unique(code * len(self.vocabulary) + column, return_inverse=True)[1]
            counts = np.bincount(code)
            which = np.flatnonzero(counts)
            first = np.zeros(len(counts), dtype=np.int64)
            first[code] = np.arange(len(code))
            counts, distinct = counts[which], rows[first[which]]
            for ids, count in zip(distinct.tolist(), counts.tolist(), strict=True):
                found.append(Spelling(tuple(ids), tuple(self.vocabulary.decode(ids)), count))
        return tuple(sorted(found, key=lambda s: (-s.count, s.token_ids)))

    def features_on(
        self,
        occurrences: Occurrences,
        *,
        order: str = "dice",
        limit: int = 100,
        exact: bool = False,
        anywhere: bool = False,
    ) -> TokenFeatures:
        """The features that fire on a token or a phrase: at its last token, or `anywhere` in it.

        order: "dice" (how nearly the feature fires there and nowhere else), "share" (of the
        occurrences at which it fires), "lift" (share / density: how many times as often as at any
        position), "mean" or "max" (its activation where it fires).
        exact: read all occurrences. If not, and they are spread over more than 40 blocks of the
        store's rows (5 million rows), those in 32 stretches of text are read, evenly spread over
        the occurrences; `n_read` says how many.

        Cost: 20 to 45 ms whatever the size of the store; with `exact`, 4 to 16 ms for each million
        rows of the store, as its rows are in the order of the text.
        Raises InputError for another order.
        """
        if order not in ORDERS:
            raise InputError("no such order", where="order", given=order, allowed=ORDERS)
        limit = as_index(limit, where="limit", low=0, high=MOST)
        position, length = occurrences.position, occurrences.length
        if not exact:
            read = self._stretches(position)
            position, length = position[read], length[read]
        if anywhere:
            fired, count, total, largest = self._anywhere(position, length)
        else:
            fired, count, total, largest = self._at(position)
        share = count / max(len(position), 1)
        there = share * occurrences.n
        columns = {
            "dice": 2 * there / (occurrences.n + self._of_all("n_active")[fired]),
            "share": share,
            "lift": share / self._of_all("density")[fired],
            "mean": total / count,
            "max": largest,
        }
        best = np.lexsort((fired, -columns["mean"], -columns[order]))[:limit]
        return TokenFeatures(
            n_occurrences=occurrences.n,
            n_read=len(position),
            n_features=len(fired),
            feature=fired[best].astype(np.int32),
            count=count[best],
            **{name: column[best] for name, column in columns.items()},
        )

    def _stretches(self, position: np.ndarray) -> np.ndarray:
        """Which of the sorted positions [n] to read, so that it does not take long."""
        rows_a_position = int(self.meta["n_activations"]) / max(int(self.meta["n_tokens"]), 1)
        stretch = position // _STRETCH
        begins = np.flatnonzero(np.diff(stretch, prepend=-1))  # much quicker than np.unique
        there = stretch[begins]
        row_groups = np.unique(there * _STRETCH * rows_a_position // _ROW_GROUP)
        if len(row_groups) <= _MOST_ROW_GROUPS or len(there) <= _STRETCHES:
            return np.ones(len(position), dtype=bool)
        chosen = np.linspace(0, len(there) - 1, _STRETCHES).round().astype(np.int64)
        read = np.zeros(len(position), dtype=bool)
        ends = np.append(begins[1:], len(position))
        for begin, end in zip(begins[chosen], ends[chosen], strict=True):
            read[begin:end] = True
        return read

    def _at(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The features that fire at positions [n]: how often, sum and maximum of activations."""
        found = self._columns(
            "SELECT feature, count(*) AS n, sum(activation::DOUBLE) AS total,"
            " max(activation) AS top FROM db.activation_by_position"
            " WHERE position IN (SELECT unnest(?::BIGINT[])) GROUP BY feature"
            " ORDER BY feature",
            [position.tolist()],
        )
        self._check_features(found["feature"])
        return found["feature"], found["n"], found["total"], found["top"]

    def _anywhere(
        self, position: np.ndarray, length: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The same of the `length` tokens up to each position, each of which counts once."""
        keys, values = [], []
        for back in range(int(length.max(initial=1))):
            mine = np.flatnonzero(length > back)
            found = self._columns(
                "SELECT position, feature, activation FROM db.activation_by_position"
                " WHERE position IN (SELECT unnest(?::BIGINT[]))",
                [(position[mine] - back).tolist()],
            )
            self._check_features(found["feature"])
            number = mine[np.searchsorted(position[mine] - back, found["position"])]
            keys.append(number * self.d_sae + found["feature"])
            values.append(found["activation"])
        key, activation = np.concatenate(keys), np.concatenate(values)
        order = np.lexsort((activation, key))
        strongest = order[np.append(key[order][1:] != key[order][:-1], True)[: len(order)]]
        feature, activation = key[strongest] % self.d_sae, activation[strongest]
        fired, which, count = np.unique(feature, return_inverse=True, return_counts=True)
        largest = np.zeros(len(fired), dtype=np.float32)
        np.maximum.at(largest, which, activation)
        return fired, count, np.bincount(which, activation, len(fired)), largest

    def _check_features(self, feature: np.ndarray) -> None:
        fits = not len(feature) or (feature.min() >= 0 and feature.max() < self.d_sae)
        self._db.check_fits(bool(fits), "activation_by_position")

    def firing_on(self, feature: int, occurrences: Occurrences) -> tuple[Occurrences, np.ndarray]:
        """The occurrences at whose last token a feature fires, strongest first; its activations.

        Cost: reads the feature's rows, about 2 ms for each 100,000 of them.
        """
        mine = self._rows_of(self._check(feature))
        at = is_among(mine["position"], occurrences.position)
        position, activation = mine["position"][at], mine["activation"][at]
        index = np.searchsorted(occurrences.position, position)
        return self._chosen(occurrences, index), activation

    def silent_on(self, feature: int, occurrences: Occurrences) -> Occurrences:
        """The occurrences at whose last token a feature does not fire, in the order of the text.

        With the occurrences of the words of its label this shows where the label fits but the
        feature is silent; `features_on` of the answer shows which features fire there instead,
        as they do where one feature absorbs another (Chanin et al., 2024, "A is for Absorption").
        Cost: as `firing_on`.
        """
        mine = self._rows_of(self._check(feature))
        silent = ~is_among(occurrences.position, mine["position"])
        return self._chosen(occurrences, np.flatnonzero(silent))

    def _chosen(self, occurrences: Occurrences, index: np.ndarray) -> Occurrences:
        position, length = occurrences.position[index], occurrences.length[index]
        spellings = self._spellings(self.corpus.indices(position), length)
        return Occurrences(position, length, 0, spellings)

    def examples_at(
        self, feature: int, position: Sequence[int] | np.ndarray, window: int | None = None
    ) -> list[Example]:
        """A feature at these positions, whether it fires there or not, with the tokens around them.

        window: how many tokens to show on each side; None shows the whole sequence.
        Cost: under 1 ms a position; 200 of them at most.
        Raises InputError for more positions, and for those that the store does not have.
        """
        number = self._check(feature)
        wanted = as_indices(position, where="position", low=0, high=MOST)
        if len(wanted) > _MOST_EXAMPLES:
            raise InputError(
                "too many positions",
                where="position",
                given=len(wanted),
                allowed=f"at most {_MOST_EXAMPLES}",
            )
        if window is not None:
            window = as_index(window, where="window", low=0, high=MOST)
        for sequence in {place // self.context for place in wanted}:
            self._sequence(sequence)
        return examples_at(self._db, self.vocabulary, self.context, number, wanted, window)


def _texts(of: object) -> list[str] | None:
    """The texts that are asked for, checked; None where token ids are."""
    texts = [of] if isinstance(of, str) else of
    if not isinstance(texts, list | tuple) or not texts or not isinstance(texts[0], str):
        return None
    for text in texts:
        if not isinstance(text, str) or not 0 < len(text) <= LONGEST_PHRASE:
            raise InputError(
                "is no text to look for",
                where="text",
                given=text if not isinstance(text, str) else f"{len(text)} characters",
                allowed=f"a text of 1 to {LONGEST_PHRASE} characters",
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError("has characters that are no text", where="text") from error
    return list(texts)


def _variants(text: str, leading_space: bool | None) -> list[str]:
    if text[0].isspace():
        return [text]
    return {None: [text, f" {text}"], True: [f" {text}"], False: [text]}[leading_space]
