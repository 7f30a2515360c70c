"""The explorer's Prompt page: what is drawn, in the page's own state and in its address."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from dashboards import find_stores, model_cache, prompt_grid
from dashboards.prompt_grid import Cell, Choice
from dashboards.tokens import plain
from saescope.chat import messages_of
from saescope.errors import InputError
from store import Annotations, FeatureStore
from tests.e2e.test_explorer import links, open_page, parameter, shown
from tests.tiny_store import EVERYWHERE, RARE, make_tiny_store

PROMPT = "text"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of stores with one store in it, named tiny; a stand-in for its model."""
    make_tiny_store(tmp_path)
    monkeypatch.setenv(find_stores.STORES_VARIABLE, str(tmp_path))
    monkeypatch.setattr(model_cache, "features_of_text", features_of)
    yield tmp_path
    st.cache_resource.clear()
    st.cache_data.clear()


def features_of(_store: object, text: str) -> Any:
    """Feature 5 on every word after the first, EVERYWHERE too, and RARE on the second."""
    if text == "too long":
        raise InputError("the text is longer than the model's context", given="999 tokens")
    tokens = [f" {word}" for word in text.split()]
    n = len(tokens)
    keep = [at > 0 and "<|" not in tokens[at] for at in range(n)]
    entries = [(at, 5, 0.5) for at in range(n) if keep[at]]
    entries += [(at, EVERYWHERE, 4.0) for at in range(n) if keep[at]]
    entries += [(1, RARE, 3.0)] if n > 1 else []
    columns = list(zip(*entries, strict=True)) or [(), (), ()]
    return SimpleNamespace(
        token_ids=list(range(n)),
        tokens=tokens,
        keep=keep,
        position=np.array(columns[0], dtype=np.int32),
        feature=np.array(columns[1], dtype=np.int32),
        activation=np.array(columns[2], dtype=np.float32),
    )


def send(app: AppTest, text: str) -> AppTest:
    app.text_area(key="text").set_value(text)
    (button,) = [b for b in app.button if b.label == "Show features"]
    button.click().run()
    assert not app.exception, app.exception
    return app


def grid(app: AppTest) -> dict[str, Any]:
    """What the picture was given to draw."""
    (element,) = app.get("bidi_component")
    return json.loads(element.proto.json)


def test_what_is_drawn_by_hand() -> None:
    result = features_of(None, "old <|x|> harbour")
    result.position = np.array([2, 2, 2], dtype=np.int32)
    result.feature = np.array([1, 2, 3], dtype=np.int32)
    result.activation = np.array([1.0, 8.0, 2.0], dtype=np.float32)
    strongest, density = {1: 2.0, 2: 32.0, 3: 2.0}, {1: 0.001, 2: 0.5, 3: 0.02}
    cells = prompt_grid.cells_of(result, strongest, density, Choice())
    assert cells == [Cell(2, 1, 1.0, 0.5), Cell(2, 2, 8.0, 0.25), Cell(2, 3, 2.0, 1.0)]
    assert prompt_grid.drawn_features(cells, Choice()) == [3, 1, 2]
    assert prompt_grid.drawn_features(cells, Choice(by="activation")) == [2, 3, 1]
    assert prompt_grid.drawn_features(cells, Choice(per_token=1)) == [3]
    few = prompt_grid.cells_of(result, strongest, density, Choice(densest=0.02))
    assert [cell.feature for cell in few] == [1, 3], "one that fires on half of all is left out"
    unseen = prompt_grid.cells_of(result, {}, {}, Choice())
    assert {cell.share for cell in unseen} == {1.0}

    data = prompt_grid.picture(result, cells, [3, 1], {3: "three"}, Choice())
    assert [token["text"] for token in data["tokens"]] == [" old", " harbour"]
    assert [token["read"] for token in data["tokens"]] == [False, True]
    assert "position 0, which SAEs never read" in data["tokens"][0]["tip"]
    assert data["features"] == [{"feature": 3, "name": "three"}, {"feature": 1, "name": ""}]
    assert [(c["row"], c["column"], c["strength"]) for c in data["cells"]] == [
        (1, 1, 0.5),
        (0, 1, 1.0),
    ]
    assert data["cells"][0]["tip"] == "activation 1.000 · 50 % of its strongest"

    effects = np.array([0.02, -0.5, np.nan], dtype=np.float32)
    by_effect = Choice(by="effect")
    cells = prompt_grid.cells_of(result, strongest, density, by_effect, effects)
    assert prompt_grid.drawn_features(cells, by_effect) == [2, 1, 3], "by size, whatever the sign"
    assert cells[1].words().endswith(" · loss -0.500 without it")
    assert cells[2].effect is None, "nothing follows the last token"
    data = prompt_grid.picture(result, cells, [cells[0].feature], {}, by_effect)
    assert data["cells"][0]["strength"] == 1.0
    whole = prompt_grid.picture(result, cells, [3], {}, Choice(special=True))
    assert [token["text"] for token in whole["tokens"]] == [" old", " <|x|>", " harbour"]
    assert "a special token" in whole["tokens"][1]["tip"]


def test_every_token_has_its_first_feature_before_any_has_its_second() -> None:
    cells = [Cell(1, 10, 1.0, 0.9), Cell(1, 11, 1.0, 0.8), Cell(2, 12, 1.0, 0.1)]
    assert prompt_grid.drawn_features(cells, Choice(most=2)) == [10, 12]
    cells += [Cell(2, 13, 1.0, 0.05)]
    assert prompt_grid.drawn_features(cells, Choice(most=2), locked=2) == [12, 13]


def test_a_prompt(folder: Path) -> None:
    with Annotations.open(folder / "tiny", sae_hash="5ae") as notes:
        notes.set_label(RARE, "a <rare> one")
    app = open_page(PROMPT)
    assert not app.get("bidi_component"), "nothing is loaded before it is asked for"
    assert "10 to 60 seconds" in shown(app)
    send(app, "old <b>harbour</b> town")
    data = grid(app)
    assert data["features"][0] == {"feature": RARE, "name": "a <rare> one"}
    with FeatureStore.open(folder / "tiny") as store:
        tokens = [token.strip() for token in store.top_tokens([5], 3)[5]]
        top = store.feature(5).max
    assert {f["feature"]: f["name"] for f in data["features"]}[5].split(" · ")[0] == tokens[0]
    assert {c["share"] for c in data["cells"] if c["feature"] == 5} == {0.5 / top}
    assert [token["text"] for token in data["tokens"]] == [" old", " <b>harbour</b>", " town"]
    text = shown(app)
    assert "&lt;b&gt;harbour&lt;/b&gt;" in text
    assert "<b>harbour" not in text
    assert f"feature?sae=tiny&amp;feature={RARE}" in text
    assert "3 tokens, 3 features fire" in text
    assert parameter(app, "text") == "old <b>harbour</b> town"

    app.select_slider(key="prompt_densest").set_value(0.3).run()
    assert EVERYWHERE not in [f["feature"] for f in grid(app)["features"]]
    app.button_group(key="prompt_by").set_value("activation").run()
    assert (parameter(app, "densest"), parameter(app, "by")) == ("0.3", "activation")
    app.select_slider(key="prompt_densest").set_value(0.001).run()
    assert "move the slider to the right" in app.info[0].value


def test_features_are_ordered_by_their_effect_on_the_loss(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def effects(_store: object, result: Any) -> np.ndarray:
        asked.append(result.token_ids)
        if len(result.token_ids) > 3:
            raise InputError("too long for effects")
        return np.where(result.feature == 5, -0.25, 0.125).astype(np.float32)

    monkeypatch.setattr(model_cache, "loss_effects", effects)
    app = open_page(PROMPT, text="old harbour town")
    assert not asked, "nobody wants it yet"
    app = open_page(PROMPT, text="old harbour town", by="effect", locked="5")
    assert grid(app)["features"][0]["feature"] == 5
    assert {c["strength"] for c in grid(app)["cells"] if c["feature"] == 5} == {1.0}
    assert "cross-entropy of the next token, in nats" in shown(app)
    app.run()
    assert len(asked) == 1, "once for a text"
    app = open_page(PROMPT, text="one of four words", by="effect")
    assert "too long for effects" in app.warning[0].value
    assert grid(app)["features"], "the rest is there"


def test_a_link_opens_the_prompt_as_it_was(folder: Path) -> None:
    app = open_page(
        PROMPT, text="old harbour town", by="activation", token="1", locked=str(RARE), densest="0.3"
    )
    assert grid(app)["locked"] == {"token": 1, "feature": RARE}
    text = shown(app)
    assert f"##### Feature {RARE} · " in text
    assert "strongest 3.00 on “ harbour” (200 % of its strongest in the store)" in text
    assert "##### Token “ harbour” at position 1" in text
    by_label = dict(links(app))
    assert by_label[f"Open feature {RARE}"].endswith(f"feature={RARE}")
    assert (
        f"edits=add%3A{RARE}%3A1.5&prompt=old+harbour+town"
        in by_label[f"Steer with feature {RARE}"]
    )
    assert app.button_group(key="prompt_by").value == "activation"
    assert parameter(app, "locked") == str(RARE), "the address stays as it was"
    assert parameter(app, "token") == "1"
    # what makes no sense is left out
    app = open_page(PROMPT, text="a b", by="nonsense", token="-4", locked="x", densest="7")
    assert grid(app)["locked"] == {"token": None, "feature": None}
    assert app.button_group(key="prompt_by").value == "share"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Type some text"),
        ("  \n ", "Type some text"),
        ("too long", "longer"),
        ("word", "one token, and SAEs never read position 0"),
        ("word <|x|>", "no more than special tokens"),
    ],
)
def test_text_that_cannot_be_used(folder: Path, text: str, message: str) -> None:
    app = send(open_page(PROMPT), text)
    assert message in [*app.warning, *app.error, *app.info][0].value
    assert not app.get("bidi_component")


def test_a_chat_goes_through_the_template(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def chat_text(_store: object, messages: Any) -> str:
        asked.append(messages)
        return "the template's own words"

    monkeypatch.setattr(model_cache, "chat_text", chat_text)
    app = open_page(PROMPT, text="system: Be brief.\nuser: Who?", mode="chat")
    assert asked == [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    ]
    assert [token["text"] for token in grid(app)["tokens"]][-1] == " words"
    assert parameter(app, "mode") == "chat"
    app = open_page(PROMPT, text="Hello.\nuser: Who?", mode="chat")
    assert "no speaker" in app.error[0].value
    with pytest.raises(InputError, match="without text"):
        messages_of("user:\nassistant: yes")


def test_several_saes_of_one_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder / "tiny", folder / "second")
    shutil.copytree(folder / "tiny", folder / "third")
    opened = FeatureStore.open

    def open_with_model(path: Path | str, **options: Any) -> FeatureStore:
        store = opened(path, **options)
        store.meta["model_hash"] = "b" if "third" in str(path) else "a"
        return store

    monkeypatch.setattr(FeatureStore, "open", open_with_model)
    app = open_page(PROMPT, sae="tiny", text="old harbour town")
    assert app.multiselect(key="prompt_with").options == ["second"]
    app.multiselect(key="prompt_with").set_value(["second"]).run()
    assert len(app.get("bidi_component")) == 2
    assert "##### tiny · blocks" in shown(app)
    assert "##### second · blocks" in shown(app)
    assert parameter(app, "with") == "second"
    app = open_page(PROMPT, sae="tiny", text="old town", **{"with": "second,gone"})
    assert len(app.get("bidi_component")) == 2


def test_a_features_page_marks_the_text_that_was_tested(folder: Path) -> None:
    kept = send(open_page(PROMPT), "old <b>harbour</b> town").session_state["prompt_result_tiny"]
    with FeatureStore.open(folder / "tiny") as store:
        below, n_active = store.activations_below(5, 0.5), store.feature(5).n_active
    for number, wanted in (
        (5, f"strongest 0.50 on “{plain(' <b>harbour</b>')}”. {below} of {n_active} activations"),
        (6, "It does not fire on your text"),
    ):
        app = open_page("feature", sae="tiny", feature=str(number))
        assert "your text" not in shown(app)
        app.session_state["prompt_result_tiny"] = kept
        assert wanted in shown(app.run())
    app.session_state["prompt_result_tiny"] = ((("another version",), "", "text"), kept[1])
    assert "your text" not in shown(app.run())
