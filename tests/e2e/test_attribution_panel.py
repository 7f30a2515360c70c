"""Attribution on the feature page: its states, and numbers set by hand in its pictures."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from dashboards import attribution_figures, model_cache, queries
from dashboards.panels.attribution import OPEN
from dashboards.session import text_features_key
from sae.analysis.attention.attribution import Attribution
from saescope.errors import ArtefactError
from store import FeatureStore
from tests import tiny_store
from tests.e2e.test_explorer import FEATURE, folder, made, open_page, shown
from tests.tiny_store import DEAD, RARE

__all__ = ["folder", "made"]  # fixtures


def by_hand(position: int = 5, feature: int = RARE) -> Attribution:
    """Two heads: 0.0 brings 2 from position 1, 1.1 brings -0.5 from the destination."""
    sources = np.zeros((2, position + 1))
    sources[0, 1], sources[1, position] = 2.0, -0.5
    return Attribution(
        feature=feature,
        site="blocks.1.hook_resid_post",
        token_ids=list(range(position + 1)),
        tokens=["<|bos|>", " a<b>", *[" x"] * (position - 2), " end"],
        position=position,
        pre_activation=1.5,
        activation=1.5,
        heads=[(0, 0), (1, 1)],
        sources=sources,
        components={"embedding": 0.25, "MLP 0": 1.0, "MLP 1": -0.5},
        biases={"SAE encoder bias": -0.75, "SAE decoder bias": 0.0, "attention 0 output bias": 0.0},
        rounding=0.0,
    )


@pytest.fixture
def asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the model was asked; a stand-in for it answers."""
    questions: list[tuple[Any, ...]] = []

    def answer(_store: object, number: int, token_ids: Any, position: int | None) -> Attribution:
        questions.append((number, tuple(token_ids), position))
        return by_hand(5 if position is None else position, number)

    monkeypatch.setattr(model_cache, "origin_of", lambda _store: None)
    monkeypatch.setattr(model_cache, "attribution", answer)
    return questions


def opened(number: int = RARE, **state: Any) -> AppTest:
    app = open_page(FEATURE, sae="tiny", feature=str(number))
    app.session_state[OPEN] = True
    for name, value in state.items():
        app.session_state[name] = value
    app.run()
    assert not app.exception, app.exception
    return app


def attribute(app: AppTest) -> AppTest:
    (button,) = [each for each in app.button if each.label == "Attribute"]
    button.click().run()
    assert not app.exception, app.exception
    return app


def charts(app: AppTest) -> list[dict[str, Any]]:
    """What of the panel's charts is drawn."""
    figures = [json.loads(each.proto.spec) for each in app.get("plotly_chart")]
    return [each for each in figures if "from “" in str(each) or each["data"][0].get("orientation")]


def test_nothing_is_read_before_it_is_opened_nor_run_before_it_is_asked(asked: list) -> None:
    app = open_page(FEATURE, sae="tiny", feature=str(RARE))
    assert not [each for each in app.button if each.label == "Attribute"]
    app = opened()
    assert "loaded when you ask for it" in shown(app)
    assert asked == []
    assert not charts(app)


def test_a_dead_feature_has_none(asked: list) -> None:
    app = opened(DEAD[0])
    assert not [each for each in app.button if each.label == "Attribute"]


def test_the_strongest_example_at_its_strongest_token(asked: list, folder: Path) -> None:
    app = attribute(opened())
    with FeatureStore.open(folder / "tiny") as store:
        example = store.examples(RARE, "top", None)[0]
    assert asked == [(RARE, tuple(example.token_ids), 5)]
    said = shown(app)
    assert (
        "Pre-activation **1.50** = 1.50 from attention heads + 0.50 from MLPs + 0.25 from the"
        in (said)
    )
    assert "− 0.75 from biases" in said
    assert "The store has the activation 1.50; here it is 1.50, computed in float32" in said
    assert "a&lt;b&gt;" in said
    assert " a<b>" not in said
    assert "through attention +2.000\nposition 1" in said
    assert "position 5, the destination" in said
    bars, cells = charts(app)
    assert bars["data"][0]["y"][:3] == ["head 0.0", "MLP 0", "SAE encoder bias"]
    assert cells["data"][0]["y"] == ["head 0.0", "head 1.1"]
    assert "The heat map has all heads and sources." in said


def pills(app: AppTest) -> Any:
    """The choice of a head."""
    (found,) = [x for x in app.get("button_group") if str(x.key).startswith("attribution_through")]
    return found


def test_the_sources_of_one_head(asked: list) -> None:
    app = attribute(opened())
    options = [each.content for each in pills(app).proto.options]
    assert options == ["head 0.0 +2.00", "head 1.1 -0.50"]
    assert "through attention -0.500\nposition 5, the destination" in shown(app)
    pills(app).select(1).run()
    said = shown(app)
    assert "through head 1.1 -0.500\nposition 5, the destination" in said
    assert "through head 1.1 +0.000\nposition 1" in said
    assert "what head 1.1 brought from it" in said
    assert not app.exception
    pills(app).unselect(1).run()
    assert "through attention +2.000\nposition 1" in shown(app)


def test_the_heads_with_most_in_them() -> None:
    one = replace(by_hand(), sources=np.zeros((2, 6)))
    assert attribution_figures.largest_heads(one) == []
    many = np.zeros((9, 6))
    many[:, 3] = [1, -9, 2, 3, 0, 4, -5, 6, 7]
    nine = replace(one, sources=many, heads=[(0, n) for n in range(9)])
    assert attribution_figures.largest_heads(nine) == [1, 8, 7, 6, 5, 3]


def test_another_text_is_not_shown_with_the_first_ones_answer(asked: list) -> None:
    app = attribute(opened(3))
    assert "Pre-activation" in shown(app)
    app.selectbox(key="attribution_text_tiny_3").set_value(1).run()
    assert "Pre-activation" not in shown(app)
    attribute(app)
    assert len(asked) == 2
    assert asked[0] != asked[1]
    assert "more than rounding apart" in shown(app)


def test_a_destination_is_a_token_at_which_it_fires(asked: list, folder: Path) -> None:
    with FeatureStore.open(folder / "tiny") as store:
        example = store.examples(3, "top", None)[0]
    fires = {at for at, value in enumerate(example.activations) if value > 0}
    app = opened(3)
    field = app.selectbox(key="attribution_at_tiny_3_0")
    assert field.value == example.index
    assert {int(each.rpartition(" ")[2]) for each in field.options} == fires
    other = max(fires - {example.index})
    field.set_value(other).run()
    attribute(app)
    assert asked[-1][2] == other


def prompted(folder: Path, feature: int) -> Any:
    """What Prompt keeps of a text on which a feature fires at positions 1 and 2."""
    text = SimpleNamespace(
        token_ids=[1, 2, 3],
        tokens=["<|bos|>", " the", " river"],
        feature=np.array([feature, feature]),
        position=np.array([1, 2]),
        activation=np.array([0.5, 2.0]),
    )
    version = queries.version_of(folder / "tiny" / "features.duckdb")
    return (version, "the river", "text"), text


def test_the_readers_own_text(asked: list, folder: Path) -> None:
    for feature, position in ((RARE, 2), (RARE + 1, None)):
        asked.clear()
        app = opened(RARE, **{text_features_key("tiny"): prompted(folder, feature)})
        field = app.selectbox(key=f"attribution_text_tiny_{RARE}")
        assert field.options[-1] == "your text, the last on Prompt · <|bos|> the [river]"
        field.set_value(len(field.options) - 1).run()
        attribute(app)
        assert asked == [(RARE, (1, 2, 3), position)]
        assert "The store has" not in shown(app)


def test_a_store_without_its_model_says_so(folder: Path) -> None:
    app = opened()
    assert "because the model cannot be run" in shown(app)
    assert "does not say which model and SAE made it" in shown(app)
    assert not [each for each in app.button if each.label == "Attribute"]


def test_another_site_says_where_there_is_attribution(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny_store.META, "site", "blocks.1.hook_mlp_out")
    tiny_store.make_tiny_store(folder)
    said = shown(opened())
    assert "This SAE reads blocks\\.1\\.hook\\_mlp\\_out" in said
    assert "z, attn\\_out, resid\\_pre" in said


def test_another_sae_in_its_place_is_a_sentence(
    asked: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = attribute(opened())

    def refuse(*_: object) -> None:
        raise ArtefactError("is about another SAE than the one that is now in its folder")

    monkeypatch.setattr(model_cache, "attribution", refuse)
    attribute(app)
    assert "is about another SAE" in app.error[0].value
    assert "Pre-activation" not in shown(app)


def test_the_largest_parts_are_drawn_and_the_others_summed() -> None:
    found = by_hand()
    many = np.zeros((40, 30))
    many[np.arange(40), np.arange(40) % 30] = np.arange(40) - 10.0
    big = Attribution(
        **{
            **vars(found),
            "heads": [(0, n) for n in range(40)],
            "sources": many,
            "tokens": [" t"] * 30,
            "position": 29,
        }
    )
    bars: Any = attribution_figures.part_bars(big).data[0]
    assert bars.y[0] == "head 39"
    assert bars.y[-1] == f"{40 + 6 - attribution_figures.BARS} others"
    assert sum(bars.x) == pytest.approx(many.sum() + 0.75 - 0.75)
    cells: Any = attribution_figures.head_by_source(big).data[0]
    assert list(cells.y) == [f"head {n}" for n in range(30, 40)]
    assert (cells.z.shape, cells.z.max(), cells.zmax) == ((10, 16), 29, 29)
    assert "10 of 40 heads and 16 of 30 source tokens" in attribution_figures.left_out(big)
    assert f"sum to +{sum(range(20, 30)):.2f}; all sum to +{many.sum():.2f}" in (
        attribution_figures.left_out(big)
    )
