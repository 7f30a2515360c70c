"""Who changed what when; tags and votes; machines' labels; files of the first version."""

import sqlite3
import threading
from pathlib import Path

import pytest

from saescope.errors import InputError
from store import Annotations, annotation_file
from store.annotations import annotations_file
from store.examination import examine_annotations
from store.machine_labels import MachineLabel


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "features.duckdb"


def made_by(feature: int, method: str, label: str, score: float | None = 0.8) -> MachineLabel:
    details = {"fit": score, "made_with": "a"}
    return MachineLabel(feature=feature, method=method, label=label, score=score, details=details)


def test_history_says_who_changed_what(place: Path) -> None:
    with Annotations.open(place, who="ann") as notes:
        notes.set_label(3, "river")
        notes.set_label(3, "river")  # no change
        notes.set_note(3, "near bridges")
        notes.add_to_list(3)
    with Annotations.open(place, who="ben") as notes:
        notes.set_label(3, "rivers")
        notes.add_tag(3, "water")
        notes.remove_from_list(3)
        notes.set_label(9, "winter")
        found = [(c.who, c.what, c.before, c.after) for c in notes.history(3)]
        assert found == [
            ("ben", "list favourites", "yes", ""),
            ("ben", "tag water", "", "yes"),
            ("ben", "label", "river", "rivers"),
            ("ann", "list favourites", "", "yes"),
            ("ann", "note", "", "near bridges"),
            ("ann", "label", "", "river"),
        ]
        assert [c.feature for c in notes.history(limit=2)] == [9, 3]
        times = [c.at for c in notes.history()]
        assert times == sorted(times, reverse=True)


def test_tags_and_votes(place: Path) -> None:
    with Annotations.open(place, who="ann") as ann, Annotations.open(place, who="ben") as ben:
        assert (ann.tags(3), ann.votes(3), ann.all_tags()) == ([], {}, {})
        ann.add_tag(3, " proper  names ")
        ben.add_tag(3, "safety")
        ben.add_tag(5, "safety")
        assert ann.tags(3) == ["proper names", "safety"]
        assert ann.tagged("safety") == [3, 5]
        assert ann.all_tags() == {"proper names": 1, "safety": 2}
        ben.remove_tag(3, "safety")
        assert ann.tags(3) == ["proper names"]
        ann.vote(3, 1)
        ann.vote(3, -1)
        ben.vote(3, 1)
        assert ann.votes(3) == {"ann": -1, "ben": 1}
        ann.vote(3, 0)
        assert ben.votes(3) == {"ben": 1}
        with pytest.raises(InputError, match="vote"):
            ann.vote(3, 2)
        with pytest.raises(InputError, match="tag"):
            ann.add_tag(3, " ")


def test_machines_labels_are_never_over_peoples(place: Path) -> None:
    with Annotations.open(place) as notes:
        notes.set_label(3, "river")
        notes.set_machine_labels([made_by(3, "token", "sea"), made_by(4, "token", "x" * 300, None)])
        notes.set_machine_labels([made_by(3, "ngram", "the sea", 0.9)])
        assert notes.labels() == {3: "river"}
        assert notes.get(4).label == ""
        assert [each.method for each in notes.machine_labels([3])] == ["ngram", "token"]
        best = notes.best_machine_labels([3, 4, 5])
        assert {n: each.label for n, each in best.items()} == {3: "the sea", 4: "x" * 199 + "…"}
        assert (best[3].score, best[4].score) == (0.9, None)
        assert best[3].details["made_with"] == "a"
        assert notes.machine_labelled("token", "a") == {3, 4}
        assert notes.machine_labelled("token", "b") == set()
    assert list(examine_annotations(place)) == []


def test_search_finds_machines_labels_after_peoples(place: Path) -> None:
    with Annotations.open(place) as notes:
        notes.set_machine_labels(
            [
                made_by(3, "token", "on “ winter”, “ snow”", 0.7),
                made_by(4, "token", "on “ Winter”", 0.9),
                made_by(4, "topic", "in documents titled winter", 0.5),
                made_by(5, "token", "midwinter", 0.9),
                made_by(6, "token", "100% winter_x", None),
            ]
        )
        assert notes.search("winter") == [4, 3, 6]
        assert notes.search("snow wint") == [3]
        notes.set_note(9, "seen in winter")
        assert notes.search("winter") == [9, 4, 3, 6]
        assert notes.search("winter", limit=2) == [9, 4]
        assert notes.search("_") == []


def make_old(place: Path) -> Path:
    """A file of schema 1, with a label, sealed as that version sealed it."""
    file = annotations_file(place)
    con = sqlite3.connect(file, isolation_level=None)
    annotation_file._make(con, "5ae", 1)
    con.execute("PRAGMA trusted_schema = ON")
    con.execute("INSERT INTO annotation VALUES (3, 'river', '', '2025-01-01')")
    con.execute("INSERT INTO list_member VALUES ('favourites', 3, '2025-01-01')")
    annotation_file.seal(con)
    con.close()
    return file


def test_files_of_the_first_version_are_read_and_brought_up(place: Path) -> None:
    file = make_old(place)
    before = file.read_bytes()
    with Annotations.open(place, sae_hash="5ae") as notes:
        assert notes.labels() == {3: "river"}
        assert notes.members() == [3]
        assert (notes.tags(3), notes.history(), notes.machine_labels([3])) == ([], [], [])
        assert file.read_bytes() == before, "reading changes nothing"
        assert list(examine_annotations(place)) == []
        with Annotations.open(place, sae_hash="5ae", who="ben") as other:
            other.set_label(3, "rivers")
        assert [(c.before, c.after) for c in notes.history()] == [("river", "rivers")]
        notes.add_tag(3, "water")
    assert list(examine_annotations(place)) == []
    with Annotations.open(place, sae_hash="5ae") as notes:
        assert (notes.labels(), notes.tags(3)) == ({3: "rivers"}, ["water"])


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE history SET after = 'sea'",
        "UPDATE machine_label SET score = 0.99",
        "DELETE FROM machine_label",
        "UPDATE tag SET tag = 'air'",
        "DELETE FROM vote",
    ],
)
def test_changes_by_others_are_found(place: Path, sql: str) -> None:
    with Annotations.open(place) as notes:
        notes.set_label(3, "river")
        notes.add_tag(3, "water")
        notes.vote(3, 1)
        notes.set_machine_labels([made_by(3, "token", "sea")])
        notes.set_label(3, "rivers")
    assert list(examine_annotations(place)) == []
    con = sqlite3.connect(annotations_file(place))
    with con:
        con.execute(sql)
    con.close()
    assert any("not what saescope last saved" in line for line in examine_annotations(place))


def test_several_users_at_once_lose_nothing(place: Path) -> None:
    """Five writers with connections of their own: each change is there, and in the history."""
    errors: list[BaseException] = []

    def write(who: int) -> None:
        try:
            with Annotations.open(place, who=f"user {who}") as notes:
                for step in range(20):
                    notes.set_label(100 * who + step, f"label {step}")
                    notes.add_tag(7, f"tag {who}-{step}")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(who,)) for who in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with Annotations.open(place) as notes:
        assert len(notes.labels()) == 100
        assert len(notes.tags(7)) == 100
        assert len(notes.history(limit=1000)) == 200
    assert list(examine_annotations(place)) == []
