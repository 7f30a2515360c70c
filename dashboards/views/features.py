"""All features: a table filtered, sorted and paged by the store, or two statistics' scatter."""

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import streamlit as st

from dashboards import address, clicks, feature_fields, figures, queries, search
from dashboards.amounts import COLUMN, counted
from dashboards.feature_view import PARAMETERS, FeatureView
from dashboards.pages import Page
from dashboards.session import Session, begin_page, open_feature
from store import FeatureFilter
from store.meaning import Meant

PAGE = Page(title="Features", icon=":material/table_rows:", order=20, url="features")

PAGE_ROWS = 50
MOST_POINTS = 20_000
COLUMNS = ("feature", "label", "tokens", "density", "max", "mean", "n_active", "n_documents")
MEANT_COLUMNS = ("feature", "cosine", "meant", "tokens", "density", "max", "n_documents")


def render() -> None:
    """Draw the page."""
    session = begin_page("Features", PARAMETERS)
    known = feature_fields.choices(session)
    feature_fields.take(address.arrived("features", PARAMETERS), known)
    feature_fields.draw(known)
    view = feature_fields.view()
    address.write("features", view.address())
    near: dict[int, Meant] | None = None
    if view.by == "meaning":
        if not search.ready(session.notes):
            return
        if view.q:
            near = search.by_meaning(session.store, session.notes, view.q)
    filters = view.filter(*_ids(session, view, near))
    total = session.store.features(filters, limit=1).total
    if not total:
        st.info(
            "No feature fits these filters: take one back, or show all.",
            icon=":material/filter_alt_off:",
        )
    elif near is not None:
        _meant(session, filters, view, near, known.names)
    elif view.look == "scatter":
        _scatter(session, filters, view, total, known.names)
    else:
        _table(session, filters, view, total, known.names)


def _ids(
    session: Session, view: FeatureView, near: Collection[int] | None
) -> tuple[list[int] | None, list[int] | None]:
    """The features that the search and the labels leave, and those that they exclude."""
    ids, without = None if near is None else list(near), None
    if view.q and view.by == "words":
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
    session: Session,
    filters: FeatureFilter,
    view: FeatureView,
    total: int,
    names: Mapping[str, str],
) -> None:
    first = _first_row(total, (filters, view.sort, view.order))
    frame, _ = queries.table(
        session.store,
        session.notes,
        filters,
        sort=view.sort,
        descending=view.order == "down",
        limit=PAGE_ROWS,
        offset=first,
    )
    columns: list[str] = list(dict.fromkeys([*COLUMNS, view.sort, *_further(view)]))
    _draw(session, frame, columns, names, sortable=True)
    st.caption(
        f"{first + 1:,} to {first + len(frame):,} of {counted(total, 'feature')}. "
        "Click a row to open the feature, the head of a column to sort all of them by it. "
        "The address of this page opens it as it is."
    )


def _meant(
    session: Session,
    filters: FeatureFilter,
    view: FeatureView,
    near: Mapping[int, Meant],
    names: Mapping[str, str],
) -> None:
    """The features that fit the filters, those nearest in meaning first; as points, the nearest."""
    fit = session.store.features(filters, limit=len(near)).rows.column("feature").to_pylist()
    order = sorted(fit, key=lambda feature: -near[feature].cosine)
    if view.look == "scatter":
        nearest = replace(filters, ids=tuple(order[: search.NEAREST]))
        _scatter(session, nearest, view, len(nearest.ids or ()), names)
        return
    first = _first_row(len(order), (filters, view.q))
    page = order[first : first + PAGE_ROWS]
    frame, _ = queries.table(
        session.store,
        session.notes,
        FeatureFilter(ids=tuple(page)),
        sort="feature",
        descending=False,
        limit=PAGE_ROWS,
        offset=0,
    )
    frame = frame.set_index("feature", drop=False).loc[page]
    found = [near[feature] for feature in page]
    frame = frame.assign(cosine=[each.cosine for each in found], meant=[e.text for e in found])
    columns: list[str] = list(dict.fromkeys([*MEANT_COLUMNS, *_further(view)]))
    _draw(session, frame, columns, names, sortable=False)
    st.caption(
        f"{first + 1:,} to {first + len(frame):,} of {counted(len(order), 'feature')} with a label "
        "or note, the nearest in meaning first: what is near is for you to judge, a cosine below "
        "0.3 is mostly not. Click a row to open the feature."
    )


def _further(view: FeatureView) -> list[str]:
    """The column that is also filtered by, if one is."""
    return [view.column] if view.column else []


def _first_row(total: int, question: tuple[object, ...]) -> int:
    """The first row of the page a reader is on; 0 after a change of `question` (filters, order)."""
    pages = -(-total // PAGE_ROWS)
    if pages == 1:
        return 0
    with st.container(horizontal=True, horizontal_alignment="right"):
        number = st.pagination(
            pages,
            key=f"table_page_{hash(question)}_{pages}",
            max_visible_pages=7,
            persist_state="session",
        )
    return PAGE_ROWS * (number - 1)


def _sort_by_head(key: str, sortable: Collection[str]) -> None:
    """Sort all features by the column whose head was clicked; the other way round the second time.

    The table itself could sort only the rows of this page.
    """
    for head in st.session_state[key].selection.columns:
        clicks.forget("table")
        if head not in sortable:
            st.toast(f"Features cannot be sorted by {head}.", icon=":material/sort:")
            return
        again = st.session_state.get("table_sort") == head
        down = again and st.session_state.get("table_order") == "up"
        st.session_state["table_sort"] = head
        st.session_state["table_order"] = "down" if down else "up"


def _draw(
    session: Session,
    frame: pd.DataFrame,
    columns: Sequence[str],
    names: Mapping[str, str],
    *,
    sortable: bool,
) -> None:
    shown = frame[[name for name in columns if name in frame]].assign(
        density=100 * frame["density"]
    )
    number = st.column_config.NumberColumn
    words = st.column_config.TextColumn
    own = {*COLUMNS, *MEANT_COLUMNS}
    more = {name: number(names[name], format=COLUMN) for name in columns if name not in own}
    by_head: dict[str, Any] = {
        "on_select": functools.partial(_sort_by_head, clicks.key_of("table"), names),
        "selection_mode": ["single-cell", "single-column"],
    }
    row = clicks.clicked_row(
        shown,
        "table",
        **(by_head if sortable else {}),
        column_config={
            "feature": number("feature", width=80, format="%d"),
            "label": words("label", width="medium"),
            "cosine": number("cosine", format="%.2f", help="To the text's embedding."),
            "meant": words("label or note", width="medium", help="The one nearest in meaning."),
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
    if row is not None:
        open_feature(session, int(frame["feature"].iloc[row]))


# ---- the scatter --------------------------------------------------------------------------------


def _scatter(
    session: Session,
    filters: FeatureFilter,
    view: FeatureView,
    total: int,
    names: Mapping[str, str],
) -> None:
    page = session.store.features(filters, limit=MOST_POINTS)
    points = page.rows.select(list(dict.fromkeys(["feature", view.x, view.y]))).to_pandas()
    spoken = queries.all_names(session.store, session.notes, session.version, points["feature"])
    point = clicks.clicked_point(
        figures.scatter(points, view.x, view.y, spoken, names),
        "scatter",
        alt=f"Scatter of {names[view.x]} and {names[view.y]} of the features",
    )
    left_out = total - len(points)
    more = f" The first {len(points):,} of {total:,} are drawn." if left_out else ""
    st.caption(
        f"{counted(len(points), 'feature')}, each a point. Click one to open it. Where all values "
        f"are above zero and span a hundredfold, an axis is logarithmic.{more}"
    )
    if point is not None:
        open_feature(session, int(points["feature"].iloc[point]))


if __name__ == "__main__":
    render()
