"""The open file of annotations: one connection, used by several threads, in short transactions."""

import getpass
import hashlib
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from saescope.artefact import MANIFEST
from saescope.errors import ArtefactError, InputError
from saescope.integers import as_index
from saescope.paths import AnyPath, as_path, if_local
from store import annotation_file
from store.database import STORE_FILE

LARGEST = 2**31 - 1
SUFFIX = ".annotations.sqlite"
_Answer = TypeVar("_Answer")


def annotations_file(store_path: str | AnyPath) -> Path:
    """The annotations file of a store (its file, or its folder): beside it.

    Of a store in Parquet it lies beside the folder, which may be replaced whole; of one in an
    object store in the user's data folder on this machine, $XDG_DATA_HOME or ~/.local/share.

    >>> annotations_file("stores/demo/features.duckdb").name
    'features.annotations.sqlite'
    >>> annotations_file("stores/large/manifest.json").as_posix()
    'stores/large.annotations.sqlite'
    """
    path = as_path(store_path)
    if not isinstance(path, Path):
        folder = path.parent if path.name == MANIFEST else path
        number = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
        home = Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser()
        return home / "saescope" / f"{folder.name}-{number}.annotations.sqlite"
    file = path
    if path.is_dir():
        in_parquet = not (path / STORE_FILE).exists() and (path / MANIFEST).exists()
        file = path / (MANIFEST if in_parquet else STORE_FILE)
    if file.name == MANIFEST:
        folder = file.parent if file.parent.name else file.parent.resolve()
        return folder.with_name(f"{folder.name}{SUFFIX}")
    return file.with_name(f"{file.stem}{SUFFIX}")


class AnnotationBase:
    """An open file of annotations; `Annotations` adds what can be asked and changed."""

    def __init__(self, path: Path, *, sae_hash: str = "", who: str | None = None) -> None:
        self.path = path
        self.read_only = False
        self.who = (who or _user())[: annotation_file.LONGEST_LABEL]
        self._sae_hash = sae_hash
        self._con: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._lock = threading.RLock()

    @classmethod
    def open(cls, store_path: str | AnyPath, *, sae_hash: str = "", who: str | None = None) -> Self:
        """Open the annotations of a store; files of unknown origin are safe to open.

        who: the name that changes are recorded under; the system's user if not given.

        Raises ArtefactError if the file beside the store is damaged, of a newer version, contains
        anything that such a file does not, or is about another SAE than the one with this hash,
        whose features its labels would not fit.
        """
        notes = cls(annotations_file(store_path), sae_hash=sae_hash, who=who)
        with notes._lock:
            if if_local(store_path) is None:  # its folder is ours
                with suppress(OSError):
                    notes.path.parent.mkdir(parents=True, exist_ok=True)
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

    def _rows_added(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        """Rows of a table that files of schema 1 have not; none of such a file."""
        with self._lock, self._errors("read"):
            con = self._connection()
            if con is None or annotation_file.schema_of(con) < annotation_file.SCHEMA:
                return []
            return self._rows(sql, values)

    def _change(
        self, work: Callable[[sqlite3.Connection], _Answer], *, machines: bool = False
    ) -> _Answer:
        """Do `work` in one transaction, and return its answer.

        machines: it changes the machines' labels.
        """
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
                sealed = annotation_file.is_sealed(con, machines=machines)
                annotation_file.bring_up(con)
                answer = work(con)
                if sealed:  # else the doctor goes on saying what is damaged
                    annotation_file.seal(con, machines=machines)
                con.execute("COMMIT")
            except BaseException:
                if con.in_transaction:
                    con.execute("ROLLBACK")
                raise
            return answer


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


def _can_create(folder: Path) -> bool:
    """Whether a file can be made in a folder; tried, as permissions do not tell."""
    probe = folder / f".annotations-probe-{os.getpid()}-{threading.get_ident()}"
    try:
        probe.touch()
    except OSError:
        return False
    probe.unlink(missing_ok=True)
    return True


def _user() -> str:
    """The system's user, "somebody" where it has none."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return "somebody"


def feature_number(feature: int) -> int:
    """A feature's number; InputError for what is none."""
    number = as_index(feature, where="feature")
    if not 0 <= number <= LARGEST:
        raise InputError("no such feature", where="feature", given=number, allowed="0 and more")
    return number


def now() -> str:
    """The time in UTC, as ISO 8601 writes it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")
