"""How strongly the feature fires where it does: a histogram, and on it the text tested last."""

from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from dashboards import figures
from dashboards.amounts import amount
from dashboards.fact_figures import mark_activation
from dashboards.pages import Panel
from dashboards.queries import FeatureData
from dashboards.session import Session, text_features_key
from dashboards.tokens import plain

if TYPE_CHECKING:
    from sae import TextFeatures

PANEL = Panel(title="Activations", order=20, applies=lambda data: not data.feature.dead)


def panel(session: Session, data: FeatureData) -> None:
    """Draw the panel."""
    number = data.feature.feature
    tested = _tested(session)
    at = np.flatnonzero(tested.feature == number) if tested else np.empty(0, dtype=int)
    best = int(at[tested.activation[at].argmax()]) if tested and len(at) else None
    mark = None if tested is None or best is None else float(tested.activation[best])
    figure = figures.activation_histogram(data.histogram)
    if mark is not None:
        mark_activation(figure, mark)
    st.plotly_chart(
        figure,
        config=figures.CONFIG,
        key="activations",
        alt="Histogram of the feature's activations",
    )
    if tested is not None and (best is None or mark is None):
        st.caption("It does not fire on your text, the last one on Prompt.")
    elif tested is not None and best is not None and mark is not None:
        below, all_of_it = session.store.activations_below(number, mark), data.feature.n_active
        st.caption(
            f"Your text, the last one on Prompt: strongest {amount(mark)} on "
            f"“{plain(tested.tokens[int(tested.position[best])])}”. {below:,} of {all_of_it:,} "
            f"activations in the store ({figures.percent(below / all_of_it)}) are below it."
        )


def _tested(session: Session) -> "TextFeatures | None":
    """What fires on the text that Prompt showed last, with this very store; None if it has none."""
    known = st.session_state.get(text_features_key(session.name))
    return known[1] if known is not None and known[0][0] == session.version else None
