"""The SQLite file of annotations: its tables, and opening one safely.

An SQLite file of unknown origin can hold triggers and views, which run SQL when its tables are
changed or read. A file is opened only if its triggers are exactly ours and it has no views. SQLite
has no checksums: `meta` has one of all texts and lists, which each change updates and which
`saescope doctor` compares.
"""

import functools
import hashlib
import json
import sqlite3
import time
from contextlib import suppress
from pathlib import Path

from saescope.artefact import SEAL, check_schema, sha256_json
from saescope.errors import ArtefactError

SCHEMA = 2
MACHINE_SEAL = "machine_sha256"
"""the fact that is the checksum of the machines' labels"""
LONGEST_DETAILS = 20_000
LONGEST_LABEL = 200
LONGEST_NOTE = 20_000
_TIMEOUT = 10.0
_STEPS = 100_000
_SECONDS = 60.0
_INDEX = "annotation_text_"
_META = ("table", "meta")

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
_ADDED = """
CREATE TABLE tag (
    feature INTEGER NOT NULL, tag TEXT NOT NULL, added TEXT NOT NULL, PRIMARY KEY (feature, tag)
);
CREATE TABLE vote (
    feature INTEGER NOT NULL, who TEXT NOT NULL, value INTEGER NOT NULL, changed TEXT NOT NULL,
    PRIMARY KEY (feature, who)
);
CREATE TABLE history (
    id INTEGER PRIMARY KEY, at TEXT NOT NULL, who TEXT NOT NULL, feature INTEGER NOT NULL,
    what TEXT NOT NULL, before TEXT NOT NULL, after TEXT NOT NULL
);
CREATE INDEX history_of_feature ON history (feature);
CREATE TABLE machine_label (
    feature INTEGER NOT NULL, method TEXT NOT NULL, label TEXT NOT NULL, score REAL,
    details TEXT NOT NULL, made TEXT NOT NULL, PRIMARY KEY (feature, method)
);
"""
"""what schema 2 has besides"""
# ANALYZE, which changes nothing of what is in a file, makes tables of its own
_OBJECTS = """
SELECT type, name, tbl_name, sql FROM sqlite_master
WHERE NOT (type = 'table' AND name IN ('sqlite_stat1', 'sqlite_stat4'))
"""
_WRONG_ROWS = f"""
SELECT (SELECT count(*) FROM annotation WHERE feature < 0
        OR typeof(label) <> 'text' OR typeof(note) <> 'text'
        OR length(label) > {LONGEST_LABEL} OR length(note) > {LONGEST_NOTE})
     + (SELECT count(*) FROM list_member WHERE typeof(feature) <> 'integer' OR feature < 0
        OR typeof(list) <> 'text' OR length(list) > {LONGEST_LABEL})
"""
_WRONG_ADDED_ROWS = f"""
SELECT (SELECT count(*) FROM tag WHERE typeof(feature) <> 'integer' OR feature < 0
        OR typeof(tag) <> 'text' OR length(tag) > {LONGEST_LABEL})
     + (SELECT count(*) FROM vote WHERE typeof(feature) <> 'integer' OR feature < 0
        OR typeof(who) <> 'text' OR value NOT IN (-1, 1))
     + (SELECT count(*) FROM history WHERE typeof(feature) <> 'integer' OR typeof(before) <> 'text'
        OR typeof(after) <> 'text' OR length(before) > {LONGEST_NOTE}
        OR length(after) > {LONGEST_NOTE})
     + (SELECT count(*) FROM machine_label WHERE typeof(feature) <> 'integer' OR feature < 0
        OR typeof(label) <> 'text' OR length(label) > {LONGEST_LABEL}
        OR typeof(details) <> 'text' OR length(details) > {LONGEST_DETAILS}
        OR typeof(score) NOT IN ('real', 'null'))
"""
_SEALED = (
    "SELECT feature, label, note, changed FROM annotation ORDER BY feature",
    "SELECT list, feature, added FROM list_member ORDER BY list, feature",
)
_SEALED_ADDED = (
    "SELECT feature, tag, added FROM tag ORDER BY feature, tag",
    "SELECT feature, who, value, changed FROM vote ORDER BY feature, who",
    "SELECT id, at, who, feature, what, before, after FROM history ORDER BY id",
)
_MACHINES = "SELECT feature, method, label, score, details, made FROM machine_label ORDER BY 1, 2"


def connect(
    path: Path, *, create: bool = False, sae_hash: str = ""
) -> tuple[sqlite3.Connection, bool]:
    """Open a file of annotations; returns the connection, and whether the file is writable.

    A missing file is made with `create`. A file that another program is writing at the moment
    counts as writable. Raises ArtefactError if it is damaged, not a file of annotations, of a newer
    version, or about another SAE.
    """
    mode = "rwc" if create else "rw"
    for attempt in (mode, "ro"):
        con = None
        try:
            con = sqlite3.connect(
                f"{path.resolve().as_uri()}?mode={attempt}",
                uri=True,
                timeout=_TIMEOUT,
                check_same_thread=False,
                isolation_level=None,
            )
            _guard(con)
            writable = attempt != "ro" and _may_write(con)
            if writable and not con.execute(_OBJECTS).fetchall():
                _make(con, sae_hash)
            _check(con, path, sae_hash=sae_hash)
            con.execute("PRAGMA trusted_schema = ON")  # our own triggers write the index of words
        except BaseException as error:
            if con is not None:
                con.close()
            if not isinstance(error, sqlite3.DatabaseError | UnicodeDecodeError):
                raise
            if attempt == "ro" or (create and "readonly" not in str(error)):
                raise ArtefactError(
                    f"cannot be read as annotations: {one_line(error)}", where=str(path)
                ) from error
        else:
            return con, writable
    raise AssertionError("unreachable")


def one_line(error: Exception) -> str:
    """SQLite's message, shortened to one line: it may quote a damaged file."""
    return " ".join(str(error).split())[:200]


def limit_time(con: sqlite3.Connection) -> None:
    """Interrupt the next query if it takes longer than any query of a proper file."""
    ends = time.monotonic() + _SECONDS
    con.set_progress_handler(lambda: time.monotonic() > ends, _STEPS)


def _guard(con: sqlite3.Connection) -> None:
    """Settings that keep SQL in the file from having effects, or from running for ever."""
    limit_time(con)
    con.execute("PRAGMA trusted_schema = OFF")
    con.execute("PRAGMA cell_size_check = ON")
    setconfig = getattr(con, "setconfig", None)
    if setconfig is not None:  # Python 3.12
        setconfig(vars(sqlite3)["SQLITE_DBCONFIG_DEFENSIVE"], True)


def _may_write(con: sqlite3.Connection) -> bool:
    """Whether the file can be changed; tried with a change that is rolled back."""
    con.execute("PRAGMA busy_timeout = 0")
    try:
        con.execute("BEGIN IMMEDIATE")
        con.execute("PRAGMA user_version = 0")
    except sqlite3.OperationalError as error:
        if "readonly" not in str(error) and "locked" not in str(error):
            raise
        return "locked" in str(error)
    finally:
        if con.in_transaction:
            con.execute("ROLLBACK")
        con.execute(f"PRAGMA busy_timeout = {int(1000 * _TIMEOUT)}")
    return True


def _make(con: sqlite3.Connection, sae_hash: str, schema: int = SCHEMA) -> None:
    """Make the tables, unless another process has just made them."""
    con.execute("BEGIN IMMEDIATE")
    try:
        if not con.execute(_OBJECTS).fetchall():
            for statement in _statements(_TABLES + (_ADDED if schema > 1 else "")):
                con.execute(statement)
            values = [("schema", str(schema)), ("sae_hash", sae_hash)]
            con.executemany("INSERT INTO meta VALUES (?, ?)", values)
            seal(con)
    except BaseException:
        con.execute("ROLLBACK")
        raise
    con.execute("COMMIT")


def schema_of(con: sqlite3.Connection) -> int:
    """The version of a file that has been checked; another process may have brought it up."""
    return int(con.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()[0])


def bring_up(con: sqlite3.Connection) -> None:
    """Give a file of an older version the tables of this one, within a transaction."""
    if schema_of(con) < SCHEMA:
        for statement in _statements(_ADDED):
            con.execute(statement)
        con.execute("UPDATE meta SET value = ? WHERE key = 'schema'", [str(SCHEMA)])


def is_sealed(con: sqlite3.Connection, *, machines: bool = False) -> bool:
    """Whether a file's content matches its checksum; with `machines`, the machines' labels as well.

    True for a file of a version without checksums, which has only two facts.
    """
    found = _facts(con)
    if found.keys() == {"schema", "sae_hash"}:
        return True
    if found.get(SEAL) != _content(con, found):
        return False
    return not machines or MACHINE_SEAL not in found or found[MACHINE_SEAL] == _machines(con)


def seal(con: sqlite3.Connection, *, machines: bool = False) -> None:
    """Save the checksum of a file's content, in the transaction that has changed it.

    machines: the machines' labels have changed; they are many, and have a checksum of their own.
    """
    if machines:
        con.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", [MACHINE_SEAL, _machines(con)])
    con.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", [SEAL, _content(con, _facts(con))])


def _facts(con: sqlite3.Connection) -> dict[str, str]:
    return dict(con.execute("SELECT key, value FROM meta LIMIT 100"))


def _content(con: sqlite3.Connection, facts: dict[str, str]) -> str:
    begin = sha256_json({k: v for k, v in facts.items() if k != SEAL})
    more = _SEALED_ADDED if facts.get("schema") != "1" else ()
    return _digest(con, begin, *_SEALED, *more)


def _machines(con: sqlite3.Connection) -> str:
    return _digest(con, "", _MACHINES)


def _digest(con: sqlite3.Connection, begin: str, *queries: str) -> str:
    digest = hashlib.sha256(begin.encode())
    for sql in queries:
        for row in con.execute(sql):
            digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def _check(con: sqlite3.Connection, path: Path, *, sae_hash: str) -> None:
    """Raise ArtefactError unless these are annotations of this version, about this SAE."""
    where = str(path)
    objects = _described(con)
    if objects.get(_META) != _own_objects(SCHEMA)[_META]:
        raise ArtefactError("cannot be read as annotations: it has no table of facts", where=where)
    found = _facts(con)
    number = None
    with suppress(KeyError, ValueError, TypeError):
        number = int(found["schema"])
    check_schema(number, supported=SCHEMA, where=where)
    own = _own_objects(number or SCHEMA)
    for key in sorted(own.keys() | objects.keys()):
        if own.get(key) != objects.get(key):
            raise ArtefactError(
                "cannot be read as annotations: it has in it what saescope has not put there, or"
                " lacks what it has",
                where=where,
                given=" ".join(key)[:80],
            )
    checks = [_WRONG_ROWS] if number == 1 else [_WRONG_ROWS, _WRONG_ADDED_ROWS]
    if any(con.execute(sql).fetchone()[0] for sql in checks):
        raise ArtefactError("damaged: texts or features that no annotations have", where=where)
    if sae_hash and found.get("sae_hash") and found["sae_hash"] != sae_hash:
        raise ArtefactError(
            "these labels and notes are about another SAE; move the file away to start new ones",
            where=where,
        )


def _described(con: sqlite3.Connection) -> dict[tuple[str, str], tuple[str, str]]:
    """Of everything in a file, by (kind, name): the table it belongs to, and its SQL.

    The SQL of the tables of the full-text index is left out: SQLite makes them by itself.
    """
    return {
        (kind, name): (table, "" if name.startswith(_INDEX) else " ".join((sql or "").split()))
        for kind, name, table, sql in con.execute(_OBJECTS)
    }


@functools.cache
def _own_objects(schema: int) -> dict[tuple[str, str], tuple[str, str]]:
    con = sqlite3.connect(":memory:", isolation_level=None)
    try:
        _make(con, "", schema)
        return _described(con)
    finally:
        con.close()


def _statements(script: str) -> list[str]:
    """The script's statements, one by one: executescript would commit in between."""
    found, statement = [], ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            found.append(statement)
            statement = ""
    return found
