"""The fields of the Features page: filters, order and look, and the view that they say."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import streamlit as st

from dashboards import address, queries, search
from dashboards.amounts import counted
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
from dashboards.session import Session
from dashboards.tokens import plain_visible

ORDERS = {"up": "Ascending", "down": "Descending"}
_DENSITIES = [0.0, *(10.0**e * m for e in range(-6, 0) for m in (1, 3)), 1.0]


@dataclass(frozen=True)
class Choices:
    """What a store lets its features be filtered and sorted by, and what readers call it."""

    names: Mapping[str, str]
    """the columns of numbers"""
    groups: Mapping[str, str]
    """topics and sources of documents"""
    layers: Mapping[str, str]
    """the layers of an SAE of several, by their numbers"""


def choices(session: Session) -> Choices:
    """What the session's store has."""
    groups = {
        group_parameter(each.kind, each.name): f"{each.kind}: {plain_visible(each.name)}"
        for each in queries.document_groups(session.store, session.version)
    }
    layers: list[str] = []
    if session.store.has_facts and "layer_peak" in session.store.columns:
        layers = layer_names([each.site for each in session.store.layers()])
    return Choices(
        column_names(session.store.number_columns),
        groups,
        {str(number): name for number, name in enumerate(layers)},
    )


def take(arrived: dict[str, str], known: Choices) -> None:
    """Fill the fields: with what a link says, else as they were."""
    state = st.session_state
    view, wrong = view_of(arrived, known.names, known.groups, known.layers)
    for field in fields(FeatureView):
        key = f"table_{field.name}"
        if arrived:
            state[key] = getattr(view, field.name)
        state.setdefault(key, field.default)
    for name in ("sort", "x", "y", "column"):  # another store may lack a column
        if state[f"table_{name}"] not in known.names:
            state[f"table_{name}"] = getattr(FeatureView(), name)
    for name, there in (("group", known.groups), ("layer", known.layers)):  # and groups and layers
        if state[f"table_{name}"] not in there:
            state[f"table_{name}"] = ""
    low, high = state["table_density_from"] or 0.0, state["table_density_to"]
    ends = (_nearest(low), _nearest(1.0 if high is None else high))
    if arrived:
        state["table_density"] = ends
    address.complain(wrong)


def _nearest(density: float) -> float:
    return min(_DENSITIES, key=lambda each: abs(each - density))


def view() -> FeatureView:
    """The view that the fields say."""
    state = st.session_state
    values: dict[str, Any] = {name: state[f"table_{name}"] for name in PARAMETERS}
    low, high = state.get("table_density", (0.0, 1.0))
    values |= {"density_from": low or None, "density_to": high if high < 1 else None}
    if not values["column"]:
        values |= {"column_from": None, "column_to": None}
    values["q"] = (values["q"] or "").strip()
    return FeatureView(**values)


def draw(known: Choices) -> None:
    """Draw the fields; those that are seldom needed are folded away, with how many are set."""
    state = st.session_state
    scatter = state["table_look"] == "scatter"
    with st.container(horizontal=True, vertical_alignment="top", gap="medium"):
        search.fields("table")
        _choice("View", "table_look", LOOKS)
        if scatter:
            _column("Across", "table_x", known.names)
            _column("Up", "table_y", known.names)
    number = view().filters_set
    said = f"Filters and order · {counted(number, 'filter')} set" if number else "Filters and order"
    if scatter:
        said = said.replace(" and order", "")
    # another text makes another field for Streamlit, which is opened if this one is open
    state["table_fold"] = state.get("table_fold", False)
    with st.expander(said, key="table_fold", icon=":material/tune:", on_change="rerun"):
        _filters(known, with_order=not scatter)


def _filters(known: Choices, *, with_order: bool) -> None:
    with st.container(horizontal=True, vertical_alignment="top", gap="medium"):
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
        _bounds("Strongest", "table_max", "The feature's strongest activation.")
    with st.container(horizontal=True, vertical_alignment="top", gap="medium"):
        if with_order:
            _column("Sort by", "table_sort", known.names)
            _choice("Order", "table_order", ORDERS)
        if known.groups:
            _column("Fires more in", "table_group", {"": "any documents", **known.groups}, 270)
        if known.layers:
            _column("Most at layer", "table_layer", {"": "any", **known.layers}, 140)
        _column("Also filter by", "table_column", {"": "nothing else", **known.names})
        if st.session_state["table_column"]:
            _bounds("From", "table_column", "Bounds of the column that is chosen beside.")


def _choice(label: str, key: str, texts: Mapping[str, str]) -> None:
    st.segmented_control(
        label,
        list(texts),
        format_func=texts.__getitem__,
        required=True,
        key=key,
        persist_state="session",
    )


def _column(label: str, key: str, names: Mapping[str, str], width: int = 180) -> None:
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
