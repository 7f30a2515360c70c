"""A page's state in its address: taken over from a link, written as it changes."""

from collections.abc import Collection, Mapping

import streamlit as st


def arrived(page: str, names: Collection[str]) -> dict[str, str]:
    """The parameters that the address has, if it is not the one that this page wrote last.

    So a link wins over what the session remembers, and a reader's own changes over the address,
    which is a run behind them.
    """
    given = {name: st.query_params[name] for name in names if name in st.query_params}
    return given if given != st.session_state.get(_key(page)) else {}


def write(page: str, values: Mapping[str, str | None]) -> None:
    """Put the page's state into the address; what is None or "" is left out."""
    kept = {name: value for name, value in values.items() if value}
    for name in values:
        if name in kept:
            if st.query_params.get(name) != kept[name]:
                st.query_params[name] = kept[name]
        elif name in st.query_params:
            del st.query_params[name]
    st.session_state[_key(page)] = kept


def complain(wrong: Collection[str]) -> None:
    """Name the parameters whose values a page cannot use; nothing is said if there are none."""
    if wrong:
        st.warning(
            f"The address has what makes no sense here: {', '.join(wrong)}.",
            icon=":material/link_off:",
        )


def _key(page: str) -> str:
    return f"address_of_{page}"
