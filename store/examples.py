"""A feature's examples, read from a store: positions with the tokens around them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from store.database import Database
from store.results import Example
from store.vocabulary import Vocabulary

EXAMPLE_COLUMNS = "kind, interval, rank, position, activation, active_place, active_value"
"""of the table of examples, as `read_examples` takes them"""


class _Sequences:
    """Some whole sequences of a store, and the titles of their documents.

    tokens, documents: [sequences, context]; the row of each sequence is `row[number]`.
    """

    def __init__(
        self, db: Database, vocabulary: Vocabulary, context: int, positions: Sequence[int]
    ) -> None:
        """Read the sequences of these positions, and the titles of the documents there."""
        self.vocabulary = vocabulary
        at = np.array(positions, dtype=np.int64)
        numbers = np.unique(at // context)
        found = db.columns(
            "SELECT sequence, unnest(tokens) AS tokens, unnest(document) AS documents FROM"
            " (SELECT * FROM db.sequence WHERE sequence IN (SELECT unnest(?::BIGINT[]))"
            " ORDER BY sequence)",
            [numbers.tolist()],
        )
        # a list that is too short, or longer than the other, moves the numbers or leaves nulls
        whole = np.array_equal(found["sequence"], np.repeat(numbers, context))
        db.check_fits(whole and not any(map(np.ma.is_masked, found.values())), "sequence")
        tokens, documents = (np.asarray(found[name]) for name in ("tokens", "documents"))
        fits = not len(tokens) or (tokens.min() >= 0 and tokens.max() < len(vocabulary))
        db.check_fits(bool(fits), "sequence")
        self.tokens, self.documents = (
            each.reshape(len(numbers), context) for each in (tokens, documents)
        )
        self.row = {number: row for row, number in enumerate(numbers.tolist())}
        here = self.documents[np.searchsorted(numbers, at // context), at % context]
        self.titles = _titles(db, np.unique(here).tolist())

    def texts(self, row: int, shown: slice, ids: Sequence[int]) -> list[str]:
        """What is shown of a sequence, `ids`, as text."""
        whole = self.vocabulary.whole_texts(ids)
        if whole is not None:
            return whole
        return self.vocabulary.decode(self.tokens[row].tolist())[shown]  # characters of several


def read_examples(
    db: Database,
    vocabulary: Vocabulary,
    context: int,
    rows: Mapping[int, Sequence[tuple[Any, ...]]],
    window: int | None,
) -> dict[int, list[Example]]:
    """Features' examples, with `window` tokens on each side (the whole sequence if None).

    rows: of EXAMPLE_COLUMNS, by feature.
    Raises ArtefactError where the store's tables do not fit together.
    """
    positions = [row[3] for mine in rows.values() for row in mine]
    if not positions:
        return {feature: [] for feature in rows}
    sequences = _Sequences(db, vocabulary, context, positions)
    return {
        feature: [_example(db, context, row, sequences, window) for row in mine]
        for feature, mine in rows.items()
    }


def examples_at(
    db: Database,
    vocabulary: Vocabulary,
    context: int,
    feature: int,
    positions: Sequence[int],
    window: int | None,
) -> list[Example]:
    """A feature at these positions, in this order, with its activations in their sequences.

    Raises ArtefactError where the store's tables do not fit together.
    """
    if not positions:
        return []
    sequences = _Sequences(db, vocabulary, context, positions)
    numbers = list(sequences.row)
    found = db.rows(
        "SELECT position, activation FROM db.activation_by_position WHERE position IN (SELECT"
        " unnest(?::BIGINT[])) AND feature = ? ORDER BY position",
        [[n * context + index for n in numbers for index in range(context)], feature],
    )
    active: dict[int, tuple[list[int], list[float]]] = {n: ([], []) for n in numbers}
    for position, value in found:
        indices, values = active[position // context]
        indices.append(position % context)
        values.append(value)
    activations = dict(found)
    examples = []
    for rank, position in enumerate(positions):
        strength = activations.get(position, 0.0)
        row = ("found", -1, rank, position, strength, *active[position // context])
        examples.append(_example(db, context, row, sequences, window))
    return examples


def _titles(db: Database, documents: Sequence[int]) -> dict[int, str]:
    sql = "SELECT document, title FROM db.document WHERE document IN (SELECT unnest(?::INTEGER[]))"
    return dict(db.rows(sql, [documents]))


def _example(
    db: Database,
    context: int,
    row: tuple[Any, ...],
    sequences: _Sequences,
    window: int | None,
) -> Example:
    kind, interval, rank, position, activation, indices, values = row
    number, index = divmod(position, context)
    reach = context if window is None else window
    shown = slice(max(index - reach, 0), min(index + reach + 1, context))
    fits = None not in indices and None not in values and len(indices) == len(values)
    db.check_fits(
        fits
        and (not indices or (min(indices) >= 0 and max(indices) < context))
        and all(map(math.isfinite, [activation, *values])),
        "example",
    )
    activations = [0.0] * (shown.stop - shown.start)
    for at, value in zip(indices, values, strict=True):
        if shown.start <= at < shown.stop:
            activations[at - shown.start] = value
    of = sequences.row[number]
    ids = sequences.tokens[of, shown].tolist()
    documents = sequences.documents[of]
    document = int(documents[index])
    return Example(
        kind=kind,
        interval=interval,
        rank=rank,
        sequence=number,
        index=index,
        start=shown.start,
        position=position,
        activation=activation,
        document=document,
        title=sequences.titles.get(document, ""),
        token_ids=ids,
        tokens=sequences.texts(of, shown, ids),
        activations=activations,
        same_document=(documents[shown] == document).tolist(),
    )
