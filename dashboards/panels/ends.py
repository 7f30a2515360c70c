"""Of a feature with two ends: which end this is, and the way to the other."""

import streamlit as st

from dashboards.pages import Panel
from dashboards.queries import FeatureData
from dashboards.session import Session, link
from store.results import BOTH_ENDS

PANEL = Panel(title="Ends", order=5, heading=False)


def panel(session: Session, data: FeatureData) -> None:
    """Draw the panel."""
    positive = session.store.meta.get(BOTH_ENDS)
    if not isinstance(positive, int):
        return
    number = data.feature.feature
    feature, negative = number % positive, number >= positive
    with st.container(horizontal=True, vertical_alignment="center"):
        st.caption(
            f"The {'negative' if negative else 'positive'} end of the SAE's feature {feature}; "
            f"its activations are {'below' if negative else 'above'} zero.",
            width="content",
        )
        link(session, feature + (0 if negative else positive), "the other end")
