"""The table of all features: filtered, sorted and paged by the store."""

import functools
from collections.abc import Collection

import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from dashboards import queries
from dashboards.amounts import COLUMN
from dashboards.pages import Page
from dashboards.session import Session, begin_page, open_feature
from store import FeatureFilter

PAGE = Page(title="Features", icon=":material/table_rows:", order=20, url="features")

PAGE_ROWS = 50
STATES = {"all": "All", "live": "Live", "dead": "Dead"}
SORTS = {
    "feature": "number",
    "density": "density",
    "max": "strongest activation",
    "mean": "mean activation",
    "n_documents": "documents",
}
ORDERS = {"up": "Sort ascending", "down": "Sort descending"}
_DENSITIES = [0.0, *(10.0**e * m for e in range(-6, 0) for m in (1, 3)), 1.0]
COLUMNS = ("feature", "label", "tokens", "density", "max", "mean", "n_active", "n_documents")


def render() -> None:
    """Draw the page."""
    session = begin_page("Features")
    filters = _filters(session)
    columns = st.columns([1.5, 1.7, 4.4], vertical_alignment="bottom")
    sort, descending = _order(session, columns[0], columns[1])
    total = session.store.features(filters, limit=1).total
    if not total:
        st.info("No feature fits these filters.", icon=":material/filter_alt_off:")
        return
    first = PAGE_ROWS * (_page_number(columns[2], total, (filters, sort, descending)) - 1)
    frame, _ = queries.table(
        session.store,
        session.notes,
        filters,
        sort=sort,
        descending=descending,
        limit=PAGE_ROWS,
        offset=first,
    )
    _draw(session, frame)
    st.caption(
        f"{first + 1:,} to {first + len(frame):,} of {total:,} features. "
        "Click a row to open the feature, the head of a column to sort all of them by it."
    )


def _page_number(column: DeltaGenerator, total: int, question: tuple[object, ...]) -> int:
    """The page a reader is on; after a change of `question` (filters, order) page 1."""
    pages = -(-total // PAGE_ROWS)
    if pages == 1:
        return 1
    with column, st.container(horizontal=True, horizontal_alignment="right"):
        return st.pagination(
            pages,
            key=f"table_page_{hash(question)}_{pages}",
            max_visible_pages=7,
            persist_state="session",
        )


def _filters(session: Session) -> FeatureFilter:
    columns = st.columns([2.2, 1.3, 2.2, 1, 1], vertical_alignment="bottom")
    text = columns[0].text_input(
        "Search",
        key="table_text",
        type="search",
        icon=":material/search:",
        max_chars=200,
        placeholder="words of a label or note, or a number",
        persist_state="session",
    )
    state = columns[1].segmented_control(
        "Show",
        list(STATES),
        format_func=STATES.__getitem__,
        default="live",
        required=True,
        key="table_state",
        persist_state="session",
    )
    low, high = columns[2].select_slider(
        "Density",
        _DENSITIES,
        value=(0.0, 1.0),
        format_func=_density,
        key="table_density",
        help="Share of the kept positions at which the feature fires.",
        persist_state="session",
    )
    weakest = columns[3].number_input(
        "Strongest from",
        min_value=0.0,
        value=None,
        key="table_low",
        placeholder="any",
        help="The feature's strongest activation.",
        persist_state="session",
    )
    strongest = columns[4].number_input(
        "to",
        min_value=0.0,
        value=None,
        key="table_high",
        placeholder="any",
        persist_state="session",
    )
    return FeatureFilter(
        ids=_search(session, text or ""),
        density_min=low or None,
        density_max=high if high < 1 else None,
        activation_min=weakest,
        activation_max=strongest,
        state=state or "all",
    )


def _density(value: float) -> str:
    return f"{100 * value:.4f}".rstrip("0").rstrip(".") + " %"


def _search(session: Session, text: str) -> tuple[int, ...] | None:
    words = text.strip()
    if not words:
        return None
    found = session.notes.search(words)
    if words.isascii() and words.isdigit() and len(words) < 10:
        found = [int(words), *found]
    return tuple(found)


def _sorts(session: Session) -> dict[str, str]:
    """What features can be sorted by, and its name for readers."""
    more = {name: name.replace("_", " ") for name in session.store.columns if name not in SORTS}
    more.pop("n_active", None)
    return {**SORTS, **more}


def _order(session: Session, left: DeltaGenerator, right: DeltaGenerator) -> tuple[str, bool]:
    names = _sorts(session)
    sort = left.selectbox(
        "Sort by",
        list(names),
        format_func=names.__getitem__,
        key="table_sort",
        persist_state="session",
    )
    order = right.segmented_control(
        "Order",
        ["up", "down"],
        format_func=ORDERS.__getitem__,
        default="up",
        required=True,
        key="table_order",
        persist_state="session",
    )
    return sort or "feature", order == "down"


def _sort_by_head(key: str, sortable: Collection[str]) -> None:
    """Sort all features by the column whose head was clicked; the other way round the second time.

    The table itself could sort only the rows of this page.
    """
    for head in st.session_state[key].selection.columns:
        st.session_state["table_opened"] = st.session_state.get("table_opened", 0) + 1
        column = "density" if head == "n_active" else head  # one is the other by a factor
        if column not in sortable:
            st.toast(f"Features cannot be sorted by {column}.", icon=":material/sort:")
            return
        again = st.session_state.get("table_sort") == column
        down = again and st.session_state.get("table_order") == "up"
        st.session_state["table_sort"] = column
        st.session_state["table_order"] = "down" if down else "up"


def _draw(session: Session, frame: pd.DataFrame) -> None:
    shown = frame[[name for name in COLUMNS if name in frame]].assign(
        density=100 * frame["density"]
    )
    number = st.column_config.NumberColumn
    words = st.column_config.TextColumn
    key = f"table_{st.session_state.get('table_opened', 0)}"
    event = st.dataframe(
        shown,
        key=key,
        hide_index=True,
        height=35 * min(len(shown) + 1, 15) + 3,
        on_select=functools.partial(_sort_by_head, key, _sorts(session)),
        selection_mode=["single-cell", "single-column"],
        column_config={
            "feature": number("feature", width=80, format="%d"),
            "label": words("label", width="medium"),
            "tokens": words(
                "tokens", width="large", help="The commonest tokens of its strongest examples."
            ),
            "density": number(
                "density", format="%.4f %%", help="Share of kept positions at which it fires."
            ),
            "max": number("strongest", format=COLUMN, help="Its strongest activation."),
            "mean": number("mean", format=COLUMN, help="Mean over positions at which it fires."),
            "n_active": number("positions", format="localized", help="Where it fires."),
            "n_documents": number("documents", format="localized", help="In which it fires."),
        },
    )
    if event.selection.cells:
        # a new key, so that nothing is selected when the reader comes back
        st.session_state["table_opened"] = st.session_state.get("table_opened", 0) + 1
        open_feature(session, int(frame["feature"].iloc[event.selection.cells[0][0]]))
