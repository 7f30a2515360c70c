"""Labels, notes and lists beside a store."""

import sqlite3
import threading
from pathlib import Path

import pytest

from saescope.errors import ArtefactError, InputError
from store import Annotations
from store.annotations import annotations_file


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
        con.execute("UPDATE meta SET value = '2' WHERE key = 'schema'")
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
