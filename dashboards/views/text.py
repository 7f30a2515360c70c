"""Try your text: which features fire on each token of a typed text."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import streamlit as st

from dashboards import model_cache, queries
from dashboards.amounts import COLUMN
from dashboards.pages import Page
from dashboards.session import Session, begin_page, link
from dashboards.tokens import per_token_html, plain, plain_visible, text_html
from saescope.errors import SaescopeError

if TYPE_CHECKING:
    from sae import TextFeatures

PAGE = Page(title="Try your text", icon=":material/edit_note:", order=40, url="text")

EXAMPLE = "The old harbour lay quiet under the snow until the first ferry of the year came in."
LONGEST = 4000
LOADED = (
    "Loaded are only models and SAEs that are beside the stores or were named when the explorer "
    "was started (--model, --sae), and only with the weights that the store was made with."
)
PER_TOKEN = 5
_RANKS = {
    "strength": "relative strength",
    "activation": "activation",
    "tokens": "number of tokens",
}


def render() -> None:
    """Draw the page."""
    session = begin_page("Try your text")
    with st.form("text_form", border=False):
        st.text_area(
            "Text",
            value=EXAMPLE,
            key="text",
            max_chars=LONGEST,
            height=110,
            persist_state="session",
        )
        sent = st.form_submit_button("Show features", type="primary")
    st.caption(LOADED)
    key = f"text_result_{session.name}"
    if sent:
        _analyse(session, key)
    kept = st.session_state.get(key)
    if kept is None:
        st.caption("The first text takes a while, because the model has to be loaded.")
        return
    version, result = kept
    if version != session.version:
        st.info("The store has changed since; show the features again.")
        return
    if not len(result.feature):
        st.info("No feature fires on this text.", icon=":material/visibility_off:")
        return
    _result(session, result)


def _analyse(session: Session, key: str) -> None:
    text = st.session_state["text"] or ""
    if not text.strip():
        st.session_state.pop(key, None)
        st.warning("Type some text first.", icon=":material/edit:")
        return
    try:
        st.session_state[key] = (session.version, model_cache.features_of_text(session.store, text))
    except SaescopeError as error:
        st.session_state.pop(key, None)
        st.error(plain(error), icon=":material/error:")


def _strengths(session: Session, result: "TextFeatures") -> dict[int, float]:
    """Each feature's strongest activation in the store: the scale of those here."""
    return queries.max_activations(session.store, np.unique(result.feature).tolist())


def ranked(session: Session, result: "TextFeatures", by: str) -> pd.DataFrame:
    """The text's features, best first: activation, strength (activation / strongest in the store),
    tokens, and the token where it is strongest."""
    strongest = _strengths(session, result)
    frame = pd.DataFrame(
        {"feature": result.feature, "activation": result.activation, "position": result.position}
    )
    best = frame.loc[frame.groupby("feature")["activation"].idxmax()].copy()
    best["tokens"] = best["feature"].map(frame.groupby("feature").size())
    # a feature that the store has never seen firing is as strong as can be
    top = np.array([strongest.get(int(f), 0.0) for f in best["feature"]])
    best["strength"] = np.divide(best["activation"], top, out=np.ones(len(best)), where=top > 0)
    best["at"] = [plain_visible(result.tokens[p]) for p in best["position"]]
    return best.sort_values([by, "feature"], ascending=[False, True]).reset_index(drop=True)


def _result(session: Session, result: "TextFeatures") -> None:
    left, right = st.columns([6, 7], gap="large")
    with left:
        by = st.segmented_control(
            "Order by",
            list(_RANKS),
            format_func=_RANKS.__getitem__,
            default="strength",
            required=True,
            key="text_order",
            persist_state="session",
            help="Relative strength: the activation over the strongest one in the store.",
        )
        by = by or "strength"
        chosen = _table(session, ranked(session, result, by), by)
    with right:
        _highlight(session, result, chosen)
    st.markdown("##### Strongest features of each token", help="Links open in a new tab.")
    st.html(per_token_html(_per_token(session, result), session.name))


def _choose(key: str, chosen: str, features: Sequence[int]) -> None:
    """Keep which feature was chosen, whatever row it is in when the order changes."""
    rows = [row for row, _ in st.session_state[key].selection.cells]
    if rows and rows[0] < len(features):
        st.session_state[chosen] = features[rows[0]]


def _table(session: Session, frame: pd.DataFrame, by: str) -> int:
    """Draw the table of features; the one that is chosen, the first if none is."""
    features = [int(number) for number in frame["feature"]]
    key, chosen = f"text_features_{by}", f"text_chosen_{session.name}"
    labels = session.notes.labels(frame["feature"].tolist())
    shown = frame.assign(
        label=[labels.get(int(f), "") for f in frame["feature"]],
        strength=100 * np.minimum(frame["strength"], 9.99),
    )[["feature", "label", "activation", "strength", "at", "tokens"]]
    number = st.column_config.NumberColumn
    st.dataframe(
        shown,
        key=key,
        hide_index=True,
        height=35 * min(len(shown) + 1, 10) + 3,
        on_select=functools.partial(_choose, key, chosen, features),
        selection_mode="single-cell",
        column_config={
            "feature": number("feature", width=75, format="%d"),
            "activation": number("activation", format=COLUMN),
            "strength": number("of strongest", format="%.0f %%"),
            "at": st.column_config.TextColumn("at token"),
            "tokens": number("tokens", width=65),
        },
    )
    kept = st.session_state.get(chosen)
    return kept if kept in features else features[0]


def _highlight(session: Session, result: "TextFeatures", feature: int) -> None:
    mine = result.feature == feature
    activations = np.zeros(len(result.tokens), dtype=np.float64)
    activations[result.position[mine]] = result.activation[mine]
    label = session.notes.get(feature).label
    st.markdown(f"##### Feature {feature}{' · ' + plain(label) if label else ''}")
    scale = max(_strengths(session, result).get(feature, 0.0), float(activations.max()))
    st.html(text_html(result.tokens, activations.tolist(), scale, result.keep))
    link(session, feature, f"Open feature {feature}")


def _per_token(
    session: Session, result: "TextFeatures"
) -> list[tuple[int, str, list[tuple[int, str, float, float]]]]:
    strongest = _strengths(session, result)
    labels = session.notes.labels(list(strongest))
    rows = []
    for position, text in enumerate(result.tokens):
        at = np.flatnonzero(result.position == position)
        entries = []
        for index in at:
            number, value = int(result.feature[index]), float(result.activation[index])
            top = strongest.get(number, 0.0)
            entries.append((number, labels.get(number, ""), value, value / top if top else 1.0))
        entries.sort(key=lambda entry: (-entry[3], entry[0]))
        rows.append((position, text, entries[:PER_TOKEN]))
    return rows
