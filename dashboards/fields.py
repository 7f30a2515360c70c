"""Telling what a reader has typed into a field from what the browser sends by itself.

The browser sends the content of all fields with everything a reader does. After leaving a page
before it was drawn, it sends an older text than the server has put into a field since; nobody has
typed that text, and it must not be saved. So the texts that were put into each field are remembered
until the browser is known to show the last of them.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import streamlit as st

_KEY = "put_into_fields"
_DRAWN = 5.0
"""seconds after which the browser surely shows what was put into a field"""


@dataclass
class _Put:
    """The values put into a field since a reader last typed there, and the time of the last one."""

    values: list[Any] = field(default_factory=list)
    last: float = 0.0


def _put(key: str) -> _Put:
    return st.session_state.setdefault(_KEY, {}).setdefault(key, _Put())


def fill(key: str, saved: Any) -> None:
    """Put the saved value into a field; to be called before the field is drawn."""
    put = _put(key)
    put.values[:] = [*(value for value in put.values if value != saved), saved]
    put.last = time.monotonic()
    st.session_state[key] = saved


def typed(key: str) -> Any:
    """The value that a reader has typed; None if the browser has only sent an earlier one.

    A value that the field had before others changed it counts as typed once the reader has had time
    to see the change.
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
    """Treat the next value that comes from the browser as typed."""
    _put(key).values.clear()
