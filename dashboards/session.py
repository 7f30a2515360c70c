"""The beginning of every page: which SAE, which store and which feature it is about."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass

import streamlit as st

from dashboards import find_stores, queries
from dashboards.pages import page_at
from dashboards.parameters import choose_feature, choose_sae
from dashboards.tokens import plain, shortened
from saescope.errors import SaescopeError
from saescope.paths import AnyPath
from store import Annotations, FeatureStore


@dataclass(frozen=True)
class Session:
    """The SAE a page is about."""

    name: str
    store: FeatureStore
    notes: Annotations
    version: queries.Version


def begin_page(title: str, parameters: Collection[str] = ()) -> Session:
    """Write the page's heading and the choice of SAE; open the chosen one's store.

    parameters: what else the page reads from its address; all others are dropped from it.
    """
    stores = find_stores.stores()
    fallback = st.session_state.get("sae")
    if fallback is None or fallback not in stores:
        fallback = _first_readable(stores)
    chosen = choose_sae(st.query_params.get("sae"), stores, fallback)
    name = chosen.value
    if len(stores) > 1:
        left, right = st.columns([3, 1], vertical_alignment="bottom")
        st.session_state["sae_choice"] = name
        right.selectbox("SAE", list(stores), key="sae_choice", on_change=_change_sae)
    elif title:
        left, right = st.columns([3, 1], vertical_alignment="bottom")
        right.caption(plain(name), text_alignment="right")
    else:  # the page's own heading names the SAE
        left = st.container()
    if title:
        left.markdown(f"## {plain(title)}")
    if chosen.problem:
        st.warning(plain(chosen.problem), icon=":material/link_off:")
    st.session_state["sae"] = name
    for key in set(st.query_params) - {"sae", *parameters}:
        del st.query_params[key]
    st.query_params["sae"] = name
    return session_of(name)


def _first_readable(stores: Mapping[str, AnyPath]) -> str:
    """The first store that can be read; the very first, whose error is shown, if none can."""
    for name, path in stores.items():
        with suppress(SaescopeError, OSError):
            queries.open_store(path)
            return name
    return next(iter(stores))


def session_of(name: str) -> Session:
    """The SAE of this name, opened."""
    path = find_stores.stores()[name]
    store = queries.open_store(path)
    return Session(name, store, queries.annotations(store), queries.version_of(path))


def session_of_sae(sae_hash: str) -> Session | None:
    """The first store that is of this very SAE, opened; None if none is."""
    for name, path in find_stores.stores().items():
        with suppress(SaescopeError, OSError):  # a damaged store has its own message on Home
            if queries.open_store(path).meta.get("sae_hash") == sae_hash:
                return session_of(name)
    return None


def _change_sae() -> None:
    st.session_state["sae"] = st.session_state["sae_choice"]
    st.query_params.clear()
    st.query_params["sae"] = st.session_state["sae"]


def current_feature(session: Session) -> int:
    """The feature the address asks for; else the one seen last, else the first live one."""
    key = f"feature_of_{session.name}"
    fallback = st.session_state.get(key)
    if fallback is None or fallback >= session.store.d_sae:
        fallback = session.store.next_live(-1) or 0
    chosen = choose_feature(st.query_params.get("feature"), session.store.d_sae, fallback)
    if chosen.problem:
        st.warning(plain(chosen.problem), icon=":material/link_off:")
    st.session_state[key] = chosen.value
    st.query_params["feature"] = str(chosen.value)
    return chosen.value


def link(session: Session, feature: int, text: str, help: str | None = None) -> None:
    """A link to a feature's page; text is shown as it is."""
    st.page_link(
        page_at("feature"),
        label=plain(text),
        icon="",  # not the page's own
        help=help,
        query_params={"sae": session.name, "feature": str(feature)},
    )


def link_named(
    session: Session, feature: int, name: queries.Name, *, before: str = "", most: int = 60
) -> None:
    """A link to a feature's page, with its number and its name: a label, or tokens in grey.

    before: a sign before the number, as it is.
    """
    short = queries.Name(shortened(name.text, most), name.labelled)
    st.page_link(
        page_at("feature"),
        label=f"{before}{feature}  {short.markdown}",
        icon="",  # not the page's own
        query_params={"sae": session.name, "feature": str(feature)},
    )


def text_features_key(name: str) -> str:
    """Under which key of the session's state Prompt keeps what it showed last for this SAE.

    The value is (question, features of the text); the question begins with the store's version.
    """
    return f"prompt_result_{name}"


def open_feature(session: Session, feature: int) -> None:
    """Go to a feature's page."""
    st.switch_page(page_at("feature"), query_params={"sae": session.name, "feature": str(feature)})
