"""Tables and charts that a click on a row or a point leads on from."""

from typing import TYPE_CHECKING, Any

import streamlit as st

from dashboards import figures

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def key_of(name: str) -> str:
    """The key of a table or chart: another one after each click that was acted upon."""
    return f"{name}_{st.session_state.get(_count(name), 0)}"


def forget(name: str) -> None:
    """Draw the table or chart anew, so that nothing is selected when the reader comes back."""
    st.session_state[_count(name)] = st.session_state.get(_count(name), 0) + 1


def _count(name: str) -> str:
    return f"{name}_clicks"


def clicked_row(frame: Any, name: str, *, most: int | None = None, **options: Any) -> int | None:
    """Draw a table; the position of the row that was clicked, None if none was.

    Args:
        frame: of pandas.
        most: rows that are shown at once, where the others are scrolled to; else all are.
        options: of `st.dataframe`.
    """
    rows = len(frame) if most is None else min(len(frame), most)
    more = {"on_select": "rerun", "selection_mode": "single-cell", **options}
    event: Any = st.dataframe(
        frame, key=key_of(name), hide_index=True, height=35 * (rows + 1) + 3, **more
    )
    if not event.selection.cells:
        return None
    forget(name)
    return int(event.selection.cells[0][0])


def clicked_point(figure: "Figure", name: str, *, alt: str) -> int | None:
    """Draw a chart; the index, in its trace, of the point that was clicked, None if none was."""
    event: Any = st.plotly_chart(
        figure,
        config=figures.CONFIG,
        key=key_of(name),
        on_select="rerun",
        selection_mode="points",
        alt=alt,
    )
    if not event.selection.points:
        return None
    forget(name)
    return int(event.selection.points[0]["point_index"])
