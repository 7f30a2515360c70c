"""A page's state in its address: taken over from a link, written as it changes."""

import time
from collections.abc import Collection, Mapping
from itertools import pairwise

import streamlit as st

_BEHIND = 2.0
"""seconds for which an address may still be the browser's after the page has written another"""


def arrived(page: str, names: Collection[str]) -> dict[str, str]:
    """The parameters that the address has, if it is not the one that this page wrote last.

    So a link wins over what the session remembers, and a reader's own changes over the address,
    which is a run behind them, and several while they act fast: nor is it a link if the page wrote
    it just now.
    """
    given = {name: st.query_params[name] for name in names if name in st.query_params}
    return {} if given in [kept for _, kept in _written(page)] else given


def write(page: str, values: Mapping[str, str | None]) -> None:
    """Put the page's state into the address; what is None or "" is left out."""
    kept = {name: value for name, value in values.items() if value}
    for name in values:
        if name in kept:
            if st.query_params.get(name) != kept[name]:
                st.query_params[name] = kept[name]
        elif name in st.query_params:
            del st.query_params[name]
    st.session_state[_key(page)] = [*_written(page), (time.monotonic(), kept)]


def _written(page: str) -> list[tuple[float, dict[str, str]]]:
    """What the page wrote last, and what it replaced in the last seconds, with the time."""
    every = st.session_state.get(_key(page), [])
    now = time.monotonic()
    return [*(old for old, new in pairwise(every) if now - new[0] < _BEHIND), *every[-1:]]


def complain(wrong: Collection[str]) -> None:
    """Name the parameters whose values a page cannot use; nothing is said if there are none."""
    if wrong:
        st.warning(
            f"The address has what makes no sense here: {', '.join(wrong)}.",
            icon=":material/link_off:",
        )


def _key(page: str) -> str:
    return f"address_of_{page}"
