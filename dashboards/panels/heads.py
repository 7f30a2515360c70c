"""To which attention heads the feature writes, of an SAE at their outputs."""

import streamlit as st

from dashboards import fact_figures, figures
from dashboards.pages import Panel
from dashboards.queries import FeatureData
from dashboards.session import Session

PANEL = Panel(
    title="Attention heads",
    order=37,
    applies=lambda data: data.facts is not None and bool(data.facts.heads),
    help="The norm of the feature's decoder within each head, as a share of the sum over heads: "
    "which heads' outputs the feature is made of. The dotted line is an equal share.",
)


def panel(session: Session, data: FeatureData) -> None:
    """Draw the panel."""
    del session
    assert data.facts is not None
    st.plotly_chart(
        fact_figures.head_norms(data.facts.heads),
        config=figures.CONFIG,
        key="head_norms",
        alt="The share of the feature's decoder norm in each attention head",
    )
