"""A token or a phrase: where it stands, and which features fire on it, or stay silent."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from dashboards import figures, queries
from dashboards.amounts import COLUMN
from dashboards.pages import Page
from dashboards.queries import Version
from dashboards.session import Session, begin_page, link
from dashboards.tokens import examples_html, plain, shortened, spellings_html
from saescope.errors import InputError
from store import FeatureStore
from store.results import Occurrences, TokenFeatures
from store.token_queries import LONGEST_PHRASE

PAGE = Page(title="Token", icon=":material/match_word:", order=35, url="token")

BY = {"text": "Text", "begins": "Beginning", "id": "Token id"}
SPACES = {"any": "Either", "with": "With", "without": "Without"}
ORDERS = {
    "dice": "match",
    "share": "share",
    "lift": "× usual",
    "mean": "mean",
    "max": "strongest",
}
SIDES = {"fires": "Fires", "silent": "Silent"}
MOST_FEATURES, PER_PAGE, WINDOW = 200, 8, 16
_SPACE = {"any": None, "with": True, "without": False}
_CHOICES = {"by": BY, "space": SPACES, "order": ORDERS, "side": SIDES}
_SUGGESTED = 6
_LABEL = 24
"""characters of a label that its column, which cuts without a sign, has room for"""
_DAY = 86_400
_Question = tuple[str, str, str, bool]


def render() -> None:
    """Draw the page."""
    session = begin_page("Token", ("q", "feature", "case", *_CHOICES))
    _read_address()
    question = _question()
    if not question[0].strip(" "):
        _suggest(session)
        _write_address(None)
        return
    try:
        occurrences = _occurrences(session.store, session.version, question)
    except InputError as error:
        st.error(plain(error), icon=":material/error:")
        return
    if not occurrences.n:
        _nothing(session, question, occurrences)
        _write_address(None)
        return
    st.html(spellings_html(occurrences))
    left, right = st.columns([7, 6], gap="large")
    with left:
        chosen = _features(session, question, occurrences)
    with right:
        if chosen is not None:
            _places(session, occurrences, chosen)
    _write_address(chosen)


def _read_address() -> None:
    """Take over what the address says, once for each address."""
    state, given = st.session_state, st.query_params.to_dict()
    mine = {name: given[name] for name in ("q", "feature", "case", *_CHOICES) if name in given}
    if not mine or mine == state.get("token_address"):
        return
    state["token_q"] = mine.get("q", "")[:LONGEST_PHRASE]
    state["token_case"] = mine.get("case") == "any"
    for name, choices in _CHOICES.items():
        value = mine.get(name)
        state[f"token_{name}"] = value if value in choices else next(iter(choices))
        if value is not None and value not in choices:
            st.warning(
                f"{plain(name)}={plain(value[:40])} is none of {', '.join(choices)}.",
                icon=":material/link_off:",
            )
    number = mine.get("feature", "")
    if number.isascii() and number.isdigit() and len(number) < 10:
        state["token_feature"] = int(number)
        state["token_feature_of"] = None  # the question that the address asks


def _write_address(feature: int | None) -> None:
    """Say in the address what is shown, so that it can be shared."""
    state = st.session_state
    now = {"q": state["token_q"] or ""}
    for name, choices in _CHOICES.items():
        value = state.get(f"token_{name}")
        if value in choices and value != next(iter(choices)):
            now[name] = value
    if state.get("token_case"):
        now["case"] = "any"
    if feature is not None:
        now["feature"] = str(feature)
    now = {name: value for name, value in now.items() if value}
    for name in ("q", "feature", "case", *_CHOICES):
        if name in now:
            st.query_params[name] = now[name]
        elif name in st.query_params:
            del st.query_params[name]
    state["token_address"] = now


def _question() -> _Question:
    columns = st.columns([4, 2.6, 2.6, 1.6], vertical_alignment="bottom")
    text = columns[0].text_input(
        "Token or phrase",
        key="token_q",
        type="search",
        icon=":material/search:",
        max_chars=LONGEST_PHRASE,
        placeholder="Paris, a phrase, or a token's number",
        help="Found however it was cut into tokens. A text that begins with a space is taken as "
        "it is.",
    )
    by = _choice(
        columns[1], "by", "Look for", "Whole tokens, tokens that begin with it, or token ids."
    )
    space = _choice(
        columns[2], "space", "Space before it", "Most words in a text have a space before them."
    )
    fold = columns[3].toggle("Any case", key="token_case", persist_state="session")
    return text or "", by, space, bool(fold)


def _choice(where: DeltaGenerator, name: str, label: str, text: str) -> str:
    choices: Mapping[str, str] = _CHOICES[name]
    first = next(iter(choices))
    key = f"token_{name}"
    st.session_state.setdefault(key, first)
    value = where.segmented_control(
        label,
        list(choices),
        format_func=choices.__getitem__,
        required=True,
        key=key,
        help=text,
        persist_state="session",
    )
    return value or first


@st.cache_data(max_entries=64, ttl=_DAY, show_spinner="Looking through the corpus …")
def _occurrences(_store: FeatureStore, version: Version, question: _Question) -> Occurrences:
    text, by, space, fold = question
    if by == "id":
        return _store.occurrences(_ids(text))
    match = "begins" if by == "begins" else "whole"
    return _store.occurrences(text, leading_space=_SPACE[space], ignore_case=fold, match=match)


def _ids(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    if not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
        raise InputError(
            "are no token ids", where="token", given=text, allowed="whole numbers, as 464 or 464 12"
        )
    return [int(word) for word in words]


@st.cache_data(max_entries=64, ttl=_DAY, show_spinner="Reading what fires there …")
def _features_on(
    _store: FeatureStore, version: Version, question: _Question, order: str, exact: bool
) -> TokenFeatures:
    found = _occurrences(_store, version, question)
    return _store.features_on(found, order=order, limit=MOST_FEATURES, exact=exact)


@st.cache_data(max_entries=16, ttl=_DAY, show_spinner=False)
def _common_words(_store: FeatureStore, version: Version) -> list[str]:
    """Some words that are common in the corpus, to begin with."""
    counts = np.bincount(_store.corpus.tokens, minlength=len(_store.vocabulary))
    words: list[str] = []
    for token_id in np.argsort(-counts, kind="stable").tolist():
        word = _store.vocabulary.text(token_id)
        if not counts[token_id] or len(words) == _SUGGESTED:
            break
        if word.startswith(" ") and len(word) > 5 and word[1:].isalpha():
            words.append(word.strip())
    return words


def _look_for(word: str) -> None:
    st.session_state["token_q"] = word


def _suggest(session: Session) -> None:
    st.info(
        "Type a word, a phrase or a token's number to see which features fire on it.",
        icon=":material/search:",
    )
    words = _common_words(session.store, session.version)
    if not words:
        return
    with st.container(horizontal=True, vertical_alignment="center"):
        st.caption("Common in this corpus:", width="content")
        for word in words:
            st.button(plain(word), key=f"token_try_{word}", on_click=_look_for, args=(word,))


def _nothing(session: Session, question: _Question, occurrences: Occurrences) -> None:
    text, by, _, fold = question
    n_tokens = len(session.store.corpus.tokens)
    st.info(
        f"“{plain(text)}” is nowhere in the {n_tokens:,} tokens of this store where features fire.",
        icon=":material/search_off:",
    )
    hints = []
    if occurrences.n_left_out:
        hints.append(
            f"It stands {occurrences.n_left_out:,} times where no feature does: first in its "
            "sequence, or as a special token."
        )
    if by == "text":
        hints.append(
            "A text is found where whole tokens make it up; “Beginning” finds tokens that begin "
            "with it."
        )
    if by != "id" and not fold:
        hints.append("“Any case” finds capitals too.")
    if hints:
        st.caption(" ".join(hints))


def _features(session: Session, question: _Question, occurrences: Occurrences) -> int | None:
    """Draw the table of features; the one that is chosen."""
    order = _choice(
        st.container(),
        "order",
        "Order by",
        "Match: how nearly the feature fires there and nowhere else (Dice's coefficient).",
    )
    exact = bool(st.session_state.get(f"token_exact_{question}"))
    found = _features_on(session.store, session.version, question, order, exact)
    if not found.n_features:
        st.info("No feature fires on it.", icon=":material/visibility_off:")
        return _chosen(session, question, found)
    _table(session, question, found, order)
    _caption(question, found)
    return _chosen(session, question, found)


def _caption(question: _Question, found: TokenFeatures) -> None:
    shown = len(found.feature)
    of = f"{shown:,} of {found.n_features:,}" if shown < found.n_features else f"{shown:,}"
    if found.n_read == found.n_occurrences:
        st.caption(f"{of} features fire at the last token of any of {found.n_read:,} occurrences.")
        return
    st.caption(
        f"{of} features, from {found.n_read:,} of the {found.n_occurrences:,} occurrences, evenly "
        "spread over the corpus."
    )
    st.toggle("Read all occurrences", key=f"token_exact_{question}")


def _chosen(session: Session, question: _Question, found: TokenFeatures) -> int | None:
    """The feature that was chosen for this question, even one that fires nowhere there; else the
    first of the table."""
    state = st.session_state
    number = state.get("token_feature")
    if number is not None and number < session.store.d_sae:
        of = state.setdefault("token_feature_of", question)
        if of is None:
            of = state["token_feature_of"] = question
        if of == question:
            return int(number)
    return int(found.feature[0]) if found.n_features else None


def _choose(key: str, question: _Question, features: Sequence[int]) -> None:
    """Keep which feature was chosen, whatever row it is in when the order changes."""
    rows = [row for row, _ in st.session_state[key].selection.cells]
    if rows and rows[0] < len(features):
        st.session_state["token_feature"] = features[rows[0]]
        st.session_state["token_feature_of"] = question


def _table(session: Session, question: _Question, found: TokenFeatures, order: str) -> None:
    numbers = found.feature.tolist()
    names = queries.named(session.store, session.notes, numbers, 4)
    frame = pd.DataFrame(
        {
            "feature": numbers,
            "about": [shortened(names[n].text, _LABEL) for n in numbers],
            "match": 100 * found.dice,
            "share": 100 * found.share,
            "lift": found.lift,
            "mean": found.mean,
            "max": found.max,
        }
    )
    key = f"token_table_{order}"
    number = st.column_config.NumberColumn
    st.dataframe(
        queries.muted(frame, {"about": [names[n].labelled for n in numbers]}),
        key=key,
        hide_index=True,
        height=35 * min(len(frame) + 1, 14) + 3,
        on_select=functools.partial(_choose, key, question, numbers),
        selection_mode="single-cell",
        column_config={
            "feature": number("feature", width=65, format="%d"),
            "about": st.column_config.TextColumn(
                "label or top tokens",
                width=178,
                help="Its label, or the commonest of its top tokens.",
            ),
            "match": number(
                "match",
                format="%.0f %%",
                width=62,
                help="100 %: the feature fires there always, and nowhere else.",
            ),
            "share": number(
                "share", width=68, format="%.1f %%", help="Of the occurrences: where it fires."
            ),
            "lift": number(
                "× usual",
                width=72,
                format="%.3g ×",
                help="How many times as often as at any position of the corpus.",
            ),
            "mean": number("mean", width=62, format=COLUMN, help="Its activation there."),
            "max": number("strongest", width=78, format=COLUMN, help="The same, at most."),
        },
    )


def _places(session: Session, occurrences: Occurrences, feature: int) -> None:
    """Draw the occurrences at which the feature fires, or does not, page by page."""
    name = queries.named(session.store, session.notes, [feature])[feature]
    st.markdown(f"##### Feature {feature} · {name.markdown}")
    firing, activation = session.store.firing_on(feature, occurrences)
    silent = session.store.silent_on(feature, occurrences)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        side = _choice(
            st.container(width="content"),
            "side",
            "Occurrences",
            "Where it stands and the feature fires, strongest first; or where it does not fire.",
        )
        link(session, feature, f"Open feature {feature}")
    share = figures.percent(firing.n / occurrences.n)
    fires = f"Fires at {firing.n:,} of {occurrences.n:,} occurrences ({share})"
    strongest = f", strongest {activation[0]:.3g}." if firing.n else "."
    st.caption(f"{fires}{strongest}")
    shown = firing if side == "fires" else silent
    if not shown.n:
        never = "It is silent at none." if side == "silent" else "It fires at none."
        st.info(never, icon=":material/visibility_off:")
        return
    pages = -(-shown.n // PER_PAGE)
    page = 1
    if pages > 1:
        key = f"token_page_{feature}_{side}_{shown.n}"
        page = st.pagination(pages, key=key, max_visible_pages=7) or 1
    part = shown.position[PER_PAGE * (page - 1) : PER_PAGE * page]
    scale = float(session.store.feature(feature).max)
    examples = session.store.examples_at(feature, part, WINDOW)
    st.html(examples_html(examples, scale))


if __name__ == "__main__":
    render()
