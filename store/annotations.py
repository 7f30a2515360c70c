"""People's labels, notes and lists about a store's features, in a small SQLite file beside it."""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from saescope.errors import InputError
from saescope.integers import as_index, as_indices
from store.annotation_base import LARGEST, annotations_file, feature_number, now
from store.annotation_file import LONGEST_LABEL, LONGEST_NOTE
from store.machine_labels import MachineLabels

__all__ = ["FAVOURITES", "Annotation", "Annotations", "Change", "ChangedError", "annotations_file"]

FAVOURITES = "favourites"


class ChangedError(InputError):
    """Somebody else has changed a text since it was read; `found` is the text as it is now."""

    def __init__(self, what: str, *, where: str, found: str, given: str) -> None:
        super().__init__(what, where=where, given=given)
        self.found = found


@dataclass(frozen=True)
class Annotation:
    """What somebody wrote about a feature; empty texts where nothing was written."""

    feature: int
    label: str
    note: str


@dataclass(frozen=True)
class Change:
    """One change that somebody made."""

    at: str
    """time, in UTC, as ISO 8601 writes it"""
    who: str
    feature: int
    what: str
    """`label`, `note`, `vote`, `list NAME` or `tag NAME`"""
    before: str
    after: str
    """the text; of lists and tags `yes` or nothing, of votes 1, -1 or nothing"""


class Annotations(MachineLabels):
    """Labels, notes, lists, tags and votes of one store's features, and who changed what when.

    Safe to use from several threads and processes: each change is one transaction. The file is made
    by the first change, and remembers which SAE it is about. Where it cannot be written, reading
    works and a change raises ArtefactError; `read_only` says which. A file that was replaced or
    taken away since is opened anew.

    >>> with Annotations.open("stores/demo") as notes:  # doctest: +SKIP
    ...     notes.set_label(123, "weather")
    ...     notes.search("weath")
    """

    def get(self, feature: int) -> Annotation:
        """A feature's label and note."""
        [found] = self.get_several([feature]).values()
        return found

    def get_several(self, features: Sequence[int]) -> dict[int, Annotation]:
        """The labels and notes of these features."""
        numbers = [feature_number(feature) for feature in features]
        found = {number: Annotation(number, "", "") for number in numbers}
        for begin in range(0, len(numbers), 500):
            batch = numbers[begin : begin + 500]
            marks = ", ".join("?" * len(batch))
            sql = f"SELECT feature, label, note FROM annotation WHERE feature IN ({marks})"
            found.update((row[0], Annotation(*row)) for row in self._rows(sql, batch))
        return found

    def labels(self, features: Sequence[int] | None = None) -> dict[int, str]:
        """The labels of these features (all without), where there are any."""
        sql = "SELECT feature, label FROM annotation WHERE label <> ''"
        if features is None:
            return dict(self._rows(f"{sql} ORDER BY feature"))
        numbers = as_indices(features, where="features", low=0, high=LARGEST)
        found: dict[int, str] = {}
        for begin in range(0, len(numbers), 500):
            batch = numbers[begin : begin + 500]
            marks = ", ".join("?" * len(batch))
            found.update(self._rows(f"{sql} AND feature IN ({marks})", batch))
        return found

    def set_label(self, feature: int, label: str, *, seen: str | None = None) -> None:
        """Write a feature's label, one line; an empty one removes it.

        seen: the label that the writer had before them. Raises ChangedError, and changes nothing,
        if somebody has written another one since.
        """
        self._write(feature, "label", label, seen)

    def set_note(self, feature: int, note: str, *, seen: str | None = None) -> None:
        """Write a feature's note; an empty one removes it. `seen` is as in `set_label`."""
        self._write(feature, "note", note, seen)

    def _write(self, feature: int, column: str, given: str, seen: str | None) -> None:
        number = feature_number(feature)
        text = clean_text(column, given)
        wanted = None if seen is None else clean_text(column, seen)

        def write(con: sqlite3.Connection) -> None:
            sql = f"SELECT {column} FROM annotation WHERE feature = ?"
            found = (con.execute(sql, [number]).fetchone() or [""])[0]
            if wanted is not None and found not in (wanted, text):
                raise ChangedError(
                    f"somebody has changed it meanwhile, to {found!r}",
                    where=f"{column} of feature {number}",
                    given=text,
                    found=found,
                )
            self._set_text(con, number, column, found, text)

        self._change(write)

    def _set_text(
        self, con: sqlite3.Connection, number: int, column: str, found: str, text: str
    ) -> None:
        label, note = (text, "") if column == "label" else ("", text)
        con.execute(
            "INSERT INTO annotation VALUES (?, ?, ?, ?) ON CONFLICT (feature) DO UPDATE"
            f" SET {column} = excluded.{column}, changed = excluded.changed",
            [number, label, note, now()],
        )
        self._record(con, number, column, found, text)

    def _record(
        self, con: sqlite3.Connection, feature: int, what: str, before: str, after: str
    ) -> None:
        """Add a change to the history, if it is one."""
        if before != after:
            con.execute(
                "INSERT INTO history (at, who, feature, what, before, after)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                [now(), self.who, feature, what, before, after],
            )

    def history(self, feature: int | None = None, limit: int = 100) -> list[Change]:
        """The latest changes of a feature, or of all without one; the newest first."""
        limit = as_index(limit, where="limit", low=0, high=LARGEST)
        sql = "SELECT at, who, feature, what, before, after FROM history"
        values = [] if feature is None else [feature_number(feature)]
        where = "" if feature is None else " WHERE feature = ?"
        rows = self._rows_added(f"{sql}{where} ORDER BY id DESC LIMIT ?", [*values, limit])
        return [Change(*row) for row in rows]

    def texts(self) -> list[tuple[int, str]]:
        """All labels and notes, and then all machine labels, each with its feature."""
        sql = "SELECT feature, {0} FROM annotation WHERE {0} <> '' ORDER BY feature"
        written = [row for name in ("label", "note") for row in self._rows(sql.format(name))]
        sql = "SELECT feature, label FROM machine_label WHERE label <> '' ORDER BY feature"
        return [(int(row[0]), str(row[1])) for row in [*written, *self._rows_added(sql)]]

    def search(self, text: str, limit: int = 10_000) -> list[int]:
        """Features in whose label or note each word is the beginning of some word; best first.

        Those whose machine label has the words come after all that people wrote.
        """
        limit = as_index(limit, where="limit", low=0, high=LARGEST)
        words = _words(text)
        if not words:
            return []
        query = " AND ".join(f'"{word}"*' for word in words)
        rows = self._rows(
            "SELECT rowid FROM annotation_text WHERE annotation_text MATCH ?"
            " ORDER BY bm25(annotation_text, 4.0, 1.0), rowid LIMIT ?",
            [query, limit],
        )
        found = dict.fromkeys(row[0] for row in rows)
        found.update(dict.fromkeys(self.search_machine_labels(words)))
        return list(found)[:limit]

    def add_to_list(self, feature: int, name: str = FAVOURITES) -> None:
        """Put a feature on a list."""
        self._put("list_member", "list", feature, clean_name("list", name), wanted=True)

    def add_all_to_list(self, features: Sequence[int], name: str) -> int:
        """Put features on a list, all or none; how many of them were not on it before."""
        numbers = [feature_number(feature) for feature in features]
        clean, added = clean_name("list", name), 0

        def write(con: sqlite3.Connection) -> None:
            nonlocal added
            added = sum(
                self._set_member(con, "list_member", "list", number, clean, True)
                for number in dict.fromkeys(numbers)
            )

        self._change(write)
        return added

    def remove_from_list(self, feature: int, name: str = FAVOURITES) -> None:
        """Take a feature off a list."""
        self._put("list_member", "list", feature, clean_name("list", name), wanted=False)

    def _put(self, table: str, kind: str, feature: int, name: str, *, wanted: bool) -> None:
        """Put a feature on a list or under a tag, or take it off."""
        number = feature_number(feature)
        self._change(lambda con: self._set_member(con, table, kind, number, name, wanted))

    def _set_member(
        self, con: sqlite3.Connection, table: str, kind: str, number: int, name: str, wanted: bool
    ) -> bool:
        """Put on or take off; whether that changed anything."""
        where = f"FROM {table} WHERE feature = ? AND {kind} = ?"
        there = con.execute(f"SELECT count(*) {where}", [number, name]).fetchone()[0] > 0
        if there == wanted:
            return False
        if wanted:
            sql = f"INSERT INTO {table} (feature, {kind}, added) VALUES (?, ?, ?)"
            con.execute(sql, [number, name, now()])
        else:
            con.execute(f"DELETE {where}", [number, name])
        said = ("yes" if there else "", "yes" if wanted else "")
        self._record(con, number, f"{kind} {name}", *said)
        return True

    def members(self, name: str = FAVOURITES) -> list[int]:
        """The features on a list, in the order they were added."""
        sql = "SELECT feature FROM list_member WHERE list = ? ORDER BY added, feature"
        return [row[0] for row in self._rows(sql, [clean_name("list", name)])]

    def lists_of(self, feature: int) -> list[str]:
        """The names of the lists that a feature is on."""
        sql = "SELECT list FROM list_member WHERE feature = ? ORDER BY list"
        return [row[0] for row in self._rows(sql, [feature_number(feature)])]

    def lists(self) -> dict[str, int]:
        """The lists' names and sizes."""
        sql = "SELECT list, count(*) FROM list_member GROUP BY list ORDER BY list"
        return dict(self._rows(sql))

    def add_tag(self, feature: int, tag: str) -> None:
        """Put a tag on a feature."""
        self._put("tag", "tag", feature, clean_name("tag", tag), wanted=True)

    def remove_tag(self, feature: int, tag: str) -> None:
        """Take a tag off a feature."""
        self._put("tag", "tag", feature, clean_name("tag", tag), wanted=False)

    def tags(self, feature: int) -> list[str]:
        """A feature's tags, by name."""
        sql = "SELECT tag FROM tag WHERE feature = ? ORDER BY tag"
        return [row[0] for row in self._rows_added(sql, [feature_number(feature)])]

    def tagged(self, tag: str) -> list[int]:
        """The features with a tag, in order."""
        sql = "SELECT feature FROM tag WHERE tag = ? ORDER BY feature"
        return [row[0] for row in self._rows_added(sql, [clean_name("tag", tag)])]

    def all_tags(self) -> dict[str, int]:
        """The tags' names, and on how many features each is."""
        sql = "SELECT tag, count(*) FROM tag GROUP BY tag ORDER BY tag"
        return dict(self._rows_added(sql))

    def vote(self, feature: int, value: int) -> None:
        """Vote for (1) or against (-1) a feature's label, or take one's vote back (0).

        Each user has one vote a feature; a second replaces the first.
        """
        number, chosen = feature_number(feature), as_index(value, where="vote", low=-1, high=1)

        self._change(lambda con: self._set_vote(con, number, self.who, chosen))

    def _set_vote(self, con: sqlite3.Connection, number: int, who: str, value: int) -> None:
        theirs = [number, who]
        where = "WHERE feature = ? AND who = ?"
        found = con.execute(f"SELECT value FROM vote {where}", theirs).fetchone()
        con.execute(f"DELETE FROM vote {where}", theirs)
        if value:
            con.execute("INSERT INTO vote VALUES (?, ?, ?, ?)", [*theirs, value, now()])
        what = "vote" if who == self.who else f"vote of {who}"
        self._record(con, number, what, str(found[0]) if found else "", str(value or ""))

    def votes(self, feature: int) -> dict[str, int]:
        """Each user's vote on a feature's label: 1 or -1."""
        sql = "SELECT who, value FROM vote WHERE feature = ? ORDER BY who"
        return dict(self._rows_added(sql, [feature_number(feature)]))


def clean_text(column: str, given: str) -> str:
    """A label or a note as it is saved; InputError for what is none."""
    if not isinstance(given, str):
        raise InputError("is no text", where=column, given=type(given).__name__)
    text = " ".join(given.split()) if column == "label" else given.strip()
    longest = LONGEST_LABEL if column == "label" else LONGEST_NOTE
    if len(text) > longest:
        raise InputError(
            "is too long",
            where=column,
            given=f"{len(text)} characters",
            allowed=f"at most {longest}",
        )
    return text


def clean_name(kind: str, name: str) -> str:
    """The name of a list or a tag as it is saved; InputError for what is none."""
    if not isinstance(name, str) or not name.strip() or len(name) > LONGEST_LABEL:
        raise InputError(f"a {kind} needs a name of 1 to 200 characters", where=kind, given=name)
    return " ".join(name.split())


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text).split()
