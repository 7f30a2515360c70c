"""Tags, lists, votes and the history on the feature page."""

from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from store import Annotations
from tests.e2e.test_explorer import FEATURE, folder, made, open_page
from tests.tiny_store import RARE

__all__ = ["folder", "made"]  # fixtures


def open_notes(folder: Path, who: str = "ann") -> Annotations:
    return Annotations.open(folder / "tiny", sae_hash="5ae", who=who)


def field(app: AppTest, name: str):
    return app.multiselect(key=f"{name}_tiny_{RARE}")


def test_tags_and_lists_are_chosen_and_taken_off(folder: Path) -> None:
    with open_notes(folder) as notes:
        notes.add_tag(RARE, "rare <b>")
        notes.add_tag(5, "common")
        notes.add_to_list(5, "mine")
    app = open_page(FEATURE, sae="tiny", feature=str(RARE))
    assert field(app, "Tags").value == ["rare <b>"]
    assert set(field(app, "Tags").options) == {"rare <b>", "common"}
    field(app, "Tags").set_value(["common"]).run()
    field(app, "Lists").set_value(["mine"]).run()
    assert not app.exception
    with open_notes(folder) as notes:
        assert notes.tags(RARE) == ["common"]
        assert notes.members("mine") == [5, RARE]
    history = " ".join(each.value for each in app.caption)
    assert "ann added tag rare" in history
    assert "<b>" not in history


def test_what_others_add_meanwhile_stays(folder: Path) -> None:
    with open_notes(folder) as notes:
        notes.add_tag(RARE, "one")
        notes.add_tag(5, "two")
    app = open_page(FEATURE, sae="tiny", feature=str(RARE))
    with open_notes(folder, "ben") as other:
        other.add_tag(RARE, "three")
    field(app, "Tags").set_value(["one", "two"]).run()
    with open_notes(folder) as notes:
        assert notes.tags(RARE) == ["one", "three", "two"]


def test_votes(folder: Path) -> None:
    with open_notes(folder, "somebody else") as other:
        other.vote(RARE, 1)
    app = open_page(FEATURE, sae="tiny", feature=str(RARE))
    up, down = (f"vote_{value}_tiny_{RARE}" for value in (1, -1))
    assert (app.button(key=up).label, app.button(key=down).label) == ("1", "0")
    app.button(key=down).click().run()
    assert (app.button(key=up).label, app.button(key=down).label) == ("1", "1")
    app.button(key=up).click().run()
    assert (app.button(key=up).label, app.button(key=down).label) == ("2", "0")
    app.button(key=up).click().run()
    assert (app.button(key=up).label, app.button(key=down).label) == ("1", "0")
    with open_notes(folder) as notes:
        assert notes.votes(RARE) == {"somebody else": 1}


def test_a_problem_is_a_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = open_page(FEATURE, sae="tiny", feature=str(RARE))
    field(app, "Tags").set_value(["x" * 201]).run()
    assert not app.exception
    assert any("a tag needs a name" in each.value for each in app.error)
