"""Fields of a page whose content is saved, and may be changed by others while they are open.

With everything a reader does, the browser sends what its fields hold. Where a page was left before
it was drawn, that is an older text than the one the server has put into the field since, and nobody
has typed it. So for each field is kept what was put into it since the browser was known to show it.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import streamlit as st

_KEY = "put_into_fields"
_DRAWN = 5.0
"""Seconds after which the browser shows what was put into a field."""


@dataclass
class _Put:
    """What was put into a field since a reader last typed there, and when the last time was."""

    values: list[Any] = field(default_factory=list)
    last: float = 0.0


def _put(key: str) -> _Put:
    return st.session_state.setdefault(_KEY, {}).setdefault(key, _Put())


def fill(key: str, saved: Any) -> None:
    """Put what is saved into a field, before the field is drawn."""
    put = _put(key)
    put.values[:] = [*(value for value in put.values if value != saved), saved]
    put.last = time.monotonic()
    st.session_state[key] = saved


def typed(key: str) -> Any:
    """What a reader has just put into a field; None if the browser has only sent what was in it.

    What was in the field before it was changed by others is taken for typed once the reader had
    time to see the change.
    """
    value, put = st.session_state[key], _put(key)
    if put.values and value == put.values[-1]:
        return None  # only the browser's first word on the field
    if value in put.values and time.monotonic() < put.last + _DRAWN:
        st.toast("This was changed elsewhere just now, and is left so.", icon=":material/sync:")
        return None
    put.values[:] = [value]
    return value


def forget(key: str) -> None:
    """Take whatever comes from the browser next for typed."""
    _put(key).values.clear()
