"""Tags, lists and votes that people give a feature, and the history of all that they wrote."""

from collections.abc import Callable

import streamlit as st

from dashboards import fields
from dashboards.pages import Panel
from dashboards.queries import FeatureData
from dashboards.session import Session
from dashboards.tokens import plain
from saescope.errors import SaescopeError
from store.annotations import FAVOURITES, Change

PANEL = Panel(title="Tags, lists, votes", order=12, heading=False)
_SHOWN = 20


def panel(session: Session, data: FeatureData) -> None:
    """Draw the panel."""
    number, notes = data.feature.feature, session.notes
    tags, votes = notes.tags(number), notes.votes(number)
    lists = [name for name in notes.lists_of(number) if name != FAVOURITES]
    marked = [*tags, *lists]
    title = "Tags, lists, votes" + (f" · {plain(', '.join(marked))}" if marked else "")
    with st.expander(title, icon=":material/sell:"):
        known = [name for name in notes.lists() if name != FAVOURITES]
        _choice(
            session, number, "Tags", tags, list(notes.all_tags()), notes.add_tag, notes.remove_tag
        )
        _choice(session, number, "Lists", lists, known, notes.add_to_list, notes.remove_from_list)
        _votes(session, number, votes)
        changes = notes.history(number, _SHOWN)
        if changes:
            st.caption("  \n".join(["History, the newest first:", *map(_said, changes)]))


def _choice(
    session: Session,
    number: int,
    name: str,
    saved: list[str],
    known: list[str],
    add: Callable[[int, str], None],
    remove: Callable[[int, str], None],
) -> None:
    """A field for several names; what a reader adds or removes is saved, and nothing else."""
    key = f"{name}_{session.name}_{number}"
    fields.fill(key, saved)
    st.multiselect(
        name,
        sorted({*known, *saved}),
        key=key,
        accept_new_options=True,
        placeholder="choose or type one",
        disabled=session.notes.read_only,
        on_change=_save_choice,
        args=(number, key, saved, add, remove),
    )


def _save_choice(
    number: int,
    key: str,
    saved: list[str],
    add: Callable[[int, str], None],
    remove: Callable[[int, str], None],
) -> None:
    chosen = fields.typed(key)
    if chosen is None:
        return
    try:
        for name in set(chosen) - set(saved):
            add(number, name)
        for name in set(saved) - set(chosen):
            remove(number, name)
    except SaescopeError as error:
        st.session_state["save_problem"] = str(error)


def _votes(session: Session, number: int, votes: dict[str, int]) -> None:
    mine = votes.get(session.notes.who, 0)
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        for value, icon, what in ((1, "thumb_up", "fits"), (-1, "thumb_down", "does not fit")):
            count = sum(1 for vote in votes.values() if vote == value)
            st.button(
                str(count),
                icon=f":material/{icon}:",
                key=f"vote_{value}_{session.name}_{number}",
                help=f"The label {what}"
                + (" (your vote; press to take it back)" * (mine == value)),
                type="primary" if mine == value else "secondary",
                disabled=session.notes.read_only,
                on_click=_vote,
                args=(session, number, 0 if mine == value else value),
            )


def _vote(session: Session, number: int, value: int) -> None:
    try:
        session.notes.vote(number, value)
    except SaescopeError as error:
        st.session_state["save_problem"] = str(error)


def _said(change: Change) -> str:
    """A change in words.

    >>> _said(Change("2025-01-02T03:04:05", "ann", 3, "label", "sea", ""))
    'ann removed label “sea”, 2025\\\\-01\\\\-02 03\\\\:04'
    """
    when = plain(change.at[:16].replace("T", " "))
    who, what = plain(change.who), plain(change.what)
    if change.after == "yes" or change.before == "yes":
        return f"{who} {'added' if change.after else 'removed'} {what}, {when}"
    if what.startswith("vote"):
        votes = {"1": "voted for the label", "-1": "voted against the label"}
        return f"{who} {votes.get(change.after, 'took a vote back')}, {when}"
    if not change.after:
        return f"{who} removed {what} “{plain(change.before[:80])}”, {when}"
    before = f" (was “{plain(change.before[:80])}”)" if change.before else ""
    return f"{who} wrote {what} “{plain(change.after[:80])}”{before}, {when}"
