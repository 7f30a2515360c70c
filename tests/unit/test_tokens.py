"""Tokens as HTML: whatever the text, nothing of it becomes markup, and nothing stays invisible."""

import html
import re
import unicodedata
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboards.parameters import choose_feature, choose_sae
from dashboards.tokens import (
    effects_html,
    example_html,
    examples_html,
    facts_html,
    feature_url,
    per_token_html,
    plain,
    plain_visible,
    shade,
    text_html,
    token_html,
    visible,
)
from store.results import Example
from tests.tiny_store import WORDS

ALLOWED = {"span", "div", "b", "a", "br"}
texts = st.text(max_size=30) | st.sampled_from(
    ["<script>alert(1)</script>", '"><img src=x onerror=y>', "&lt;", "'\" onmouseover='x", "\u202e"]
)


class Reader(HTMLParser):
    """Collects tags, attributes and text as a browser would see them."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.shown = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.shown += data


def example(text: str, title: str = "Title") -> Example:
    return Example(
        kind="top", interval=-1, rank=0, sequence=1, index=2, start=1, position=18,
        activation=2.5, document=4, title=title, token_ids=[1, 2, 3],
        tokens=["a", text, " b\n"], activations=[0.0, 2.5, 0.5],
        same_document=[True, True, False],
    )  # fmt: skip


def everything(text: str) -> list[str]:
    """Each function that makes HTML, given the text wherever it takes one."""
    return [
        visible(text),
        token_html(text, 1.0, 2.0, text, peak=True, far=True),
        example_html(example(text, title=text), 5.0, line_breaks=True),
        examples_html([example(text)] * 2, 5.0),
        text_html([text, text], [0.0, 1.0], 1.0, [False, True]),
        effects_html([(text, 1.0)], [(text, -1.0), (text, -2.0)]),
        facts_html([(text, text)]),
        per_token_html([(0, text, [(3, text, 1.0, 0.5), (4, "", 1.0, 2.0)])], text),
    ]


@given(texts)
def test_no_text_becomes_markup(text: str) -> None:
    for made in everything(text):
        reader = Reader(made)
        assert set(reader.tags) <= ALLOWED
        names = {name for name, _ in reader.attributes}
        assert names <= {"class", "style", "data-tip", "href", "target", "title"}
        # a '<' of ours begins one of our tags; every other one is escaped
        assert all(re.match(r"</?(span|div|b|a|br)\b", made[m.start() :])
                   for m in re.finditer("<", made))  # fmt: skip
        for name, value in reader.attributes:
            if name == "style":
                assert re.fullmatch(r"background:rgba\(\d+,\d+,\d+,[\d.]+\)|", value or "")
            if name == "href":
                assert (value or "").startswith("feature?sae=")


@pytest.mark.parametrize("word", WORDS)
def test_every_word_of_a_vocabulary_is_escaped(word: str | bytes) -> None:
    text = word.decode("utf-8", "replace") if isinstance(word, bytes) else word
    assert not re.search(r"<(?!/?span)", visible(text))


@given(st.text(min_size=1, max_size=30))
def test_nothing_is_invisible_and_nothing_is_lost(text: str) -> None:
    shown = Reader(visible(text)).shown
    for character in shown:
        assert character in "\u200c\u200d" or unicodedata.category(character) not in (
            "Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp",
        )  # fmt: skip
    for character in text:
        number = f"[U+{ord(character):04X}]"
        assert any(sign in shown for sign in (character, number, "↵", "→"))


def test_signs() -> None:
    assert Reader(visible("a\n\tb")).shown == "a↵→b"
    assert Reader(visible("")).shown == "·"
    assert Reader(visible("x\u202ey\x00\u200b")).shown == "x[U+202E]y[U+0000][U+200B]"
    assert Reader(visible("\ud800")).shown == "[U+D800]"
    assert visible("क्‍ष") == "क्‍ष", "joiners inside words stay"
    assert plain_visible("a\u202eb\n") == "a[U+202E]b↵"


def test_an_example_says_what_is_where() -> None:
    reader = Reader(example_html(example(" river<"), 5.0))
    tips = [value or "" for name, value in reader.attributes if name == "data-tip"]
    assert tips[1] == " river<\nactivation 2.500\nsequence 1, position 2\nTitle"
    assert tips[0].endswith("position 1\nTitle")
    assert tips[2].endswith("position 3\nanother document")
    assert reader.shown == "2.50a river< b↵Title"
    classes = [value for name, value in reader.attributes if name == "class"]
    assert [c for c in classes if c and c.startswith("ss-t ")] == ["ss-t ss-peak", "ss-t ss-far"]
    styles = [value for name, value in reader.attributes if name == "style"]
    assert styles == [shade(0.5), shade(0.1)]


@given(texts, st.booleans(), st.integers(0, 2), st.sampled_from([0.0, 0.5, 2.5]))
def test_a_silent_token_is_as_any_other(text: str, same: bool, at: int, activation: float) -> None:
    activations = [0.0, 0.0, 0.0]
    activations[at] = activation
    shown = Example(
        kind="top", interval=-1, rank=0, sequence=1234, index=2, start=1, position=18,
        activation=2.5, document=4, title=text, token_ids=[1, 2, 3],
        tokens=[text, " b", text], activations=activations, same_document=[same, True, same],
    )  # fmt: skip
    title = plain_visible(text or "untitled")
    tokens = [
        token_html(
            token,
            active,
            5.0,
            f"{plain_visible(token)}\nactivation {active:.3f}\n"
            f"sequence 1,234, position {position}\n{title if here else 'another document'}",
            peak=position == 2,
            far=not here,
        )
        for token, active, position, here in zip(
            shown.tokens, activations, (1, 2, 3), shown.same_document, strict=True
        )
    ]
    assert f'<div class="ss-text">{"".join(tokens)}</div>' in example_html(shown, 5.0)


def test_line_breaks_only_where_asked() -> None:
    assert "<br>" not in example_html(example("a\nb\n"), 5.0)
    assert example_html(example("a\nb\n"), 5.0, line_breaks=True).count("<br>") == 3


def test_shading_grows_with_activation_and_is_bounded() -> None:
    def alpha(strength: float) -> float:
        return float(shade(strength).split(",")[-1].rstrip(")"))

    assert shade(0) == ""
    assert shade(-1) != shade(1)
    assert alpha(-1) == alpha(1)
    assert alpha(0.01) < alpha(0.5) < alpha(1.0)
    assert alpha(7.0) == alpha(1.0) < 0.7, "text stays readable"


@given(texts)
def test_markdown_shows_text_as_it_is(text: str) -> None:
    made = plain(text)
    # every character with a meaning in Markdown has a backslash before it
    bare = re.sub(r"\\.", "", made)
    assert not re.search(r"[*_`\[\]<>$:#|~^]", bare)
    assert "\n" not in made


def test_links_are_quoted() -> None:
    assert feature_url("a&b=<c>", 3) == "feature?sae=a%26b%3D%3Cc%3E&feature=3"
    made = per_token_html([(0, "x", [(3, "", 1.0, 1.0)])], 'a" onclick="x')
    (link,) = [value for name, value in Reader(made).attributes if name == "href"]
    assert link == html.unescape(feature_url('a" onclick="x', 3))


@pytest.mark.parametrize(
    ("raw", "value", "problem"),
    [
        (None, 5, ""), ("0", 0, ""), ("63", 63, ""), (" 7 ", 7, ""),
        ("64", 63, "63"), ("1000000000", 63, "1000000000"), ("-1", 0, "not -1"),
        ("abc", 5, "'abc'"), ("", 5, "not the number"), ("1.5", 5, "not the number"),
        ("9" * 5000, 63, "63"), ("../../etc", 5, "not the number"), ("x" * 900, 5, "…"),
    ],
)  # fmt: skip
def test_feature_parameters(raw: str | None, value: int, problem: str) -> None:
    chosen = choose_feature(raw, 64, 5)
    assert chosen.value == value
    assert problem in chosen.problem
    assert bool(problem) == bool(chosen.problem)
    assert len(chosen.problem) < 150


@given(st.none() | st.text(max_size=60), st.integers(1, 10**6))
def test_any_feature_parameter_gives_a_feature(raw: str | None, d_sae: int) -> None:
    assert 0 <= choose_feature(raw, d_sae, d_sae - 1).value < d_sae


def test_sae_parameters() -> None:
    assert choose_sae("b", ["a", "b"], "a").value == "b"
    assert choose_sae(None, ["a", "b"], "b").problem == ""
    for wrong in ("../../etc", "", "A", "a/../b", "x" * 10_000):
        chosen = choose_sae(wrong, ["a", "b"], "a")
        assert chosen.value == "a"
        assert "no SAE named" in chosen.problem
        assert len(chosen.problem) < 150
