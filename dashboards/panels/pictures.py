"""Where the feature fires on pictures: thumbnails with a heat map of its activations."""

import streamlit as st

from dashboards import queries
from dashboards.amounts import amount
from dashboards.heat_maps import pictures_html
from dashboards.pages import Panel
from dashboards.queries import FeatureData
from dashboards.session import Session

PANEL = Panel(
    title="Pictures",
    order=10,
    column="right",
    heading=False,
    applies=lambda data: data.grid is not None,
)


@st.fragment
def panel(session: Session, data: FeatureData) -> None:
    """Draw the panel."""
    assert data.grid is not None
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        kind = st.segmented_control(
            "Pictures",
            list(queries.EXAMPLE_KINDS),
            format_func=queries.EXAMPLE_KINDS.__getitem__,
            default="top",
            required=True,
            key="pictures_kind",
            persist_state="session",
        )
        shown = st.toggle("Heat map", value=True, key="pictures_heat", persist_state="session")
    feature = data.feature
    found = queries.examples(session.store, session.version, feature.feature, kind or "top", None)
    if not found:
        st.info("This feature never fires in this store.", icon=":material/visibility_off:")
        return
    documents = {example.document for example in found}
    images = {n: queries.picture(session.store, session.version, n) for n in documents}
    if not any(images.values()):
        st.caption("The pictures are not in this store; the heat maps are on empty ground.")
    st.html(pictures_html(found, images, data.grid, feature.max, heat=bool(shown)))
    st.caption(f"A full colour is the feature's strongest activation, {amount(feature.max)}.")
