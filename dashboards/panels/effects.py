"""Which tokens the feature makes likelier and less likely, by its decoder direction."""

import streamlit as st

from dashboards import fact_figures, figures
from dashboards.pages import Panel
from dashboards.queries import FeatureData
from dashboards.session import Session
from dashboards.tokens import effects_html

PANEL = Panel(
    title="Effect on the next token",
    order=30,
    help="Tokens whose logit the feature's decoder direction raises and lowers most, directly "
    "through the unembedding; what later layers make of it is not counted. The chart has the "
    "effects on all tokens of the vocabulary, about their mean.",
)


def panel(session: Session, data: FeatureData) -> None:
    """Draw the panel."""
    del session
    if not data.logits.top and not data.logits.bottom:
        st.caption("Not computed for this store.")
        return
    st.html(
        effects_html(
            [(e.token, e.value) for e in data.logits.top],
            [(e.token, e.value) for e in data.logits.bottom],
        )
    )
    histogram = data.facts.logits if data.facts else None
    if histogram is not None:
        st.plotly_chart(
            fact_figures.logit_histogram(histogram),
            config=figures.CONFIG,
            key="logit_histogram",
            alt="Histogram of the feature's effects on the logits of all tokens",
        )
