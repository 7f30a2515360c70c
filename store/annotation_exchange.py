"""Annotations as JSON or CSV, and back: what somebody else wrote, merged with what is here.

JSON has everything: labels, notes, tags, lists, votes, the history, machines' labels. CSV has a row
a feature with its label, note, tags and lists; tags and lists are JSON.
"""

import csv
import io
import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from saescope.artefact import parse_json
from saescope.errors import InputError
from saescope.system import read_whole
from store.annotation_file import LONGEST_LABEL
from store.annotations import Annotations, clean_name, clean_text
from store.machine_labels import INSERT, MachineLabel, saved_row

KIND, SCHEMA = "saescope annotations", 1
COLUMNS = ("feature", "label", "note", "tags", "lists")
CONFLICTS = ("refuse", "keep", "replace")
_LARGEST = 256 << 20


@dataclass(frozen=True)
class Entry:
    """What a file says of one feature."""

    feature: int
    label: str = ""
    note: str = ""
    tags: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    votes: Mapping[str, int] = field(default_factory=dict)
    machine_labels: tuple[MachineLabel, ...] = ()


@dataclass
class Report:
    """What an import changed, or would have changed."""

    added: int = 0
    """labels, notes, votes and machines' labels where there was none, tags, places on lists"""
    replaced: int = 0
    """those that were different here"""
    conflicts: list[str] = field(default_factory=list)
    """those that are different here and were left so, a line each"""


def entries(notes: Annotations) -> list[Entry]:
    """Everything that is here, feature by feature."""
    written = {
        row[0]: row[1:] for row in notes._rows("SELECT feature, label, note FROM annotation")
    }
    tags = _grouped(notes._rows_added("SELECT feature, tag FROM tag ORDER BY tag"))
    lists = _grouped(notes._rows("SELECT feature, list FROM list_member ORDER BY list"))
    votes: dict[int, list[tuple[str, int]]] = {}
    for number, who, value in notes._rows_added(
        "SELECT feature, who, value FROM vote ORDER BY who"
    ):
        votes.setdefault(number, []).append((who, value))
    numbers = {row[0] for row in notes._rows_added("SELECT DISTINCT feature FROM machine_label")}
    machines: dict[int, list[MachineLabel]] = {}
    for each in notes.machine_labels(sorted(numbers)):
        machines.setdefault(each.feature, []).append(each)
    everything = sorted({*written, *tags, *lists, *votes, *machines})
    return [
        Entry(
            number,
            *written.get(number, ("", "")),
            tags=tuple(tags.get(number, ())),
            lists=tuple(lists.get(number, ())),
            votes=dict(votes.get(number, ())),
            machine_labels=tuple(machines.get(number, ())),
        )
        for number in everything
    ]


def _grouped(rows: Iterable[Sequence[Any]]) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for number, value in rows:
        found.setdefault(number, []).append(value)
    return found


def as_json(notes: Annotations, sae_hash: str) -> str:
    """All annotations, with their history, as JSON."""
    features = []
    for each in entries(notes):
        machines = [
            {k: v for k, v in asdict(m).items() if k != "feature"} for m in each.machine_labels
        ]
        features.append({**asdict(each), "machine_labels": machines})
    history = [asdict(change) for change in reversed(notes.history(limit=2**31 - 1))]
    found = {"kind": KIND, "schema": SCHEMA, "sae_hash": sae_hash}
    found |= {"features": features, "history": history}
    return json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def as_csv(notes: Annotations) -> str:
    """Labels, notes, tags and lists as CSV."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for each in entries(notes):
        if each.label or each.note or each.tags or each.lists:
            names = [json.dumps(list(n), ensure_ascii=False) for n in (each.tags, each.lists)]
            writer.writerow([each.feature, each.label, each.note, *names])
    return stream.getvalue()


def read_entries(path: Path, *, d_sae: int, sae_hash: str = "") -> list[Entry]:
    """Read a file of annotations, by its ending .json or .csv.

    Raises InputError, which names the row, for what is no such file, for features that the store
    has not, and for annotations of another SAE than the one with this hash; ArtefactError if the
    file cannot be read.
    """
    text = read_whole(path, largest=_LARGEST)
    rows = _csv_rows(text, path) if path.suffix == ".csv" else _json_rows(text, path, sae_hash)
    found, seen = [], set[int]()
    for number, row in enumerate(rows, 1):
        where = f"{path}: entry {number}"
        try:
            entry = _entry(row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"is no annotation of a feature ({error})", where=where) from error
        if not 0 <= entry.feature < d_sae:
            raise InputError(
                "no such feature", where=where, given=entry.feature, allowed=f"0 to {d_sae - 1}"
            )
        if entry.feature in seen:
            raise InputError("this feature has an entry already", where=where, given=entry.feature)
        seen.add(entry.feature)
        found.append(entry)
    return found


def _json_rows(text: bytes, path: Path, sae_hash: str) -> list[Any]:
    found = parse_json(text, where=str(path))
    if not isinstance(found, dict) or found.get("kind") != KIND or found.get("schema") != SCHEMA:
        raise InputError(
            "is no file of annotations", where=str(path), allowed=f"{KIND}, schema {SCHEMA}"
        )
    if sae_hash and found.get("sae_hash") and found["sae_hash"] != sae_hash:
        raise InputError(
            "these annotations are about another SAE, whose features are others; --other-sae takes"
            " them all the same",
            where=str(path),
        )
    features = found.get("features")
    if not isinstance(features, list):
        raise InputError("has no list of features", where=str(path))
    return features


def _csv_rows(text: bytes, path: Path) -> list[dict[str, Any]]:
    try:
        rows = list(csv.DictReader(io.StringIO(text.decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"is no CSV in UTF-8 ({error})", where=str(path)) from error
    columns = set(rows[0]) if rows else set()
    if rows and not {"feature"} < columns <= set(COLUMNS):
        raise InputError(
            "has wrong columns", where=str(path), given=sorted(map(str, columns)), allowed=COLUMNS
        )
    for row in rows:
        row["feature"] = int(row["feature"]) if str(row["feature"]).isdecimal() else row["feature"]
        for name in ("tags", "lists"):
            if name in row:
                row[name] = parse_json(row[name] or "[]", where=f"{path}: {name}")
    return rows


def _entry(row: Mapping[str, Any]) -> Entry:
    feature, votes = row["feature"], row.get("votes", {})
    if isinstance(feature, bool) or not isinstance(feature, int):
        raise ValueError("feature is no whole number")
    for name in ("label", "note"):
        if not isinstance(row.get(name, ""), str):
            raise ValueError(f"{name} is no text")
    for name in ("tags", "lists"):
        names = row.get(name, [])
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise ValueError(f"{name} are no list of texts")
    if any(isinstance(v, bool) or v not in (-1, 1) for v in votes.values()):
        raise ValueError("a vote is 1 or -1")
    return Entry(
        feature,
        label=row.get("label", ""),
        note=row.get("note", ""),
        tags=tuple(row.get("tags", ())),
        lists=tuple(row.get("lists", ())),
        votes=dict(votes),
        machine_labels=tuple(
            _machine_label(feature, **each) for each in row.get("machine_labels", ())
        ),
    )


def _machine_label(
    feature: int, method: str, label: str, score: float | None, details: Any = None, made: str = ""
) -> MachineLabel:
    details = {} if details is None else details
    texts = all(isinstance(each, str) and len(each) <= LONGEST_LABEL for each in (method, made))
    number = score is None or (isinstance(score, int | float) and not isinstance(score, bool))
    if not (texts and isinstance(label, str) and number and isinstance(details, dict)):
        raise ValueError("a machine's label has a wrong value")
    return MachineLabel(
        feature=feature, method=method, label=label, score=score, details=details, made=made
    )


class _Refused(Exception):
    """Conflicts were found, so nothing is to be changed."""


def merge(notes: Annotations, given: Sequence[Entry], conflicts: str = "refuse") -> Report:
    """Put what a file says beside what is here, in one transaction; what was changed.

    What is missing here is added. Where a label, note, vote or machine's label is different here,
    `conflicts` says what to do: "refuse" changes nothing at all if there is any, "keep" leaves what
    is here, "replace" takes the file's. Nothing is ever removed.
    """
    report = Report()

    def work(con: sqlite3.Connection) -> None:
        merging = _Merge(notes, con, conflicts, report)
        for entry in given:
            merging.add(entry)
        if conflicts == "refuse" and report.conflicts:
            raise _Refused

    try:
        notes._change(work, machines=any(entry.machine_labels for entry in given))
    except _Refused:
        return Report(conflicts=report.conflicts)
    return report


@dataclass(frozen=True)
class _Merge:
    """One merge, in its transaction."""

    notes: Annotations
    con: sqlite3.Connection
    conflicts: str
    report: Report

    def add(self, entry: Entry) -> None:
        """Add what a file says of one feature."""
        number = entry.feature
        for column, given in (("label", entry.label), ("note", entry.note)):
            text = clean_text(column, given)
            found = self._found(f"SELECT {column} FROM annotation WHERE feature = ?", number) or ""
            if text and self._wanted(f"{column} of feature {number}", found, text):
                self.notes._set_text(self.con, number, column, found, text)
        for table, kind, names in (
            ("tag", "tag", entry.tags),
            ("list_member", "list", entry.lists),
        ):
            for name in names:
                self.report.added += self.notes._set_member(
                    self.con, table, kind, number, clean_name(kind, name), True
                )
        for who, value in entry.votes.items():
            found = self._found("SELECT value FROM vote WHERE feature = ? AND who = ?", number, who)
            if self._wanted(f"vote of {who} on feature {number}", found or "", value):
                self.notes._set_vote(self.con, number, clean_name("voter", who), value)
        for label in entry.machine_labels:
            self._add_machine_label(label)

    def _add_machine_label(self, label: MachineLabel) -> None:
        sql = "SELECT label FROM machine_label WHERE feature = ? AND method = ?"
        found = self._found(sql, label.feature, label.method) or ""
        row = saved_row(label)
        if self._wanted(f"{label.method} label of feature {label.feature}", found, row[2]):
            self.con.execute(INSERT, row)

    def _found(self, sql: str, *values: Any) -> Any:
        row = self.con.execute(sql, values).fetchone()
        return row[0] if row else None

    def _wanted(self, what: str, found: object, given: object) -> bool:
        """Whether to save this; counts it, or notes the conflict."""
        if found == given:
            return False
        if found == "":
            self.report.added += 1
            return True
        if self.conflicts == "replace":
            self.report.replaced += 1
            return True
        self.report.conflicts.append(f"{what}: here {found!r}, in the file {given!r}")
        return False
