"""Where the feature fires: the strongest examples, or random ones of each interval of strength."""

import streamlit as st

from dashboards import figures, queries
from dashboards.amounts import counted, span
from dashboards.pages import Panel
from dashboards.queries import FeatureData
from dashboards.session import Session
from dashboards.tokens import examples_html
from store.summaries import BINS, INTERVALS

PANEL = Panel(
    title="Examples",
    order=10,
    column="right",
    heading=False,
    applies=lambda data: data.grid is None,
)
WINDOWS: dict[int | None, str] = {4: "4", 8: "8", 16: "16", 32: "32", None: "all"}


@st.fragment
def panel(session: Session, data: FeatureData) -> None:
    """Draw the panel."""
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        kind = st.segmented_control(
            "Examples",
            list(queries.EXAMPLE_KINDS),
            format_func=queries.EXAMPLE_KINDS.__getitem__,
            default="top",
            required=True,
            key="examples_kind",
            persist_state="session",
        )
        window = st.select_slider(
            "Tokens on each side",
            list(WINDOWS),
            value=16,
            format_func=WINDOWS.__getitem__,
            key="examples_window",
            width=230,
            persist_state="session",
        )
        breaks = st.toggle("Line breaks", key="examples_breaks", persist_state="session")
    feature = data.feature
    found = queries.examples(session.store, session.version, feature.feature, kind or "top", window)
    if not found:
        st.info("This feature never fires in this store.", icon=":material/visibility_off:")
        return
    if kind != "interval":
        st.html(examples_html(found, feature.max, line_breaks=breaks))
        return
    sizes = data.histogram.counts.reshape(INTERVALS, BINS // INTERVALS).sum(axis=1)
    width = feature.max / INTERVALS
    for interval in range(INTERVALS - 1, -1, -1):
        count = int(sizes[interval])
        st.markdown(
            f"**{span(interval * width, (interval + 1) * width)}** · {counted(count, 'position')} "
            f"({figures.percent(count / feature.n_active)})"
        )
        mine = [example for example in found if example.interval == interval]
        if mine:
            st.html(examples_html(mine, feature.max, line_breaks=breaks))
