"""Labels, notes and lists beside a store."""

import random
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saescope.errors import ArtefactError, InputError
from store import Annotations, annotation_file
from store.annotations import ChangedError, annotations_file
from store.examination import examine_annotations


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "features.duckdb"


def test_labels_notes_and_lists_are_kept(place: Path) -> None:
    with Annotations.open(place) as notes:
        assert notes.get(3).label == ""
        assert not annotations_file(place).exists(), "reading makes no file"
        notes.set_label(3, "  river \n names ")
        notes.set_note(3, "Seen near bridges.\nAlso dams.")
        notes.set_label(9, "winter")
        notes.add_to_list(9)
        notes.add_to_list(3)
        notes.add_to_list(3)
        notes.add_to_list(1, "odd ones")
    with Annotations.open(place) as notes:
        assert notes.get(3).label == "river names"
        assert notes.get(3).note == "Seen near bridges.\nAlso dams."
        assert notes.labels() == {3: "river names", 9: "winter"}
        assert notes.labels([9, 10]) == {9: "winter"}
        assert notes.labels(range(2000)) == {3: "river names", 9: "winter"}
        assert notes.labels([]) == {}
        both = notes.get_several(range(2, 1200))
        assert list(both) == list(range(2, 1200))
        assert both[3] == notes.get(3)
        assert (both[9].label, both[9].note, both[2].label) == ("winter", "", "")
        assert notes.members() == [9, 3]
        assert notes.lists() == {"favourites": 2, "odd ones": 1}
        notes.remove_from_list(9)
        assert notes.members() == [3]
        notes.set_label(9, "")
        assert notes.labels() == {3: "river names"}


def test_a_folder_and_its_file_have_the_same_annotations(tmp_path: Path) -> None:
    assert annotations_file(tmp_path) == annotations_file(tmp_path / "features.duckdb")


def test_search(place: Path) -> None:
    with Annotations.open(place) as notes:
        assert notes.search("anything") == []
        notes.set_note(5, "mentions of winter rivers")
        notes.set_label(2, "Winter sports")
        notes.set_label(8, "Café")
        assert notes.search("winter") == [2, 5], "labels weigh more than notes"
        assert notes.search("WINT") == [2, 5]
        assert notes.search("winter river") == [5]
        assert notes.search("cafe") == [8]
        assert notes.search('"; DROP TABLE') == []
        assert notes.search("NEAR(a) OR *") == []
        assert notes.search("  ") == []
        notes.set_label(2, "summer")
        assert notes.search("winter") == [5], "the index follows changes"
        assert notes.search("summer") == [2]
        assert notes.search("winter", limit=0) == []


def test_wrong_values(place: Path) -> None:
    with Annotations.open(place) as notes:
        with pytest.raises(InputError, match="feature"):
            notes.set_label(-1, "x")
        with pytest.raises(InputError, match="label: is too long"):
            notes.set_label(1, "x" * 201)
        with pytest.raises(InputError, match="note: is too long"):
            notes.set_note(1, "x" * 20_001)
        with pytest.raises(InputError, match="list"):
            notes.add_to_list(1, " ")
    assert not annotations_file(place).exists()


def test_a_file_that_cannot_be_written_is_read_only(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Annotations.open(place) as notes:
        notes.set_label(3, "river")
    real = sqlite3.connect

    def connect(name: str, **more):
        # what the file system says on a read-only mount, where the tests may run as root
        return real(name.replace("mode=rw", "mode=ro"), **more)

    monkeypatch.setattr(sqlite3, "connect", connect)
    with Annotations.open(place) as notes:
        assert notes.read_only
        assert notes.labels() == {3: "river"}
        with pytest.raises(ArtefactError, match="read-only"):
            notes.set_label(3, "sea")
        assert notes.search("river") == [3]


def test_a_folder_that_cannot_be_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def touch(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "touch", touch)
    with Annotations.open(place) as notes:
        assert notes.read_only
        assert notes.labels() == {}
        with pytest.raises(ArtefactError, match="read-only"):
            notes.set_label(3, "sea")
    assert not annotations_file(place).exists()


def test_a_missing_folder_is_read_only(tmp_path: Path) -> None:
    with Annotations.open(tmp_path / "gone" / "features.duckdb") as notes:
        assert notes.read_only


def test_newer_damaged_and_foreign_files(place: Path) -> None:
    file = annotations_file(place)
    with Annotations.open(place) as notes:
        notes.set_label(3, "river")
    con = sqlite3.connect(file)
    with con:
        con.execute("UPDATE meta SET value = '3' WHERE key = 'schema'")
    con.close()
    with pytest.raises(ArtefactError, match="newer saescope"):
        Annotations.open(place)
    file.write_bytes(b"not a database at all, whatever its name says" * 50)
    with pytest.raises(ArtefactError, match="cannot be read as annotations"):
        Annotations.open(place)


def test_labels_of_another_sae_are_refused(place: Path) -> None:
    with Annotations.open(place, sae_hash="first") as notes:
        notes.set_label(3, "river")
    with Annotations.open(place, sae_hash="first") as notes:
        assert notes.labels() == {3: "river"}
    with Annotations.open(place) as notes:
        assert notes.labels() == {3: "river"}
    with pytest.raises(ArtefactError, match="another SAE"):
        Annotations.open(place, sae_hash="second")


def test_several_writers(place: Path) -> None:
    with Annotations.open(place) as first, Annotations.open(place) as second:
        first.set_label(1, "one")
        assert second.labels() == {1: "one"}, "a reader that was there before sees it"
        second.set_label(2, "two")
        assert first.labels() == {1: "one", 2: "two"}

        def write(notes: Annotations, start: int) -> None:
            for number in range(start, 120, 4):
                notes.set_label(number, f"label {number}")

        threads = [
            threading.Thread(target=write, args=(notes, start))
            for start, notes in enumerate((first, second, first, second))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(first.labels()) == 120
        assert len(second.search("label")) == 120


def test_it_is_plain_sqlite(place: Path) -> None:
    with Annotations.open(place) as notes:
        notes.set_label(7, "x")
    con = sqlite3.connect(annotations_file(place))
    assert con.execute("SELECT feature, label FROM annotation").fetchall() == [(7, "x")]
    con.close()


def test_numpy_numbers_are_features(place: Path) -> None:
    three: Any = np.int64(3)
    others: list[Any] = [np.uint8(3), np.array([3, 5]), np.int32(3)]
    with Annotations.open(place) as notes:
        notes.set_label(three, "river")
        notes.add_to_list(three)
        notes.add_to_list(3)
        assert notes.members() == [3]
        assert notes.get(others[0]) == notes.get(3)
        assert notes.labels(others[1]) == {3: "river"}
        notes.remove_from_list(others[2])
        assert notes.members() == []
        wrong: Any
        for wrong in (3.0, "3", True, None, 2**31, np.array([3])):
            with pytest.raises(InputError, match="feature"):
                notes.set_label(wrong, "x")
        for wrong in (None, b"river", "\udcff"):
            with pytest.raises(InputError):
                notes.set_label(4, wrong)


def test_a_text_that_changed_meanwhile_is_kept(place: Path) -> None:
    with Annotations.open(place) as notes, Annotations.open(place) as others:
        notes.set_label(3, "river", seen="")
        others.set_label(3, "a  stream")
        with pytest.raises(ChangedError, match=r"label of feature 3: .*to 'a stream'.*'lake'") as e:
            notes.set_label(3, "lake", seen="river")
        assert e.value.found == "a stream"
        assert notes.get(3).label == "a stream"
        notes.set_label(3, "a stream", seen="river")
        notes.set_label(3, "lake", seen=" a stream ")
        assert others.get(3).label == "lake"
        with pytest.raises(ChangedError):
            notes.set_note(3, "new", seen="old")
        notes.set_note(3, "new", seen="")
        assert notes.get(3).note == "new"


def test_a_file_in_use_can_be_read_and_is_written_later(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(annotation_file, "_TIMEOUT", 0.2)
    with Annotations.open(place) as notes:
        notes.set_label(3, "river")
    other = sqlite3.connect(annotations_file(place), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with Annotations.open(place) as notes:
        assert notes.labels() == {3: "river"}
        assert not notes.read_only
        with pytest.raises(ArtefactError, match="another program has the file in use"):
            notes.set_label(3, "lake")
        other.execute("ROLLBACK")
        other.close()
        notes.set_label(3, "lake")
        assert notes.labels() == {3: "lake"}


def test_a_file_that_was_replaced_is_opened_anew(place: Path, tmp_path: Path) -> None:
    with Annotations.open(place, sae_hash="first") as notes:
        notes.set_label(3, "river")
        annotations_file(place).rename(tmp_path / "away")
        assert notes.labels() == {}
        notes.set_label(4, "lake")
        with Annotations.open(place, sae_hash="first") as again:
            assert again.labels() == {4: "lake"}
        annotations_file(place).unlink()
        with Annotations.open(place, sae_hash="second") as others:
            others.set_label(5, "of another SAE")
        with pytest.raises(ArtefactError, match="another SAE"):
            notes.set_label(4, "pond")


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER more AFTER INSERT ON annotation BEGIN DELETE FROM annotation; END",
        "DROP TRIGGER annotation_changed",
        "CREATE VIEW more AS SELECT 1",
        "CREATE TABLE more (x)",
        "CREATE INDEX more ON list_member (added)",
        "ALTER TABLE annotation ADD COLUMN more TEXT",
        "ALTER TABLE annotation RENAME TO others; CREATE VIEW annotation AS SELECT * FROM others",
        "DROP TABLE meta; CREATE VIEW meta AS WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT 1"
        " FROM t) SELECT n AS key, n AS value FROM t",
        "DROP TABLE meta; CREATE VIRTUAL TABLE meta USING fts5(key, value)",
        "INSERT INTO annotation VALUES (-4, 'a', 'b', 'c')",
        "INSERT INTO annotation VALUES (4, x'00ff', 'b', 'c')",
        "INSERT INTO annotation VALUES (4, hex(zeroblob(200)), 'b', 'c')",
        "INSERT INTO list_member VALUES ('favourites', x'0300000000000000', 'c')",
        "UPDATE meta SET value = 'one' WHERE key = 'schema'",
    ],
)
def test_files_of_anybody(place: Path, statement: str) -> None:
    with Annotations.open(place) as notes:
        notes.set_label(3, "river")
    con = sqlite3.connect(annotations_file(place))
    con.executescript(statement)
    con.close()
    before = annotations_file(place).read_bytes()
    started = time.monotonic()
    with pytest.raises(ArtefactError) as raised:
        Annotations.open(place)
    assert "\n" not in str(raised.value)
    assert time.monotonic() - started < 10
    assert annotations_file(place).read_bytes() == before


def test_what_a_database_tool_leaves_is_no_harm(place: Path) -> None:
    with Annotations.open(place) as notes:
        notes.set_label(3, "river")
    con = sqlite3.connect(annotations_file(place))
    con.executescript("ANALYZE; VACUUM")
    con.close()
    with Annotations.open(place) as notes:
        assert notes.search("riv") == [3]
        notes.set_label(3, "lake")


def test_damage_is_one_line(place: Path) -> None:
    with Annotations.open(place) as notes:
        for number in range(300):
            notes.set_note(number, f"note {number} " + "words " * 50)
    file = annotations_file(place)
    good = file.read_bytes()
    said = []
    for trial in range(60):
        chance = random.Random(trial)
        content = bytearray(good)
        for _ in range(30):
            content[chance.randrange(100, len(content))] = chance.randrange(256)
        file.write_bytes(content)
        try:
            with Annotations.open(place) as notes:
                notes.labels()
                notes.search("words")
                notes.get(trial)
                notes.set_note(trial, "words")
        except ArtefactError as error:
            said.append(str(error))
    assert len(said) > 5
    assert not any("\n" in line for line in said)


def test_what_is_not_what_was_saved_is_known(tmp_path: Path) -> None:
    """A letter, a time, a list's name, or what the file says of itself."""
    with Annotations.open(tmp_path, sae_hash="5ae") as notes:
        notes.set_label(3, "weather")
        notes.add_to_list(3, "mine")
        path = notes.path
    assert list(examine_annotations(tmp_path)) == []
    whole = path.read_bytes()
    for sql in (
        "UPDATE annotation SET label = 'wearher'",
        "UPDATE annotation SET changed = '2001'",
        "UPDATE list_member SET list = 'mind'",
        "UPDATE meta SET value = '5af' WHERE key = 'sae_hash'",
        "UPDATE meta SET key = 'sha257' WHERE key = 'sha256'",
    ):
        path.write_bytes(whole)
        with sqlite3.connect(path) as con:
            con.execute(sql)
        con.close()
        said = ["not what saescope last saved there: damaged, or changed by another program"]
        assert list(examine_annotations(tmp_path)) == said
        with Annotations.open(tmp_path) as notes:  # is read, and is not taken for sound by a change
            notes.set_note(4, "more")
        assert list(examine_annotations(tmp_path)) == said


def test_a_file_without_a_checksum_has_one_after_its_first_change(tmp_path: Path) -> None:
    with Annotations.open(tmp_path, sae_hash="5ae") as notes:
        notes.set_label(3, "weather")
        path = notes.path
    with sqlite3.connect(path) as con:
        con.execute("DELETE FROM meta WHERE key = 'sha256'")
    con.close()
    assert list(examine_annotations(tmp_path)) == []
    with Annotations.open(tmp_path, sae_hash="5ae") as notes:
        assert notes.get(3).label == "weather"
        notes.set_label(4, "more")
    with sqlite3.connect(path) as con:
        facts = dict(con.execute("SELECT key, value FROM meta"))
    con.close()
    assert len(facts["sha256"]) == 64
    assert list(examine_annotations(tmp_path)) == []
