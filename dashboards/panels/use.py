"""Ways on from a feature: steer the model with it, see it on a text of one's own."""

import streamlit as st

from dashboards import queries
from dashboards.pages import Panel, page_at
from dashboards.queries import FeatureData
from dashboards.session import Session

PANEL = Panel(
    title="Use",
    order=11,
    heading=False,
    applies=lambda data: data.grid is None and not data.feature.dead,
)
_WINDOW, _LONGEST = 16, 600


def panel(session: Session, data: FeatureData) -> None:
    """Draw the panel."""
    number = data.feature.feature
    found = queries.examples(session.store, session.version, number, "top", _WINDOW)
    text = "".join(found[0].tokens)[:_LONGEST].strip() if found else ""
    links = (
        (
            "steer",
            "Steer with it",
            ":material/explore:",
            {"edits": _edit(number, data.feature.max)},
        ),
        ("text", "Test your text", ":material/edit_note:", {"text": text, "locked": str(number)}),
    )
    with st.container(horizontal=True, gap="medium"):
        for url, label, icon, query in links:
            st.page_link(
                page_at(url),
                label=label,
                icon=icon,
                query_params={"sae": session.name, **query},
                width="content",
            )


def _edit(number: int, strength: float) -> str:
    """What the Steer page adds: the feature, as strong as it gets in the store."""
    return f"add:{number}:{strength:.4g}"
