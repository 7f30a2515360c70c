"""Annotations as files: what goes out comes in again; conflicts are refused unless told."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from saescope.__main__ import main
from saescope.errors import InputError
from store import Annotations
from store.annotation_exchange import entries, read_entries
from store.examination import examine_annotations
from store.machine_labels import MachineLabel
from tests.tiny_store import make_tiny_store

LAKE = {"method": "token", "label": "lake", "score": 0.5}


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """A store with annotations by two people and a machine."""
    path = make_tiny_store(tmp_path / "one")
    with Annotations.open(path, sae_hash="5ae", who="ann") as notes:
        notes.set_label(3, 'river, “the” "one"')
        notes.set_note(3, "two\nlines")
        notes.add_tag(3, "water; wet")
        notes.add_to_list(3)
        notes.add_to_list(9, "odd, ones")
        notes.vote(3, 1)
        notes.set_machine_labels(
            [MachineLabel(feature=5, method="token", label="sea", score=0.75, details={"fit": 0.8})]
        )
    with Annotations.open(path, sae_hash="5ae", who="ben") as notes:
        notes.vote(3, -1)
    return path


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return make_tiny_store(tmp_path / "other")


def run(store: Path, *words: str) -> int:
    return main(["annotations", str(store), *words])


def open_notes(path: Path) -> Annotations:
    return Annotations.open(path, sae_hash="5ae")


def test_json_has_everything(
    one: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "notes.json"
    assert run(one, "--export", str(file)) == 0
    assert "annotations of 3 features" in capsys.readouterr().out
    assert [change["what"] for change in json.loads(file.read_text())["history"]] == [
        "label", "note", "tag water; wet", "list favourites", "list odd, ones", "vote", "vote",
    ]  # fmt: skip
    assert run(other, "--import", str(file), "--who", "cleo") == 0
    # label, note, tag, two lists, two votes, a machine's label
    assert "8 added, 0 replaced, 0 left" in capsys.readouterr().out
    with open_notes(one) as before, open_notes(other) as after:
        assert entries(after) == entries(before)
        assert {change.who for change in after.history()} == {"cleo"}
        assert after.votes(3) == {"ann": 1, "ben": -1}
    assert list(examine_annotations(other)) == []
    assert run(other, "--import", str(file)) == 0
    assert "0 added, 0 replaced, 0 left" in capsys.readouterr().out
    file.write_text("something else")
    assert run(one, "--export", str(file)) == 2
    assert file.read_text() == "something else", "a file that is there stays"
    assert run(one, "--export", str(file), "--replace") == 0


def test_csv_has_labels_notes_tags_and_lists(one: Path, other: Path, tmp_path: Path) -> None:
    file = tmp_path / "notes.csv"
    assert run(one, "--export", str(file)) == 0
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["feature"] for row in rows] == ["3", "9"]
    assert (rows[0]["label"], rows[0]["note"]) == ('river, “the” "one"', "two\nlines")
    assert (json.loads(rows[0]["tags"]), json.loads(rows[1]["lists"])) == (
        ["water; wet"],
        ["odd, ones"],
    )
    assert run(other, "--import", str(file)) == 0
    with open_notes(one) as before, open_notes(other) as after:
        assert after.labels() == before.labels()
        assert after.get(3).note == "two\nlines"
        assert (after.tags(3), after.lists()) == (before.tags(3), before.lists())


def write(tmp_path: Path, *features: dict[str, Any]) -> Path:
    file = tmp_path / "given.json"
    found = {"kind": "saescope annotations", "schema": 1, "sae_hash": "5ae"}
    file.write_text(json.dumps({**found, "features": list(features)}))
    return file


def test_conflicts(one: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = write(
        tmp_path,
        {"feature": 3, "label": "sea", "note": "two\nlines", "votes": {"ann": -1}},
        {"feature": 5, "label": "new", "machine_labels": [LAKE]},
        {"feature": 9, "tags": ["new"]},
    )
    with open_notes(one) as notes:
        before = entries(notes)
    assert run(one, "--import", str(file)) == 2
    said = capsys.readouterr()
    assert "3 texts are different here, so nothing was changed" in said.err
    assert "label of feature 3: here 'river, “the” \"one\"', in the file 'sea'" in said.out
    assert "vote of ann on feature 3: here 1, in the file -1" in said.out
    assert "token label of feature 5: here 'sea', in the file 'lake'" in said.out
    with open_notes(one) as notes:
        assert entries(notes) == before, "not even what was missing"
    assert run(one, "--import", str(file), "--conflicts", "keep") == 0
    assert "2 added, 0 replaced, 3 left" in capsys.readouterr().out
    with open_notes(one) as notes:
        assert notes.labels() == {3: 'river, “the” "one"', 5: "new"}
        assert (notes.tags(9), notes.votes(3)["ann"]) == (["new"], 1)
    assert run(one, "--import", str(file), "--conflicts", "replace", "--who", "cleo") == 0
    assert "0 added, 3 replaced, 0 left" in capsys.readouterr().out
    with open_notes(one) as notes:
        assert (notes.get(3).label, notes.votes(3)["ann"]) == ("sea", -1)
        assert notes.machine_labels([5])[0].label == "lake"
        change = next(c for c in notes.history(3) if c.what == "label")
        assert (change.who, change.before, change.after) == ("cleo", 'river, “the” "one"', "sea")
    assert list(examine_annotations(one)) == []


@pytest.mark.parametrize(
    ("feature", "problem"),
    [
        ({"feature": 64}, "no such feature"),
        ({"feature": -1}, "no such feature"),
        ({"feature": "3"}, "feature is no whole number"),
        ({"feature": True}, "feature is no whole number"),
        ({"label": "x"}, "is no annotation of a feature"),
        ({"feature": 3, "label": 5}, "label is no text"),
        ({"feature": 3, "tags": "water"}, "tags are no list of texts"),
        ({"feature": 3, "votes": {"ann": 7}}, "a vote is 1 or -1"),
        ({"feature": 3, "machine_labels": [{"method": "x"}]}, "is no annotation"),
        ({"feature": 3, "machine_labels": [{**LAKE, "label": 5}]}, "machine's label"),
        ({"feature": 3, "machine_labels": [{**LAKE, "score": "0.5"}]}, "machine's label"),
        ({"feature": 3, "machine_labels": [{**LAKE, "details": []}]}, "machine's label"),
        ({"feature": 3, "votes": [1]}, "is no annotation"),
        (None, "is no annotation"),
    ],
)
def test_wrong_entries(tmp_path: Path, feature: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        read_entries(write(tmp_path, feature), d_sae=64)


def test_texts_that_are_too_long_change_nothing(one: Path, tmp_path: Path) -> None:
    file = write(tmp_path, {"feature": 1, "label": "fine"}, {"feature": 2, "label": "x" * 201})
    assert run(one, "--import", str(file)) == 2
    with open_notes(one) as notes:
        assert notes.get(1).label == ""


def test_wrong_files(one: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def problem_with(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        assert run(one, "--import", str(tmp_path / name)) == 2
        return capsys.readouterr().err

    assert "not valid JSON" in problem_with("a.json", "{")
    assert "is no file of annotations" in problem_with("a.json", "[]")
    assert "has wrong columns" in problem_with("a.csv", "feature,colour\n3,red\n")
    assert "has wrong columns" in problem_with("a.csv", "label\nred\n")
    assert "feature is no whole number" in problem_with("a.csv", "feature,label\nx,red\n")
    assert "an entry already" in problem_with("a.csv", "feature,label\n3,a\n3,b\n")
    assert "not valid JSON" in problem_with("a.csv", "feature,tags\n3,water\n")
    mine = json.dumps(
        {"kind": "saescope annotations", "schema": 1, "sae_hash": "f", "features": []}
    )
    assert "about another SAE" in problem_with("a.json", mine)
    assert run(one, "--import", str(tmp_path / "a.json"), "--other-sae") == 0
    assert run(one, "--import", str(tmp_path / "gone.json")) == 2
    assert run(one) == 2
    assert run(one, "--export", str(tmp_path / "a.txt")) == 2
