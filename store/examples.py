"""A feature's examples, read from a store: positions with the tokens around them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from store.database import Database
from store.results import Example
from store.vocabulary import Vocabulary

_SQL = (
    "SELECT interval, rank, position, activation, active_place, active_value"
    " FROM db.example WHERE feature = ? AND kind = ? ORDER BY interval DESC, rank"
)
_Sequences = Mapping[int, tuple[np.ndarray, np.ndarray]]


def read_examples(
    db: Database, vocabulary: Vocabulary, context: int, feature: int, kind: str, window: int | None
) -> list[Example]:
    """The examples of one kind, with `window` tokens on each side (the whole sequence if None).

    Raises ArtefactError where the store's tables do not fit together.
    """
    rows = db.rows(_SQL, [feature, kind])
    numbers = sorted({row[2] // context for row in rows})
    sequences = _sequences(db, context, len(vocabulary), numbers)
    documents = {int(sequences[row[2] // context][1][row[2] % context]) for row in rows}
    titles = _titles(db, documents)
    return [_example(db, vocabulary, context, kind, row, sequences, titles, window) for row in rows]


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
    numbers = sorted({position // context for position in positions})
    sequences = _sequences(db, context, len(vocabulary), numbers)
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
    documents = {int(sequences[p // context][1][p % context]) for p in positions}
    titles = _titles(db, documents)
    examples = []
    for rank, position in enumerate(positions):
        row = (-1, rank, position, activations.get(position, 0.0), *active[position // context])
        examples.append(_example(db, vocabulary, context, "found", row, sequences, titles, window))
    return examples


def _sequences(db: Database, context: int, n_words: int, numbers: Sequence[int]) -> _Sequences:
    if not numbers:
        return {}
    marks = ", ".join("?" * len(numbers))
    found = db.columns(
        f"SELECT sequence, tokens, document FROM db.sequence WHERE sequence IN ({marks})", numbers
    )
    columns = zip(found["sequence"], found["tokens"], found["document"], strict=True)
    sequences = {}
    for number, *arrays in columns:
        for array in arrays:
            whole = (
                array.shape == (context,) and array.dtype.kind == "i" and not np.ma.is_masked(array)
            )
            db.check_fits(whole, "sequence")
        tokens, documents = map(np.asarray, arrays)
        db.check_fits(tokens.min() >= 0 and tokens.max() < n_words, "sequence")
        sequences[int(number)] = (tokens, documents)
    db.check_fits(sequences.keys() == set(numbers), "sequence")
    return sequences


def _titles(db: Database, documents: set[int]) -> dict[int, str]:
    if not documents:
        return {}
    marks = ", ".join("?" * len(documents))
    sql = f"SELECT document, title FROM db.document WHERE document IN ({marks})"
    return dict(db.rows(sql, sorted(documents)))


def _example(
    db: Database,
    vocabulary: Vocabulary,
    context: int,
    kind: str,
    row: tuple[Any, ...],
    sequences: _Sequences,
    titles: Mapping[int, str],
    window: int | None,
) -> Example:
    interval, rank, position, activation, indices, values = row
    sequence, index = divmod(position, context)
    tokens, documents = sequences[sequence]
    reach = context if window is None else window
    shown = slice(max(index - reach, 0), index + reach + 1)
    active = np.zeros(context, dtype=np.float32)
    db.check_fits(
        None not in indices and None not in values and len(indices) == len(values), "example"
    )
    at, value = np.asarray(indices, dtype=np.int64), np.asarray([activation, *values])
    db.check_fits(bool(((at >= 0) & (at < context)).all() and np.isfinite(value).all()), "example")
    active[at] = values
    ids = tokens[shown].tolist()
    document = int(documents[index])
    return Example(
        kind=kind,
        interval=interval,
        rank=rank,
        sequence=sequence,
        index=index,
        start=shown.start,
        position=position,
        activation=activation,
        document=document,
        title=titles.get(document, ""),
        token_ids=ids,
        tokens=vocabulary.decode(tokens.tolist())[shown],
        activations=active[shown].tolist(),
        same_document=(documents[shown] == document).tolist(),
    )
