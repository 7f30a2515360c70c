"""Groups of a store's documents, chosen by title, key, topic, source or split; where each lies."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate

import numpy as np
from numpy.typing import NDArray

from saescope.errors import InputError
from store.fact_writer import GROUP_KINDS
from store.feature_store import FeatureStore

SPLITS = ("train", "held_out")
REST, ALL = "rest", "all"
GROUPS = (
    "title:PATTERN, key:PATTERN, topic:PATTERN, source:PATTERN, "
    f"split:{' or split:'.join(SPLITS)}, {ALL}, {REST}"
)
"""how a group of documents is written"""
_MOST_NAMES = 20
_SEQUENCES = 1 << 15


@dataclass(frozen=True)
class Documents:
    """The documents of a store [n], and which of them each position is in."""

    number: NDArray[np.int64]
    """as the store numbers them, ascending"""
    key: list[str]
    title: list[str]
    split: NDArray[np.int8]
    """0 train, 1 held out"""
    kept: NDArray[np.int64]
    """kept positions of each"""
    sequences: NDArray[np.int64]
    """numbers of the store's sequences, ascending"""
    of_token: NDArray[np.int32]
    """index of the document at each token of these sequences in turn; -1 where none is kept"""
    context: int
    groups: Mapping[str, Sequence[str | None]] | None = field(default_factory=dict)
    """name of each document's topic and source, by kind, where the documents are of several; None
    for a store of an older schema, which does not say"""

    def at(self, position: NDArray[np.int64]) -> NDArray[np.int32]:
        """Index of the document at each position; -1 where there is none."""
        sequence, index = np.divmod(position, self.context)
        row = np.searchsorted(self.sequences, sequence)
        return self.of_token[row * self.context + index]


def read_documents(store: FeatureStore) -> Documents:
    """The documents of a store; 4 bytes of memory a token.

    Raises ArtefactError if its tables do not fit one another.
    """
    db = store.database
    rows = db.rows("SELECT document, key, title, split FROM db.document ORDER BY document")
    number = np.array([row[0] for row in rows], dtype=np.int64)
    sequences = db.columns("SELECT sequence FROM db.sequence ORDER BY sequence")["sequence"]
    of_token = np.full(len(sequences) * store.context, -1, dtype=np.int32)
    kept = np.zeros(len(number), dtype=np.int64)
    at = 0
    for document, keep in _tokens(store, sequences):
        db.check_fits(len(document) == len(keep) and len(document) % store.context == 0, "sequence")
        known = keep & np.isin(document, number)
        here = np.where(known, np.searchsorted(number, document), -1).astype(np.int32)
        db.check_fits(at + len(here) <= len(of_token), "sequence")
        of_token[at : at + len(here)] = here
        kept += np.bincount(here[here >= 0], minlength=len(number))
        at += len(here)
    db.check_fits(at == len(of_token), "sequence")
    keys, titles = [str(row[1]) for row in rows], [str(row[2]) for row in rows]
    split = np.array([row[3] for row in rows], dtype=np.int8)
    groups = _groups(store, number.tolist()) if store.has_facts else None
    return Documents(number, keys, titles, split, kept, sequences, of_token, store.context, groups)


def _groups(store: FeatureStore, numbers: Sequence[int]) -> dict[str, list[str | None]]:
    """The name of each document's topic and source, by kind."""
    names: dict[str, dict[int, str]] = {}
    sql = "SELECT kind, document, name FROM db.document_group"
    for kind, document, name in store.database.rows(sql):
        names.setdefault(str(kind), {})[int(document)] = str(name)
    return {kind: [of.get(number) for number in numbers] for kind, of in names.items()}


def _tokens(store: FeatureStore, sequences: NDArray) -> Iterator[tuple[NDArray, NDArray]]:
    """Document and keep of each token, some sequences at a time."""
    sql = (
        "SELECT unnest(document) AS document, unnest(keep) AS keep FROM (SELECT document, keep"
        " FROM db.sequence WHERE sequence >= ? AND sequence <= ? ORDER BY sequence)"
    )
    for first in range(0, len(sequences), _SEQUENCES):
        some = sequences[first : first + _SEQUENCES]
        found = store.database.columns(sql, [int(some[0]), int(some[-1])])
        yield found["document"], found["keep"].astype(bool)


def select_documents(documents: Documents, group: str, where: str) -> NDArray[np.bool_]:
    """Which documents [n] a group names: "title:*river*|*lake*", "topic:Arts", "split:train".

    Patterns are as those of file names (* any text, ? any character, [ab]), several separated by
    |; upper and lower case are alike. Documents without a kept position are in no group.

    Raises InputError for a group written otherwise, or one that no document is in, and for topics
    or sources where the store has none.
    """
    kind, _, pattern = group.partition(":")
    kind = kind.strip()
    if group.strip() == ALL:
        chosen = np.ones(len(documents.number), dtype=bool)
    elif kind == "split" and pattern.strip() in SPLITS:
        chosen = documents.split == SPLITS.index(pattern.strip())
    elif kind in ("title", "key") and pattern.strip():
        chosen = matching(documents.title if kind == "title" else documents.key, pattern)
    elif kind in GROUP_KINDS:
        chosen = matching(_names(documents, kind, group, where), pattern)
        if not chosen.any():
            known = sorted({name for name in _names(documents, kind, group, where) if name})
            more = f" and {len(known) - _MOST_NAMES} more" if len(known) > _MOST_NAMES else ""
            allowed = ", ".join(known[:_MOST_NAMES]) + more
            raise InputError(f"no such {kind}", where=where, given=group, allowed=allowed)
    else:
        raise InputError("no group of documents", where=where, given=group, allowed=GROUPS)
    chosen &= documents.kept > 0
    if not chosen.any():
        raise InputError("no document is in this group", where=where, given=group)
    return chosen


def matching(texts: Sequence[str | None], pattern: str) -> NDArray[np.bool_]:
    """Which of these texts fit one of the patterns, which are separated by |.

    >>> matching(["Arts", "Science", None], "art?|sport").tolist()
    [True, False, False]
    """
    parts = [translate(part.strip()) for part in pattern.split("|") if part.strip()]
    matches = re.compile("|".join(parts) or r"(?!)", re.IGNORECASE).match
    return np.array([text is not None and matches(text) is not None for text in texts], dtype=bool)


def _names(documents: Documents, kind: str, group: str, where: str) -> Sequence[str | None]:
    """Each document's topic or source; InputError for a store that has none."""
    if documents.groups is None:
        raise InputError(
            f"the store was built by an older saescope, without the {kind}s of documents; "
            "`saescope index RUN --out FOLDER --replace` builds it anew, and labels stay",
            where=where,
            given=group,
        )
    if kind not in documents.groups:
        raise InputError(
            f"the store's documents are not of several {kind}s that it knows; group them by title "
            "or key",
            where=where,
            given=group,
        )
    return documents.groups[kind]
