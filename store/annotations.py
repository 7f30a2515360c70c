"""People's labels, notes and lists about a store's features, in a small SQLite file beside it."""

import sqlite3
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from saescope.artefact import check_schema
from saescope.errors import ArtefactError, InputError
from store.database import FILE_NAME

SCHEMA = 1
FAVOURITES = "favourites"
_MAX_LABEL = 200
_MAX_NOTE = 20_000

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE annotation (
    feature INTEGER PRIMARY KEY, label TEXT NOT NULL, note TEXT NOT NULL, changed TEXT NOT NULL
);
CREATE VIRTUAL TABLE annotation_text USING fts5(
    label, note, content='annotation', content_rowid='feature',
    tokenize='unicode61 remove_diacritics 2', prefix='2 3'
);
CREATE TRIGGER annotation_added AFTER INSERT ON annotation BEGIN
    INSERT INTO annotation_text(rowid, label, note) VALUES (new.feature, new.label, new.note);
END;
CREATE TRIGGER annotation_removed AFTER DELETE ON annotation BEGIN
    INSERT INTO annotation_text(annotation_text, rowid, label, note)
        VALUES ('delete', old.feature, old.label, old.note);
END;
CREATE TRIGGER annotation_changed AFTER UPDATE ON annotation BEGIN
    INSERT INTO annotation_text(annotation_text, rowid, label, note)
        VALUES ('delete', old.feature, old.label, old.note);
    INSERT INTO annotation_text(rowid, label, note) VALUES (new.feature, new.label, new.note);
END;
CREATE TABLE list_member (
    list TEXT NOT NULL, feature INTEGER NOT NULL, added TEXT NOT NULL, PRIMARY KEY (list, feature)
);
"""


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
    file = path / FILE_NAME if path.is_dir() else path
    return file.with_name(f"{file.stem}.annotations.sqlite")


class Annotations:
    """Labels, notes and lists of one store's features; safe to use from several threads.

    The file is made by the first change, and remembers which SAE it is about. Where it cannot be
    written, reading works and a change raises ArtefactError; `read_only` says which.

    >>> with Annotations.open("stores/demo") as notes:  # doctest: +SKIP
    ...     notes.set_label(123, "weather")
    ...     notes.search("weath")
    """

    def __init__(
        self, path: Path, con: sqlite3.Connection | None, *, writable: bool, sae_hash: str = ""
    ) -> None:
        self.path = path
        self._sae_hash = sae_hash
        self.read_only = not writable
        self._con = con
        self._lock = threading.RLock()

    @classmethod
    def open(cls, store_path: str | Path, *, sae_hash: str = "") -> "Annotations":
        """Open the annotations of a store.

        Raises ArtefactError if the file beside the store is damaged, of a newer version, or about
        another SAE than the one with this hash: its labels would stand at the wrong features.
        """
        path = annotations_file(store_path)
        if not path.exists():
            return cls(path, None, writable=_can_create(path.parent), sae_hash=sae_hash)
        con, writable = _connect(path, sae_hash=sae_hash)
        return cls(path, con, writable=writable, sae_hash=sae_hash)

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

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock:
            if self._con is None and self.path.exists():  # another process has made it since
                self._con, _ = _connect(self.path, sae_hash=self._sae_hash)
            return [] if self._con is None else self._con.execute(sql, values).fetchall()

    def _change(self, sql: str, values: Sequence[Any]) -> None:
        with self._lock:
            refused = ArtefactError(
                "labels and notes cannot be saved: the file or its folder is read-only",
                where=str(self.path),
            )
            if self.read_only:
                raise refused
            try:
                if self._con is None:
                    self._con, _ = _connect(self.path, create=True, sae_hash=self._sae_hash)
                with self._con:
                    self._con.execute(sql, values)
            except sqlite3.OperationalError as error:
                if "readonly" in str(error) or "unable to open" in str(error):
                    raise refused from error
                raise ArtefactError(
                    f"labels and notes cannot be saved: {error}", where=str(self.path)
                ) from error

    def get(self, feature: int) -> Annotation:
        """A feature's label and note."""
        rows = self._rows("SELECT label, note FROM annotation WHERE feature = ?", [feature])
        return Annotation(feature, *(rows[0] if rows else ("", "")))

    def labels(self, features: Sequence[int] | None = None) -> dict[int, str]:
        """The labels of these features (all without), where there are any."""
        sql = "SELECT feature, label FROM annotation WHERE label <> ''"
        if features is None:
            return dict(self._rows(f"{sql} ORDER BY feature"))
        found: dict[int, str] = {}
        for begin in range(0, len(features), 500):
            part = [int(feature) for feature in features[begin : begin + 500]]
            marks = ", ".join("?" * len(part))
            found.update(self._rows(f"{sql} AND feature IN ({marks})", part))
        return found

    def set_label(self, feature: int, label: str) -> None:
        """Write a feature's label, one line; an empty one removes it."""
        self._write(feature, "label", " ".join(label.split()), _MAX_LABEL)

    def set_note(self, feature: int, note: str) -> None:
        """Write a feature's note; an empty one removes it."""
        self._write(feature, "note", note.strip(), _MAX_NOTE)

    def _write(self, feature: int, column: str, text: str, longest: int) -> None:
        _check_feature(feature)
        if len(text) > longest:
            raise InputError(
                "is too long", where=column, given=f"{len(text)} characters",
                allowed=f"at most {longest}",
            )  # fmt: skip
        label, note = (text, "") if column == "label" else ("", text)
        self._change(
            "INSERT INTO annotation VALUES (?, ?, ?, ?) ON CONFLICT (feature) DO UPDATE"
            f" SET {column} = excluded.{column}, changed = excluded.changed",
            [int(feature), label, note, _now()],
        )

    def search(self, text: str, limit: int = 10_000) -> list[int]:
        """Features whose label or note has all the words, or words that begin so; best first."""
        words = [word for word in _words(text) if word]
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
        _check_feature(feature)
        if not name.strip() or len(name) > _MAX_LABEL:
            raise InputError("a list needs a name of 1 to 200 characters", where="list", given=name)
        self._change(
            "INSERT OR IGNORE INTO list_member VALUES (?, ?, ?)", [name.strip(), feature, _now()]
        )

    def remove_from_list(self, feature: int, name: str = FAVOURITES) -> None:
        """Take a feature off a list."""
        self._change("DELETE FROM list_member WHERE list = ? AND feature = ?", [name, feature])

    def members(self, name: str = FAVOURITES) -> list[int]:
        """The features on a list, in the order they were added."""
        sql = "SELECT feature FROM list_member WHERE list = ? ORDER BY added, feature"
        return [row[0] for row in self._rows(sql, [name])]

    def lists(self) -> dict[str, int]:
        """The lists' names and sizes."""
        sql = "SELECT list, count(*) FROM list_member GROUP BY list ORDER BY list"
        return dict(self._rows(sql))


def _check_feature(feature: int) -> None:
    if feature < 0:
        raise InputError("no such feature", where="feature", given=feature, allowed="0 and more")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text).split()


def _can_create(folder: Path) -> bool:
    """Whether a file can be made there; asked of the file system itself."""
    probe = folder / f".annotations-probe-{threading.get_ident()}"
    try:
        probe.touch()
    except OSError:
        return False
    probe.unlink(missing_ok=True)
    return True


def _connect(
    path: Path, *, create: bool = False, sae_hash: str = ""
) -> tuple[sqlite3.Connection, bool]:
    mode = "rwc" if create else "rw"
    for attempt in (mode, "ro"):
        con = None
        try:
            con = sqlite3.connect(
                f"{path.resolve().as_uri()}?mode={attempt}",
                uri=True,
                timeout=10,
                check_same_thread=False,
            )
            _prepare(con, path, writable=attempt != "ro", sae_hash=sae_hash)
            return con, attempt != "ro"
        except ArtefactError:
            if con is not None:
                con.close()
            raise
        except sqlite3.DatabaseError as error:
            if con is not None:
                con.close()
            if create or attempt == "ro":
                raise ArtefactError(
                    f"cannot be read as annotations: {error}", where=str(path)
                ) from error
    raise AssertionError("unreachable")


def _prepare(con: sqlite3.Connection, path: Path, *, writable: bool, sae_hash: str) -> None:
    """Make the tables where the file is empty; check the version and the SAE."""
    if writable:
        # takes the write lock: says at once whether the file may be written, and lets one of
        # several processes make the tables
        con.execute("BEGIN IMMEDIATE")
        if not con.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            for statement in _statements(_TABLES):
                con.execute(statement)
            values = [("schema", str(SCHEMA)), ("sae_hash", sae_hash)]
            con.executemany("INSERT INTO meta VALUES (?, ?)", values)
        con.commit()
        con.execute("UPDATE meta SET value = value")  # fails where the file is read-only
        con.rollback()
    found = dict(con.execute("SELECT key, value FROM meta"))
    number = None
    with suppress(KeyError, ValueError):
        number = int(found["schema"])
    check_schema(number, supported=SCHEMA, where=str(path))
    if sae_hash and found.get("sae_hash") and found["sae_hash"] != sae_hash:
        raise ArtefactError(
            "these labels and notes are about another SAE; move the file away to start new ones",
            where=str(path),
        )


def _statements(script: str) -> list[str]:
    """The script's statements: executescript would commit, and so let two writers in."""
    found, part = [], ""
    for line in script.splitlines(keepends=True):
        part += line
        if sqlite3.complete_statement(part):
            found.append(part)
            part = ""
    return found
