"""How strongly the feature fires where it does: a histogram."""

import streamlit as st

from dashboards import figures
from dashboards.pages import Panel
from dashboards.queries import FeatureData
from dashboards.session import Session

PANEL = Panel(title="Activations", order=20, applies=lambda data: not data.feature.dead)


def panel(session: Session, data: FeatureData) -> None:
    """Draw the panel."""
    del session
    st.plotly_chart(
        figures.activation_histogram(data.histogram),
        config=figures.CONFIG,
        key="activations",
        alt="Histogram of the feature's activations",
    )
