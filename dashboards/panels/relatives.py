"""Features like this one: near in decoder direction, or firing at the same positions."""

import streamlit as st

from dashboards import figures, queries
from dashboards.pages import Panel
from dashboards.queries import FeatureData
from dashboards.session import Session, link_named

# each of its two lists has a heading of its own
PANEL = Panel(title="Related features", order=40, heading=False)


def panel(session: Session, data: FeatureData) -> None:
    """Draw the panel."""
    near = {n.feature: f"cosine {n.cosine:+.2f}" for n in data.neighbours}
    together = {
        c.feature: f"r {c.correlation:.2f} · PMI {c.pmi:.1f} · in {figures.percent(c.share)}"
        for c in data.coactivating
    }
    names = queries.named(session.store, session.notes, [*near, *together])
    blocks = (
        ("Nearest decoder directions", near, "Cosine of the two decoder directions."),
        (
            "Fires together with",
            together,
            "Counted over all positions. r: Pearson's correlation of whether the two fire. PMI: "
            "pointwise mutual information, in nats. The share is of this feature's positions.",
        ),
    )
    with st.container(key="relatives"):
        for title, rows, text in blocks:
            st.markdown(f"##### {title}", help=text)
            if not rows:
                st.caption("None more than by chance." if rows is together else "None.")
            for number, value in rows.items():
                with st.container(horizontal=True, horizontal_alignment="distribute"):
                    link_named(session, number, names[number], most=52)
                    st.caption(value, width="content")
