"""Which tokens the feature fires on, and where in the sequences."""

import pandas as pd
import streamlit as st

from dashboards import figures
from dashboards.amounts import amount
from dashboards.pages import Panel
from dashboards.queries import FeatureData
from dashboards.session import Session
from dashboards.tokens import plain_visible

PANEL = Panel(
    title="Tokens and positions",
    order=25,
    applies=lambda data: not data.feature.dead and data.grid is None,
    help="Counted over all positions of the store, not over the examples. The share is of the "
    "kept positions with that token.",
)
_ROW_HEIGHT, _SHOWN = 35, 8


def panel(session: Session, data: FeatureData) -> None:
    """Draw the panel."""
    del session
    if data.tokens is None or data.positions is None:
        st.caption(
            "Not counted in this store, which an older saescope built; "
            "`saescope index RUN --out FOLDER --replace` builds it anew."
        )
        return
    rows = {
        "token": [plain_visible(each.token) for each in data.tokens],
        "fires at": [each.count for each in data.tokens],
        "of all": [100 * each.share for each in data.tokens],
        "mean": [amount(each.mean) for each in data.tokens],
    }
    st.dataframe(
        pd.DataFrame(rows),
        hide_index=True,
        height=_ROW_HEIGHT * (1 + min(_SHOWN, len(data.tokens))) + 3,
        column_config={
            "fires at": st.column_config.NumberColumn(
                "fires at", help="Positions with this token at which the feature fires."
            ),
            "of all": st.column_config.ProgressColumn(
                "of all",
                help="Share of the kept positions with this token.",
                format="%.0f%%",
                min_value=0,
                max_value=100,
            ),
            "mean": st.column_config.TextColumn("mean", help="Mean activation at those."),
        },
    )
    st.plotly_chart(
        figures.position_profile(data.positions),
        config=figures.CONFIG,
        key="positions",
        alt="Share of the positions at each index of the sequence at which the feature fires",
    )
