"""Labels that a machine made, with their scores; apart from people's, and never over them."""

import json
import re
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from saescope.errors import InputError
from saescope.integers import as_indices
from store.annotation_base import LARGEST, AnnotationBase, feature_number, now
from store.annotation_file import LONGEST_DETAILS, LONGEST_LABEL

INSERT = "INSERT OR REPLACE INTO machine_label VALUES (?, ?, ?, ?, ?, ?)"


@dataclass(frozen=True, kw_only=True)
class MachineLabel:
    """A label that one method made of one feature."""

    feature: int
    method: str
    """token, ngram, topic, logit, or the name of a language model"""
    label: str
    score: float | None
    """balanced accuracy of detection on held-out windows; None where there were too few"""
    details: Mapping[str, Any] = field(default_factory=dict)
    """AUC, baselines, and how it was made; plain values of JSON"""
    made: str = ""
    """time, in UTC; set when it is saved"""


class MachineLabels(AnnotationBase):
    """The machines' labels in an open file of annotations."""

    def set_machine_labels(self, labels: Sequence[MachineLabel]) -> None:
        """Save labels in one transaction; one of the same feature and method is replaced."""
        rows = [saved_row(each) for each in labels]
        self._change(lambda con: _insert(con, rows), machines=True)

    def machine_labels(self, features: Sequence[int]) -> list[MachineLabel]:
        """The machines' labels of these features, by feature and method."""
        numbers = as_indices(features, where="features", low=0, high=LARGEST)
        columns = "feature, method, label, score, details, made"
        rows: list[Any] = []
        for begin in range(0, len(numbers), 500):
            batch = numbers[begin : begin + 500]
            marks = ", ".join("?" * len(batch))
            rows += self._rows_added(
                f"SELECT {columns} FROM machine_label WHERE feature IN ({marks})", batch
            )
        return [_label(*row) for row in sorted(rows, key=lambda row: row[:2])]

    def best_machine_labels(self, features: Sequence[int]) -> dict[int, MachineLabel]:
        """Of each of these features the label that fitted best where it was made, if there is one.

        It is chosen by its fit on the windows it was made from (`details["fit"]`), not by its
        held-out score, which would then be too good; a label without a fit by its score.
        """
        found: dict[int, MachineLabel] = {}
        for each in self.machine_labels(features):
            best = found.get(each.feature)
            if best is None or _fit(each) > _fit(best):
                found[each.feature] = each
        return found

    def search_machine_labels(self, words: Sequence[str]) -> list[int]:
        """Features in one of whose machine labels each word is the beginning of some word.

        Those with the best score come first. Cost: a pass over the labels, some 30 ms for 100,000.
        """
        patterns = [f"%{word}%" for word in words]
        fits = " AND ".join(["label LIKE ?"] * len(patterns)) or "FALSE"
        rows = self._rows_added(
            f"SELECT feature, label FROM machine_label WHERE {fits}"
            " ORDER BY score DESC NULLS LAST, feature",
            patterns,
        )
        begins = [re.compile(rf"(?<![^\W_]){re.escape(word)}", re.IGNORECASE) for word in words]
        found = [number for number, label in rows if all(each.search(label) for each in begins)]
        return list(dict.fromkeys(found))

    def machine_labelled(self, method: str, made_with: str) -> set[int]:
        """The features that this method has labelled with these settings."""
        sql = (
            "SELECT feature FROM machine_label"
            " WHERE method = ? AND json_extract(details, '$.made_with') = ?"
        )
        return {row[0] for row in self._rows_added(sql, [method, made_with])}


def _fit(label: MachineLabel) -> float:
    fit = label.details.get("fit", label.score)
    return float(fit) if isinstance(fit, int | float) else -1.0


def _insert(con: sqlite3.Connection, rows: Sequence[Sequence[Any]]) -> None:
    con.executemany(INSERT, rows)


def saved_row(each: MachineLabel) -> list[Any]:
    """A label as a row of the file; InputError for what is none."""
    details = json.dumps(dict(each.details), sort_keys=True, allow_nan=False)
    if len(details) > LONGEST_DETAILS:
        raise InputError("is too long", where="details", given=f"{len(details)} characters")
    label = " ".join(each.label.split())
    if len(label) > LONGEST_LABEL:
        label = f"{label[: LONGEST_LABEL - 1]}…"
    score = None if each.score is None else float(each.score)
    return [feature_number(each.feature), each.method, label, score, details, each.made or now()]


def _label(
    feature: int, method: str, label: str, score: float | None, details: str, made: str
) -> MachineLabel:
    try:
        found = json.loads(details)
    except (ValueError, RecursionError):
        found = {}
    return MachineLabel(
        feature=feature,
        method=method,
        label=label,
        score=score,
        details=found if isinstance(found, dict) else {},
        made=made,
    )
