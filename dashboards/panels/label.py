"""The label, the note and the star that people give a feature."""

import streamlit as st

from dashboards import fields
from dashboards.pages import Panel
from dashboards.queries import FeatureData
from dashboards.session import Session
from dashboards.tokens import plain
from saescope.errors import SaescopeError
from store.annotations import ChangedError

PANEL = Panel(title="Label", order=10, heading=False)


def panel(session: Session, data: FeatureData) -> None:
    """Draw the panel."""
    number = data.feature.feature
    problem = st.session_state.pop("save_problem", None)
    if problem:
        st.error(plain(problem))
    written = session.notes.get(number)
    closed = session.notes.read_only
    reason = "The store's folder is read-only, so labels cannot be saved." if closed else None
    keys = {kind: f"{kind}_{session.name}_{number}" for kind in ("label", "note", "favourite")}
    fields.fill(keys["label"], written.label)
    fields.fill(keys["note"], written.note)
    fields.fill(keys["favourite"], number in session.notes.members())
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.text_input(
            "Label",
            key=keys["label"],
            max_chars=200,
            disabled=closed,
            help=reason,
            placeholder="what does it stand for?",
            on_change=_save,
            args=(session, number, "label", keys["label"], written.label),
        )
        st.toggle(
            "Favourite",
            key=keys["favourite"],
            disabled=closed,
            on_change=_favour,
            args=(session, number, keys["favourite"]),
        )
    with st.expander("Note", expanded=bool(written.note), icon=":material/notes:"):
        st.text_area(
            "Note",
            key=keys["note"],
            max_chars=20_000,
            disabled=closed,
            height=110,
            label_visibility="collapsed",
            on_change=_save,
            args=(session, number, "note", keys["note"], written.note),
        )


def _save(session: Session, number: int, kind: str, key: str, seen: str) -> None:
    """Save what was typed, unless somebody else has changed the text meanwhile."""
    text = fields.typed(key)
    if text is None:
        return
    write = session.notes.set_label if kind == "label" else session.notes.set_note
    try:
        write(number, text, seen=seen)
    except ChangedError as error:
        fields.forget(key)  # the same text is the reader's own the next time
        st.session_state["save_problem"] = (
            f"The {kind} was changed elsewhere meanwhile, to “{error.found}”; yours, “{text}”, is "
            "not saved. Type it again to put it there all the same."
        )
    except SaescopeError as error:
        st.session_state["save_problem"] = str(error)
    else:
        st.toast(f"{kind.capitalize()} saved", icon=":material/check:")


def _favour(session: Session, number: int, key: str) -> None:
    chosen = fields.typed(key)
    if chosen is None:
        return
    try:
        if chosen:
            session.notes.add_to_list(number)
        else:
            session.notes.remove_from_list(number)
    except SaescopeError as error:
        st.session_state["save_problem"] = str(error)
