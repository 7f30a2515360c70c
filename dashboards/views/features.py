"""All features: a table filtered, sorted and paged by the store, or two statistics' scatter."""

import functools
from collections.abc import Collection
from dataclasses import fields
from typing import Any

import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from dashboards import address, figures, queries
from dashboards.amounts import COLUMN, counted
from dashboards.fact_figures import layer_names
from dashboards.feature_view import (
    LABELS,
    LOOKS,
    PARAMETERS,
    STATES,
    FeatureView,
    column_names,
    view_of,
)
from dashboards.group_bars import group_parameter
from dashboards.pages import Page
from dashboards.session import Session, begin_page, open_feature
from dashboards.tokens import plain_visible
from store import FeatureFilter

PAGE = Page(title="Features", icon=":material/table_rows:", order=20, url="features")

PAGE_ROWS = 50
MOST_POINTS = 20_000
ORDERS = {"up": "Ascending", "down": "Descending"}
_DENSITIES = [0.0, *(10.0**e * m for e in range(-6, 0) for m in (1, 3)), 1.0]
COLUMNS = ("feature", "label", "tokens", "density", "max", "mean", "n_active", "n_documents")


def render() -> None:
    """Draw the page."""
    session = begin_page("Features", PARAMETERS)
    names, groups, layers = _names(session), _groups(session), _layers(session)
    _take(address.arrived("features", PARAMETERS), names, groups, layers)
    _filters(names, groups, layers)
    view = _view()
    filters = view.filter(*_ids(session, view))
    total = session.store.features(filters, limit=1).total
    address.write("features", view.address())
    if not total:
        st.info(
            "No feature fits these filters: take one back, or show all.",
            icon=":material/filter_alt_off:",
        )
    elif view.look == "scatter":
        _scatter(session, filters, view, total, names)
    else:
        _table(session, filters, view, total, names)


def _names(session: Session) -> dict[str, str]:
    """The columns of numbers, and their names for readers."""
    return column_names(session.store.number_columns)


def _groups(session: Session) -> dict[str, str]:
    """The topics and sources of documents by which features can be filtered, and their names."""
    found = queries.document_groups(session.store, session.version)
    return {
        group_parameter(each.kind, each.name): f"{each.kind}: {plain_visible(each.name)}"
        for each in found
    }


def _layers(session: Session) -> dict[str, str]:
    """The layers of an SAE of several, by their numbers, and their names."""
    if not session.store.has_facts or "layer_peak" not in session.store.columns:
        return {}
    names = layer_names([each.site for each in session.store.layers()])
    return {str(number): name for number, name in enumerate(names)}


# ---- the fields ---------------------------------------------------------------------------------


def _take(
    arrived: dict[str, str],
    names: Collection[str],
    groups: Collection[str],
    layers: Collection[str],
) -> None:
    """Fill the fields: with what a link says, else as they were."""
    state = st.session_state
    view, wrong = view_of(arrived, names, groups, layers)
    for field in fields(FeatureView):
        key = f"table_{field.name}"
        if arrived:
            state[key] = getattr(view, field.name)
        state.setdefault(key, field.default)
    for name in ("sort", "x", "y", "column"):  # another store may lack a column
        if state[f"table_{name}"] not in names:
            state[f"table_{name}"] = getattr(FeatureView(), name)
    for name, known in (("group", groups), ("layer", layers)):  # and groups and layers
        if state[f"table_{name}"] not in known:
            state[f"table_{name}"] = ""
    low, high = state["table_density_from"] or 0.0, state["table_density_to"]
    ends = (_nearest(low), _nearest(1.0 if high is None else high))
    if arrived:
        state["table_density"] = ends
    address.complain(wrong)


def _nearest(density: float) -> float:
    return min(_DENSITIES, key=lambda each: abs(each - density))


def _filters(names: dict[str, str], groups: dict[str, str], layers: dict[str, str]) -> None:
    with st.container(horizontal=True, vertical_alignment="top", gap="medium"):
        st.text_input(
            "Search",
            key="table_q",
            type="search",
            icon=":material/search:",
            max_chars=200,
            placeholder="label, note, token or number",
            width=270,
            persist_state="session",
        )
        _choice("Show", "table_state", STATES)
        _choice("Label", "table_label", LABELS)
        st.select_slider(
            "Density",
            _DENSITIES,
            value=(0.0, 1.0),  # else it has one end
            format_func=_density,
            key="table_density",
            help="Share of the kept positions at which the feature fires.",
            width=235,
            persist_state="session",
        )
    with st.container(horizontal=True, vertical_alignment="top", gap="medium"):
        _choice("View", "table_look", LOOKS)
        if st.session_state["table_look"] == "scatter":
            _column("Across", "table_x", names)
            _column("Up", "table_y", names)
        else:
            _column("Sort by", "table_sort", names)
            _choice("Order", "table_order", ORDERS)
        _bounds("Strongest", "table_max", "The feature's strongest activation.")
        if not (groups or layers):
            _further(names)
    if groups or layers:
        with st.container(horizontal=True, vertical_alignment="top", gap="medium"):
            if groups:
                _column("Fires more in", "table_group", {"": "any documents", **groups}, 270)
            if layers:
                _column("Most at layer", "table_layer", {"": "any", **layers}, 140)
            _further(names)


def _further(names: dict[str, str]) -> None:
    """The field for any other column, and its bounds."""
    _column("Also filter by", "table_column", {"": "nothing else", **names})
    if st.session_state["table_column"]:
        _bounds("From", "table_column", "Bounds of the column that is chosen beside.")


def _choice(label: str, key: str, texts: dict[str, str]) -> None:
    st.segmented_control(
        label,
        list(texts),
        format_func=texts.__getitem__,
        required=True,
        key=key,
        persist_state="session",
    )


def _column(label: str, key: str, names: dict[str, str], width: int = 180) -> None:
    st.selectbox(
        label,
        list(names),
        format_func=names.__getitem__,
        key=key,
        width=width,
        persist_state="session",
    )


def _bounds(label: str, key: str, text: str) -> None:
    first = label if label == "From" else f"{label} from"
    for name, title in (("from", first), ("to", "to")):
        st.number_input(
            title,
            value=None,
            key=f"{key}_{name}",
            placeholder="any",
            format="%.4g",
            help=text if name == "from" else None,
            width=110,
            persist_state="session",
        )


def _density(value: float) -> str:
    return f"{100 * value:.4f}".rstrip("0").rstrip(".") + " %"


def _view() -> FeatureView:
    """The view that the fields say."""
    state = st.session_state
    values: dict[str, Any] = {name: state[f"table_{name}"] for name in PARAMETERS}
    low, high = state["table_density"]
    values |= {"density_from": low or None, "density_to": high if high < 1 else None}
    if not values["column"]:
        values |= {"column_from": None, "column_to": None}
    values["q"] = (values["q"] or "").strip()
    return FeatureView(**values)


def _ids(session: Session, view: FeatureView) -> tuple[list[int] | None, list[int] | None]:
    """The features that the search and the labels leave, and those that they exclude."""
    ids, without = None, None
    if view.q:
        ids = queries.found(session.store, session.notes, session.version, view.q)
    if view.group:
        kind, _, name = view.group.partition(":")
        ids = _among(session.store.features_of_group(kind, name), ids)
    if view.label == "unlabelled":
        without = list(session.notes.labels())
    elif view.label != "any":
        labelled = view.label == "labelled"
        chosen = list(session.notes.labels() if labelled else session.notes.members())
        ids = _among(chosen, ids)
    return ids, without


def _among(chosen: list[int], ids: list[int] | None) -> list[int]:
    """Those of `ids` that are chosen; all that are chosen where there are no ids."""
    wanted = set(chosen)
    return chosen if ids is None else [feature for feature in ids if feature in wanted]


# ---- the table ----------------------------------------------------------------------------------


def _table(
    session: Session, filters: FeatureFilter, view: FeatureView, total: int, names: dict[str, str]
) -> None:
    place = st.container(horizontal=True, horizontal_alignment="right")
    first = PAGE_ROWS * (_page_number(place, total, (filters, view.sort, view.order)) - 1)
    frame, _ = queries.table(
        session.store,
        session.notes,
        filters,
        sort=view.sort,
        descending=view.order == "down",
        limit=PAGE_ROWS,
        offset=first,
    )
    _draw(session, frame, view, names)
    st.caption(
        f"{first + 1:,} to {first + len(frame):,} of {counted(total, 'feature')}. "
        "Click a row to open the feature, the head of a column to sort all of them by it. "
        "The address of this page opens it as it is."
    )


def _page_number(column: DeltaGenerator, total: int, question: tuple[object, ...]) -> int:
    """The page a reader is on; after a change of `question` (filters, order) page 1."""
    pages = -(-total // PAGE_ROWS)
    if pages == 1:
        return 1
    with column:
        return st.pagination(
            pages,
            key=f"table_page_{hash(question)}_{pages}",
            max_visible_pages=7,
            persist_state="session",
        )


def _sort_by_head(key: str, sortable: Collection[str]) -> None:
    """Sort all features by the column whose head was clicked; the other way round the second time.

    The table itself could sort only the rows of this page.
    """
    for head in st.session_state[key].selection.columns:
        st.session_state["table_opened"] = st.session_state.get("table_opened", 0) + 1
        if head not in sortable:
            st.toast(f"Features cannot be sorted by {head}.", icon=":material/sort:")
            return
        again = st.session_state.get("table_sort") == head
        down = again and st.session_state.get("table_order") == "up"
        st.session_state["table_sort"] = head
        st.session_state["table_order"] = "down" if down else "up"


def _draw(session: Session, frame: pd.DataFrame, view: FeatureView, names: dict[str, str]) -> None:
    chosen = [name for name in (view.sort, view.column) if name]
    columns: list[str] = list(dict.fromkeys([*COLUMNS, *chosen]))
    shown = frame[[name for name in columns if name in frame]].assign(
        density=100 * frame["density"]
    )
    number = st.column_config.NumberColumn
    words = st.column_config.TextColumn
    key = f"table_{st.session_state.get('table_opened', 0)}"
    more = {name: number(names[name], format=COLUMN) for name in columns if name not in COLUMNS}
    event = st.dataframe(
        shown,
        key=key,
        hide_index=True,
        height=35 * (len(shown) + 1) + 3,
        on_select=functools.partial(_sort_by_head, key, names),
        selection_mode=["single-cell", "single-column"],
        column_config={
            "feature": number("feature", width=80, format="%d"),
            "label": words("label", width="medium"),
            "tokens": words(
                "top tokens",
                width="large",
                help="The commonest tokens of its strongest examples; ␣ is a space.",
            ),
            "density": number(
                "density", format="%.4f %%", help="Share of kept positions at which it fires."
            ),
            "max": number("strongest", format=COLUMN, help="Its strongest activation."),
            "mean": number("mean", format=COLUMN, help="Mean over positions at which it fires."),
            "n_active": number("positions", format="localized", help="Where it fires."),
            "n_documents": number("documents", format="localized", help="In which it fires."),
            **more,
        },
    )
    if event.selection.cells:
        # a new key, so that nothing is selected when the reader comes back
        st.session_state["table_opened"] = st.session_state.get("table_opened", 0) + 1
        open_feature(session, int(frame["feature"].iloc[event.selection.cells[0][0]]))


# ---- the scatter --------------------------------------------------------------------------------


def _scatter(
    session: Session, filters: FeatureFilter, view: FeatureView, total: int, names: dict[str, str]
) -> None:
    page = session.store.features(filters, limit=MOST_POINTS)
    points = page.rows.select(list(dict.fromkeys(["feature", view.x, view.y]))).to_pandas()
    spoken = queries.all_names(session.store, session.notes, session.version, points["feature"])
    event: Any = st.plotly_chart(
        figures.scatter(points, view.x, view.y, spoken, names),
        config=figures.CONFIG,
        key=f"scatter_{st.session_state.get('table_opened', 0)}",
        on_select="rerun",
        selection_mode="points",
        alt=f"Scatter of {names[view.x]} and {names[view.y]} of the features",
    )
    left_out = total - len(points)
    more = f" The first {len(points):,} of {total:,} are drawn." if left_out else ""
    st.caption(
        f"{counted(len(points), 'feature')}, each a point. Click one to open it. Where all values "
        f"are above zero and span a hundredfold, an axis is logarithmic.{more}"
    )
    if event.selection.points:
        st.session_state["table_opened"] = st.session_state.get("table_opened", 0) + 1
        open_feature(session, int(points["feature"].iloc[event.selection.points[0]["point_index"]]))


if __name__ == "__main__":
    render()
