"""The explorer's Steer page: the texts are those of `saescope steer`, and its link says it all."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import streamlit as st
import torch
from streamlit.testing.v1 import AppTest

import sae
from activations import load_model
from dashboards import find_stores, model_cache
from dashboards.edits import Edit, edits_of, steer_arguments
from dashboards.model_cache import SteeredText
from dashboards.tokens import steered_html
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.commands.steer import SteerConfig, steer_text
from sae.steering.positions import Role
from saescope.errors import InputError
from store import FeatureStore
from tests.e2e.test_explorer import links, open_page, parameter, shown
from tests.tiny import make_tiny_harvest, make_tiny_model
from tests.tiny_store import D_SAE, RARE, make_tiny_store

STEER = "steer"
PROMPT = "The river rose in the"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a harvest, an SAE and its store."""
    work = tmp_path_factory.mktemp("steered")
    harvest = make_tiny_harvest(work, make_tiny_model(work / "model"))
    torch.manual_seed(1)
    made = TopKSAE(TopKConfig(d_sae=64, k=6), 32).eval()
    model = load_model(str(work / "model"))
    made.metadata = {
        "site": "blocks.1.hook_resid_post",
        "harvest": str(harvest),
        "model_spec": str(work / "model"),
        "model_hash": model.weights_hash,
    }
    made.save(work / "run")
    sae.index(sae.IndexConfig(run=str(work / "run"), out=str(work / "stores" / "a")))
    return work


@pytest.fixture(autouse=True)
def nothing_loaded() -> Iterator[None]:
    model_cache.forget_all()
    yield
    model_cache.forget_all()
    st.cache_resource.clear()
    st.cache_data.clear()


@pytest.mark.parametrize("temperature", [0.0, 0.2])
def test_texts_are_those_of_the_command(made: Path, temperature: float) -> None:
    wanted = steer_text(
        SteerConfig(
            run=str(made / "run"),
            prompt=PROMPT,
            add=("5=300",),
            clamp=("7=12.5",),
            ablate=(9,),
            max_new_tokens=12,
            temperature=temperature,
            seed=3,
        )
    )
    options = {"max_new_tokens": 12, "temperature": temperature, "seed": 3}
    edits = steer_arguments(edits_of("add:5:300,clamp:7:12.5,ablate:9", 64))
    with FeatureStore.open(made / "stores" / "a") as store:
        streams = {
            name: list(model_cache.continuations(store, PROMPT, given, options))
            for name, given in (("untouched", {}), ("steered", edits))
        }
    assert wanted["steered"] != wanted["untouched"]
    for name, stream in streams.items():
        # the command leaves out the BOS that the tokenizer adds
        assert "".join(stream[-1].tokens[1:]) == wanted[name]
        lengths = [len(text.tokens) for text in stream]
        assert lengths == sorted(lengths)
        assert lengths[0] == stream[0].prompt, "the prompt alone is shown first"
        assert len(stream) >= lengths[-1] - lengths[0]


def test_what_a_role_says_is_steered(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}A:"
    options = {"max_new_tokens": 3, "temperature": 0.0, "seed": 0}
    messages = [{"role": "user", "content": "The river"}]
    with FeatureStore.open(made / "stores" / "a") as store:
        tokenizer = model_cache.load(model_cache.origin_of(store), "auto").model.tokenizer
        monkeypatch.setattr(tokenizer, "chat_template", template)
        edits: dict[str, Any] = {"add": {5: 300.0}}
        roles: tuple[tuple[Role, str | None], ...] = (("user", "The river"), ("assistant", None))
        for role, wanted in roles:
            *_, last = model_cache.continuations(store, messages, edits, options, role)
            among = "".join(t for t, e in zip(last.tokens, last.edited, strict=True) if e)
            new = "".join(last.tokens[last.prompt : -1]).replace("<bos>", "")
            assert among.strip() == (new.strip() if wanted is None else wanted)
            assert "".join(last.tokens[1 : last.prompt]) == "user: The river\nA:"
        with pytest.raises(InputError, match="nobody says anything in this role"):
            next(model_cache.continuations(store, messages, edits, options, "system"))


def test_which_tokens_were_steered(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(str(made / "model"))
    count = len(model.tokenize(PROMPT))
    options = {"max_new_tokens": 3, "temperature": 0.0, "seed": 0}
    with FeatureStore.open(made / "stores" / "a") as store:
        steps = list(model_cache.continuations(store, PROMPT, {"add": {5: 1.0}}, options))
    whole = steps[-1]
    assert whole.prompt == count
    # the BOS is special, and the token that came last has not been through the model
    assert whole.edited == [False] + [True] * (len(whole.tokens) - 2) + [False]
    options["max_new_tokens"] = 8
    for positions in ("prompt", "generated"):
        with FeatureStore.open(made / "stores" / "a") as store:
            edits: dict[str, Any] = {"add": {5: 300.0}}
            *_, last = model_cache.continuations(store, PROMPT, edits, options, positions)
        with sae.steer(model, sae.load(made / "run"), **edits, positions=positions):
            expected = model.generate_ids(PROMPT, max_new_tokens=8)
        assert last.tokens == model.token_strings(expected)
        new = len(last.tokens) - count
        prompt, rest = ([True] * (count - 1), [False] * new)
        if positions == "generated":
            prompt, rest = [False] * (count - 1), [True] * (new - 1) + [False] * (new > 0)
        assert last.edited == [False, *prompt, *rest]
    html = steered_html(["a", " <b>", "\n"], 2, [False, True, False])
    assert html.count("ss-peak") == 1
    assert html.count("ss-far") == 2
    assert "&lt;b&gt;" in html
    assert "\nsteered\nposition 1" in html


def test_edits_and_their_text() -> None:
    text = "add:5:8,clamp:6:-0.125,scale:7:0,ablate:8"
    edits = edits_of(text, 64)
    assert [edit.text for edit in edits] == text.split(",")
    assert steer_arguments(edits) == {
        "add": {5: 8.0},
        "clamp": {6: -0.125},
        "scale": {7: 0.0},
        "ablate": [8],
    }
    for value in (0.1, 33.14159, 1e-7):
        assert edits_of(Edit("add", 1, value).text, 2)[0].amount == value
    for wrong in (
        "add:64:1",
        "add:-1:1",
        "add:5",
        "add:5:x",
        "add:5:nan",
        "ablate:5:1",
        "plus:5:1",
        "add:5:inf",
        "5",
        "add:" + "9" * 5000 + ":1",
    ):
        with pytest.raises(InputError, match=r"not an edit.*given"):
            edits_of(wrong, 64)
    with pytest.raises(InputError, match="too many"):
        edits_of(",".join(["ablate:1"] * 21), 64)
    with pytest.raises(InputError, match="edited twice"):
        steer_arguments([Edit("add", 5, 1.0), Edit("ablate", 5)])


def test_ends_of_a_signed_sae_are_edits_of_its_features() -> None:
    signed = SimpleNamespace(signed=True, d_sae=8)
    edits = {"add": {12: 2.0, 1: 3.0}, "clamp": {13: 5.0}, "scale": {14: 0.5}, "ablate": [15, 0]}
    assert model_cache._of_the_sae(edits, signed) == {
        "add": {4: -2.0, 1: 3.0},
        "clamp": {5: -5.0},
        "scale": {6: 0.5},
        "ablate": [7, 0],
    }
    assert model_cache._of_the_sae(edits, SimpleNamespace(signed=False)) == edits
    bounds = {"at_least": {12: 2.0}, "at_most": {13: 3.0, 1: 5.0}, "project": {14: 0.5}}
    assert model_cache._of_the_sae({**bounds, "cap": {2: 1.0}}, signed) == {
        "at_most": {4: -2.0, 1: 5.0},
        "at_least": {5: -3.0},
        "project": {6: 0.5},
        "cap": {2: 1.0},
    }
    with pytest.raises(InputError, match="only a feature's positive end can be capped"):
        model_cache._of_the_sae({"cap": {12: 1.0}}, signed)
    with pytest.raises(InputError, match="both ends"):
        model_cache._of_the_sae({"add": {4: 1.0}, "ablate": [12]}, signed)


# ---- the page -----------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The continuations that were asked for; a stand-in for the model."""
    asked: list[Any] = []

    def continuations(
        _store: object,
        prompt: Any,
        edits: Mapping[str, Any],
        options: Mapping[str, Any],
        positions: str,
    ) -> Iterator[SteeredText]:
        asked.append((prompt, dict(edits), dict(options)))
        if positions != "kept":
            asked[-1] += (positions,)
        words = [f" {word}" for word in str(prompt).split()]
        for new in (["."], [".", " steered" if edits else " <plain>"]):
            tokens = [*words, *new]
            edited = [False] + [True] * (len(tokens) - 2) + [False]
            yield SteeredText(tokens, len(words), edited)

    monkeypatch.setattr(model_cache, "continuations", continuations)
    return asked


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_tiny_store(tmp_path)
    monkeypatch.setenv(find_stores.STORES_VARIABLE, str(tmp_path))
    return tmp_path


def press(app: AppTest, label: str) -> AppTest:
    (button,) = [b for b in app.button if b.label == label]
    button.click().run()
    assert not app.exception, app.exception
    return app


def test_roles_can_be_chosen_of_a_chat(folder: Path, runs: list[Any]) -> None:
    link = {"prompt": "user: A star", "edits": f"add:{RARE}:2", "where": "user"}
    app = open_page(STEER, **link, mode="chat")
    assert runs[-1][0] == [{"role": "user", "content": "A star"}]
    assert runs[-1][-1] == "user"
    assert parameter(app, "where") == "user"
    app.session_state["steer_mode"] = "text"
    app.run()
    assert not app.exception
    assert app.session_state["steer_where"] == "kept"
    (said,) = open_page(STEER, **link).warning
    assert "where in the address" in said.value
    assert "user" not in said.value


def test_a_prompt_is_steered(folder: Path, runs: list[Any]) -> None:
    app = open_page(STEER)
    assert "No feature is edited yet" in shown(app)
    assert "Add a feature to steer" in press(app, "Continue the prompt").warning[0].value
    press(app, "Add a feature")
    app.number_input(key="steer_feature_0").set_value(RARE).run()
    press(app, "3 ×")
    assert app.number_input(key="steer_amount_0").value == 4.5, "three times its strongest, 1.5"
    press(app, "Continue the prompt")
    options = {"max_new_tokens": 40, "temperature": 0.0, "seed": 0}
    assert runs == [
        ("The weather today", {}, options),
        ("The weather today", {"add": {RARE: 4.5}}, options),
    ]
    text = shown(app)
    assert "##### Untouched" in text
    assert "&lt;plain&gt;" in text
    assert "steered, 3 of 5" in text or "positions, 3 of 5" in text
    assert (parameter(app, "edits"), parameter(app, "prompt")) == (
        f"add:{RARE}:4.5",
        "The weather today",
    )
    # another dose needs the steered text alone
    press(app, "1 ×")
    assert "steered with" in shown(app).lower(), "the last texts stay until they are asked for anew"
    press(app, "Continue the prompt")
    assert [edits for _, edits, _ in runs[2:]] == [{"add": {RARE: 1.5}}]
    app.selectbox(key="steer_kind_0").set_value("ablate").run()
    assert app.number_input(key="steer_amount_0").disabled
    assert parameter(app, "edits") == f"ablate:{RARE}"
    app.button(key="steer_remove_0").click().run()
    assert "No feature is edited yet" in shown(app)


def test_a_link_says_it_all(folder: Path, runs: list[Any]) -> None:
    state = {
        "prompt": "A *star*",
        "edits": f"add:{RARE}:2,ablate:5",
        "where": "generated",
        "tokens": "7",
        "temperature": "0.5",
        "seed": "11",
    }
    app = open_page(STEER, **state)
    options = {"max_new_tokens": 7, "temperature": 0.5, "seed": 11}
    assert runs[-1] == ("A *star*", {"add": {RARE: 2.0}, "ablate": [5]}, options, "generated")
    assert {name: parameter(app, name) for name in state} == state
    shared = parse_qs(urlsplit(app.code[0].value).query)
    assert {name: value[0] for name, value in shared.items()} == {**state, "sae": "tiny"}
    names = [label for label, _ in links(app)]
    assert any(label.startswith(f"{RARE} ") and len(label) > 4 for label in names), "by top tokens"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"edits": "add:5"}, "not an edit"),
        ({"edits": f"ablate:{D_SAE}"}, "not an edit"),
        ({"seed": "x"}, "seed in the address"),
        ({"where": "here"}, "where in the address is none of kept, prompt, generated"),
        ({"tokens": "100000"}, "tokens in the address"),
        ({"temperature": "-1"}, "temperature in the address"),
    ],
)
def test_wrong_links(folder: Path, runs: list[Any], given: dict[str, str], message: str) -> None:
    app = open_page(STEER, **({"prompt": "a", "edits": "ablate:5"} | given))
    assert message in app.warning[0].value
    assert not runs, "nothing is done until the reader has seen it"


def test_what_cannot_be_done_is_a_sentence(folder: Path, runs: list[Any]) -> None:
    app = open_page(STEER, prompt="a", edits="add:5:1,ablate:5")
    assert "edited twice" in app.error[0].value
    app = open_page(STEER, edits="ablate:5")
    app.text_area(key="steer_prompt").set_value(" ")
    assert "Type a prompt" in press(app, "Continue the prompt").warning[0].value
    assert not runs


def test_without_the_model_it_is_a_sentence(folder: Path) -> None:
    app = open_page(STEER, prompt="a", edits="ablate:5")
    assert "does not say which model" in app.error[0].value.replace("\\", "")


def test_edits_of_another_sae_are_dropped(folder: Path, runs: list[Any]) -> None:
    shutil.copytree(folder / "tiny", folder / "second")
    app = open_page(STEER, sae="tiny", prompt="a", edits="ablate:5")
    app.selectbox(key="sae_choice").set_value("second").run()
    assert "No feature is edited yet" in shown(app)
    assert not app.exception
