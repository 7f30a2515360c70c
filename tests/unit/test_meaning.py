"""Search of labels by meaning, with hand-set embeddings and with the packaged model."""

import math
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from saescope.errors import InputError
from store import Annotations
from store.machine_labels import MachineLabel
from store.meaning import Meant, search_meaning

ANGLES = {"ships": 0, "boats at sea": 20, "harbour life": 40, "algebra": 90, "prime numbers": 120}


class Hand:
    """Embeds the texts of ANGLES in a plane, and counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        self.asked += texts
        radians = [math.radians(ANGLES[text]) for text in texts]
        return np.array([[math.cos(r), math.sin(r)] for r in radians], np.float32)


@pytest.fixture
def notes(tmp_path: Path) -> Annotations:
    notes = Annotations.open(tmp_path / "features.duckdb")
    notes.set_label(4, "algebra")
    notes.set_label(9, "boats at sea")
    notes.set_note(4, "harbour life")
    made = MachineLabel(feature=2, method="token", label="prime numbers", score=None)
    notes.set_machine_labels([made])
    return notes


def test_the_nearest_come_first(notes: Annotations) -> None:
    found = search_meaning(notes, " ships ", Hand(), model="m")
    degrees = [(each.feature, each.text, round(each.cosine, 4)) for each in found]
    cosines = {text: round(math.cos(math.radians(angle)), 4) for text, angle in ANGLES.items()}
    assert degrees == [
        (9, "boats at sea", cosines["boats at sea"]),
        (4, "harbour life", cosines["harbour life"]),  # of its label and its note the nearer
        (2, "prime numbers", cosines["prime numbers"]),
    ]
    assert search_meaning(notes, "ships", Hand(), model="m", limit=1) == found[:1]
    assert isinstance(found[0], Meant)


def test_embeddings_are_kept_by_text_and_model(notes: Annotations, tmp_path: Path) -> None:
    first = Hand()
    before = search_meaning(notes, "ships", first, model="m")
    assert sorted(first.asked) == sorted(ANGLES)
    kept = tmp_path / "features.embeddings.sqlite"
    assert kept.is_file()
    again, other = Hand(), Hand()
    assert search_meaning(notes, "ships", again, model="m") == before
    assert again.asked == ["ships"], "what was looked for is not kept"
    search_meaning(notes, "ships", other, model="another")
    assert sorted(other.asked) == sorted(ANGLES)
    notes.set_label(9, "ships")
    search_meaning(notes, "algebra", again := Hand(), model="m")
    assert again.asked == ["ships"], "only the label that is new"
    kept.write_bytes(b"no database" * 100)
    assert search_meaning(notes, "algebra", Hand(), model="m")[0].feature == 4
    kept.unlink()
    with sqlite3.connect(kept) as con:  # vectors of other lengths
        con.execute("CREATE TABLE embedding (model TEXT, text TEXT, vector BLOB)")
        con.execute("INSERT INTO embedding VALUES ('m', 'x', x'0000')")
    assert search_meaning(notes, "algebra", Hand(), model="m")[0].feature == 4


def test_wrong_input(notes: Annotations, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="text: has no words"):
        search_meaning(notes, "  ", Hand(), model="m")
    with pytest.raises(InputError, match="embed: gives no embeddings"):
        search_meaning(
            notes, "ships", lambda texts: np.ones((len(texts), 2), np.float32), model="m"
        )
    with pytest.raises(InputError, match="embed: gives no embeddings"):
        search_meaning(notes, "ships", lambda texts: np.ones(2, np.float32), model="m")
    with Annotations.open(tmp_path / "empty" / "features.duckdb") as empty:
        assert search_meaning(empty, "ships", Hand(), model="m") == []


@pytest.mark.slow
def test_the_packaged_model_finds_by_meaning(tmp_path: Path) -> None:
    from activations.models.sentences import MODEL_HASH, Sentences

    sentences = Sentences()
    with Annotations.open(tmp_path / "features.duckdb") as notes:
        for number, label in enumerate(("sailing boats", "algebraic equations", "bread and cake")):
            notes.set_label(number, label)
        for text, wanted in (("ships", 0), ("mathematics", 1), ("a bakery", 2)):
            found = search_meaning(notes, text, sentences.embed, model=MODEL_HASH)
            assert found[0].feature == wanted
    one, two = sentences.embed(["a ship", "a much longer text about a ship on the sea"])
    alone = sentences.embed(["a ship"])[0]
    np.testing.assert_allclose(one, alone, atol=1e-5)  # padding changes nothing
    assert one @ two > 0.5
