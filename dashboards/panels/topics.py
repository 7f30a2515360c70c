"""Topics and sources of documents in which the feature fires more often than by chance."""

import streamlit as st

from dashboards.group_bars import KINDS, groups_html
from dashboards.pages import Panel
from dashboards.queries import FeatureData
from dashboards.session import Session

PANEL = Panel(
    title="Topics and sources",
    order=35,
    applies=lambda data: not data.feature.dead and data.facts is not None and data.facts.has_groups,
    help="Groups of documents in which the feature fires more often than in documents drawn at "
    "random (one-sided hypergeometric test over documents; q is the false-discovery rate over all "
    "features and groups, at most 5 %). The bar is the group's share of the feature's positions, "
    "the mark that of all kept positions. Documents count alike, however long they are.",
)


def panel(session: Session, data: FeatureData) -> None:
    """Draw the panel."""
    assert data.facts is not None
    if not data.facts.groups:
        st.caption("In none more than by chance.")
        return
    for kind, title in KINDS.items():
        found = [each for each in data.facts.groups if each.kind == kind]
        if found:
            if len({each.kind for each in data.facts.groups}) > 1:
                st.caption(title)
            st.html(groups_html(found, session.name))
