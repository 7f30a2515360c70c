"""People's labels, notes and lists about a store's features, in a small SQLite file beside it."""

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from saescope.errors import ArtefactError, InputError
from saescope.integers import as_index, as_indices
from store import annotation_file
from store.annotation_file import LONGEST_LABEL, LONGEST_NOTE
from store.database import STORE_FILE

FAVOURITES = "favourites"
_LARGEST = 2**31 - 1
_Answer = TypeVar("_Answer")


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


def annotations_file(store_path: str | Path) -> Path:
    """The annotations file of a store (its file, or its folder).

    >>> annotations_file("stores/demo/features.duckdb").name
    'features.annotations.sqlite'
    """
    path = Path(store_path)
    file = path / STORE_FILE if path.is_dir() else path
    return file.with_name(f"{file.stem}.annotations.sqlite")


class Annotations:
    """Labels, notes and lists of one store's features; safe to use from several threads.

    The file is made by the first change, and remembers which SAE it is about. Where it cannot be
    written, reading works and a change raises ArtefactError; `read_only` says which. A file that
    was replaced or taken away since is opened anew.

    >>> with Annotations.open("stores/demo") as notes:  # doctest: +SKIP
    ...     notes.set_label(123, "weather")
    ...     notes.search("weath")
    """

    def __init__(self, path: Path, *, sae_hash: str = "") -> None:
        self.path = path
        self.read_only = False
        self._sae_hash = sae_hash
        self._con: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._lock = threading.RLock()

    @classmethod
    def open(cls, store_path: str | Path, *, sae_hash: str = "") -> "Annotations":
        """Open the annotations of a store; files of unknown origin are safe to open.

        Raises ArtefactError if the file beside the store is damaged, of a newer version, contains
        anything that such a file does not, or is about another SAE than the one with this hash,
        whose features its labels would not fit.
        """
        notes = cls(annotations_file(store_path), sae_hash=sae_hash)
        with notes._lock:
            if notes._connection() is None:
                notes.read_only = not _can_create(notes.path.parent)
        return notes

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._con is not None:
                self._con.close()
                self._con = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _connection(self, *, create: bool = False) -> sqlite3.Connection | None:
        """The connection to the file that is there now; None if there is none."""
        there = _identity(self.path)
        if there != self._file:
            self.close()
        if self._con is None and (there is not None or create):
            self._con, writable = annotation_file.connect(
                self.path, create=create, sae_hash=self._sae_hash
            )
            self.read_only = not writable
            self._file = _identity(self.path)
        return self._con

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except UnicodeEncodeError as error:
            raise InputError("has characters that are no text", where="text") from error
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise ArtefactError(
                f"labels and notes cannot be {doing}: {_reason(error)}", where=str(self.path)
            ) from error

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock, self._errors("read"):
            con = self._connection()
            if con is None:
                return []
            annotation_file.limit_time(con)
            return con.execute(sql, values).fetchall()

    def _change(self, work: Callable[[sqlite3.Connection], _Answer]) -> _Answer:
        """Do `work` in one transaction; returns its answer."""
        with self._lock, self._errors("saved"):
            if self.read_only and self._connection() is None:
                raise ArtefactError(
                    f"labels and notes cannot be saved: {_READ_ONLY}", where=str(self.path)
                )
            con = self._connection(create=True)
            assert con is not None
            annotation_file.limit_time(con)
            con.execute("BEGIN IMMEDIATE")
            try:
                sealed = annotation_file.is_sealed(con)
                answer = work(con)
                if sealed:  # else the doctor goes on saying what is damaged
                    annotation_file.seal(con)
                con.execute("COMMIT")
            except BaseException:
                if con.in_transaction:
                    con.execute("ROLLBACK")
                raise
            return answer

    def get(self, feature: int) -> Annotation:
        """A feature's label and note."""
        number = _feature(feature)
        rows = self._rows("SELECT label, note FROM annotation WHERE feature = ?", [number])
        return Annotation(number, *(rows[0] if rows else ("", "")))

    def labels(self, features: Sequence[int] | None = None) -> dict[int, str]:
        """The labels of these features (all without), where there are any."""
        sql = "SELECT feature, label FROM annotation WHERE label <> ''"
        if features is None:
            return dict(self._rows(f"{sql} ORDER BY feature"))
        numbers = as_indices(features, where="features", low=0, high=_LARGEST)
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
        number = _feature(feature)
        text = _text(column, given)
        wanted = None if seen is None else _text(column, seen)
        label, note = (text, "") if column == "label" else ("", text)

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
            con.execute(
                "INSERT INTO annotation VALUES (?, ?, ?, ?) ON CONFLICT (feature) DO UPDATE"
                f" SET {column} = excluded.{column}, changed = excluded.changed",
                [number, label, note, _now()],
            )

        self._change(write)

    def search(self, text: str, limit: int = 10_000) -> list[int]:
        """Features in whose label or note each word is the beginning of some word; best first."""
        limit = as_index(limit, where="limit", low=0, high=_LARGEST)
        words = _words(text)
        if not words:
            return []
        query = " AND ".join(f'"{word}"*' for word in words)
        rows = self._rows(
            "SELECT rowid FROM annotation_text WHERE annotation_text MATCH ?"
            " ORDER BY bm25(annotation_text, 4.0, 1.0), rowid LIMIT ?",
            [query, limit],
        )
        return [row[0] for row in rows]

    def add_to_list(self, feature: int, name: str = FAVOURITES) -> None:
        """Put a feature on a list."""
        values = [_list_name(name), _feature(feature), _now()]
        sql = "INSERT OR IGNORE INTO list_member VALUES (?, ?, ?)"
        self._change(lambda con: con.execute(sql, values))

    def remove_from_list(self, feature: int, name: str = FAVOURITES) -> None:
        """Take a feature off a list."""
        values = [_list_name(name), _feature(feature)]
        sql = "DELETE FROM list_member WHERE list = ? AND feature = ?"
        self._change(lambda con: con.execute(sql, values))

    def members(self, name: str = FAVOURITES) -> list[int]:
        """The features on a list, in the order they were added."""
        sql = "SELECT feature FROM list_member WHERE list = ? ORDER BY added, feature"
        return [row[0] for row in self._rows(sql, [_list_name(name)])]

    def lists(self) -> dict[str, int]:
        """The lists' names and sizes."""
        sql = "SELECT list, count(*) FROM list_member GROUP BY list ORDER BY list"
        return dict(self._rows(sql))


_READ_ONLY = "the file or its folder is read-only"


def _reason(error: Exception) -> str:
    """SQLite's message in words that say what to do."""
    text = str(error)
    if "readonly" in text or "unable to open" in text:
        return _READ_ONLY
    if "is full" in text:
        return "the disk is full; free some space"
    if "locked" in text:
        return "another program has the file in use; try again when it is done"
    return annotation_file.one_line(error)


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of the file at a path; None if there is none."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


def _feature(feature: int) -> int:
    number = as_index(feature, where="feature")
    if not 0 <= number <= _LARGEST:
        raise InputError("no such feature", where="feature", given=number, allowed="0 and more")
    return number


def _text(column: str, given: str) -> str:
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


def _list_name(name: str) -> str:
    if not isinstance(name, str) or not name.strip() or len(name) > LONGEST_LABEL:
        raise InputError("a list needs a name of 1 to 200 characters", where="list", given=name)
    return name.strip()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text).split()


def _can_create(folder: Path) -> bool:
    """Whether a file can be made in a folder; tried, as permissions do not tell."""
    probe = folder / f".annotations-probe-{os.getpid()}-{threading.get_ident()}"
    try:
        probe.touch()
    except OSError:
        return False
    probe.unlink(missing_ok=True)
    return True
