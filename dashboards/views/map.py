"""All features on a map of their decoder directions: coloured, searched, chosen, put on lists."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import streamlit as st

from dashboards import address, feature_maps, figures, queries, search
from dashboards.amounts import COLUMN, counted
from dashboards.clicks import clicked_row
from dashboards.feature_maps import Colouring
from dashboards.feature_view import SEARCHES, column_names
from dashboards.pages import Page
from dashboards.session import Session, begin_page, open_feature
from dashboards.tokens import plain
from saescope.errors import SaescopeError
from store.feature_map import FeatureMap

PAGE = Page(title="Map", icon=":material/bubble_chart:", order=28, url="map")

_PARAMETERS = ("q", "by", "colour", "features")
_MOST_IN_ADDRESS = 300
_MOST_ROWS = 1000
_LABELLED = "label"
_GROUP = "group:"
_CHART = {
    "displaylogo": False,
    "modeBarButtons": [["zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]],
    "displayModeBar": True,
    "scrollZoom": True,
    "toImageButtonOptions": {"format": "png", "filename": "saescope-map"},
}
_POINTERS = {"open": "Opens features", "lasso": "Chooses features"}
_DO = {
    "open": "Click a point to open its feature; drag the map to move it, scroll to zoom.",
    "lasso": "Draw round points to choose them: they are listed below, and can go on a list.",
}
_MEANING = (
    "Each point is a feature. Features whose decoder directions have a large cosine are near each "
    "other (t-SNE of each one's 15 nearest directions). Only what is near means something: how "
    "far apart two groups are, how large a group is and where it lies do not, and a plane cannot "
    "hold all neighbours of directions in many dimensions."
)


def render() -> None:
    """Draw the page."""
    session = begin_page("Map", _PARAMETERS)
    read = feature_maps.points(session.store, session.version)
    if read is None:
        st.info(
            "This store has no map of its features: it was built with `--no-map`, by an older "
            "saescope, or without the weights. `saescope index RUN --out FOLDER --replace`, "
            "without `--no-map`, builds it anew with the map, and labels stay.",
            icon=":material/bubble_chart:",
        )
        return
    found, table = read
    opened = st.session_state.pop("map_open", None)
    if opened is not None:
        open_feature(session, opened)
    colours = _colours(session)
    _take(session, colours)
    _fields(colours)
    text = (st.session_state["map_q"] or "").strip()
    by = st.session_state["map_by"]
    hits, cosines = _hits(session, text, by)
    chosen: list[int] = st.session_state["map_features"]
    listed = ",".join(map(str, chosen)) if len(chosen) <= _MOST_IN_ADDRESS else None
    colour = st.session_state["map_colour"]
    shown = None if colour == "density" else colour
    way = None if by == "words" else by
    address.write("map", {"q": text, "by": way, "colour": shown, "features": listed})
    _draw(session, found, table, colours[colour], hits, chosen)
    _said(found, text if by == "words" else "", hits)
    _listed(session, table, chosen or hits, "chosen" if chosen else "found", cosines)


def _hits(session: Session, text: str, by: str) -> tuple[list[int], dict[int, float]]:
    """The features that a search finds, best first; by meaning the nearest, and their cosines."""
    if by == "words":
        found = queries.found(session.store, session.notes, session.version, text) if text else []
        return found, {}
    if not search.ready(session.notes) or not text:
        return [], {}
    near = search.by_meaning(session.store, session.notes, text)
    nearest = list(near)[: search.NEAREST]
    return nearest, {feature: near[feature].cosine for feature in nearest}


# ---- the fields ---------------------------------------------------------------------------------


def _colours(session: Session) -> dict[str, str]:
    """What points can be coloured by, and how readers call it."""
    names = column_names(session.store.number_columns)
    names.pop("feature")
    kinds = feature_maps.group_kinds(session.store)
    return {
        **names,
        _LABELLED: "label there or not",
        **{f"{_GROUP}{kind}": f"{kind} of documents" for kind in kinds},
    }


def _take(session: Session, colours: Mapping[str, str]) -> None:
    """Fill the fields: with what a link says, else as they were."""
    state = st.session_state
    arrived = address.arrived("map", _PARAMETERS)
    wrong = []
    if arrived:
        state["map_q"] = arrived.get("q", "")[:200]
        state["map_by"] = arrived.get("by", "words")
        state["map_colour"] = arrived.get("colour", "density")
        state["map_features"], bad = _numbers(arrived.get("features", ""), session.store.d_sae)
        wrong += ["features"] * bad
    state.setdefault("map_q", "")
    state.setdefault("map_by", "words")
    if state["map_by"] not in SEARCHES:
        wrong.append("by")
        state["map_by"] = "words"
    state.setdefault("map_colour", "density")
    if state.get("map_of") != session.name and not arrived:
        state["map_features"] = []
    state["map_of"] = session.name
    if state["map_colour"] not in colours:  # of a link, or of another store
        wrong += ["colour"] * bool(arrived)
        state["map_colour"] = "density"
    address.complain(wrong)


def _numbers(text: str, d_sae: int) -> tuple[list[int], bool]:
    """Features of an address, and whether some of it is none.

    >>> _numbers("3,x,99,3", 64)
    ([3], True)
    """
    words = [word for word in text.split(",") if word]
    numbers = [int(w) for w in words if w.isascii() and w.isdigit() and len(w) < 10]
    good = [number for number in numbers if number < d_sae]
    return list(dict.fromkeys(good))[:_MOST_IN_ADDRESS], len(good) < len(words)


def _fields(colours: Mapping[str, str]) -> None:
    with st.container(horizontal=True, vertical_alignment="top", gap="medium"):
        search.fields("map")
        st.selectbox(
            "Colour by",
            list(colours),
            format_func=colours.__getitem__,
            key="map_colour",
            width=220,
            persist_state="session",
        )
        st.segmented_control(
            "Pointer",
            list(_POINTERS),
            format_func=_POINTERS.__getitem__,
            default="open",
            required=True,
            key="map_pointer",
            persist_state="session",
        )


# ---- the chart ----------------------------------------------------------------------------------


def _draw(
    session: Session,
    found: FeatureMap,
    table: pd.DataFrame,
    title: str,
    hits: Sequence[int],
    chosen: Sequence[int],
) -> None:
    names = queries.all_names(
        session.store, session.notes, session.version, range(session.store.d_sae)
    )
    live = table["n_active"].to_numpy() > 0
    key = f"map_{session.name}_{st.session_state.get('map_drawn', 0)}"
    st.plotly_chart(
        feature_maps.figure(
            found,
            _colouring(session, table, title),
            names,
            live,
            hits=hits,
            chosen=chosen,
            lasso=st.session_state["map_pointer"] == "lasso",
        ),
        config=_CHART,
        key=key,
        on_select=lambda: _choose(st.session_state[key].selection),
        selection_mode=("points", "box", "lasso"),
        alt="Map of the features' decoder directions; the table below lists those chosen or found",
    )


def _colouring(session: Session, table: pd.DataFrame, title: str) -> Colouring:
    by = st.session_state["map_colour"]
    if by == _LABELLED:
        labels = session.notes.labels()
        values = ["labelled" if n in labels else "" for n in table["feature"]]
        return Colouring(title, values, named=True)
    if by.startswith(_GROUP):
        kind = by.removeprefix(_GROUP)
        return Colouring(title, feature_maps.groups(session.store, session.version, kind), True)
    return Colouring(title, table[by].tolist(), named=False)


def _choose(selection: Any) -> None:
    """A click opens a feature; a box or a lasso chooses those in it."""
    numbers = list(dict.fromkeys(_feature_of(point) for point in selection.points))
    if selection.box or selection.lasso:
        st.session_state["map_features"] = numbers
    elif numbers:
        st.session_state["map_open"] = numbers[0]
    else:
        return
    # a new chart, in which nothing is selected any more but what has a ring
    st.session_state["map_drawn"] = st.session_state.get("map_drawn", 0) + 1


def _feature_of(point: Mapping[str, Any]) -> int:
    number = point["customdata"]
    return int(number[0] if isinstance(number, list) else number)


def _said(found: FeatureMap, text: str, hits: Sequence[int]) -> None:
    if text and not hits:
        st.info(
            f"No feature has “{plain(text)}” in its label, note or top tokens.",
            icon=":material/search_off:",
        )
    kept = ""
    if found.kept is not None and found.by_chance is not None:
        kept = (
            f" Of a feature's {found.nearest} nearest directions, {figures.percent(found.kept)} "
            f"are among its {found.nearest} nearest points here "
            f"({figures.percent(found.by_chance)} by chance)."
        )
    st.caption(_DO[st.session_state["map_pointer"]] + kept, help=_MEANING)


# ---- the features that were chosen or found -----------------------------------------------------


def _listed(
    session: Session,
    table: pd.DataFrame,
    numbers: Sequence[int],
    what: str,
    cosines: Mapping[int, float],
) -> None:
    """The table of the features; cosines are to the meaning that is looked for, if one is."""
    if not numbers:
        return
    st.markdown(f"##### {counted(len(numbers), 'feature')} {what}")
    _keep(session, numbers, what)
    frame = table.set_index("feature", drop=False).loc[list(numbers[:_MOST_ROWS])]
    tokens = queries.all_top_tokens(session.store, session.version)
    labels = session.notes.labels(list(numbers[:_MOST_ROWS]))
    shown = frame.assign(
        label=[labels.get(n, "") for n in frame["feature"]],
        tokens=[queries.called(tokens[n], 5) for n in frame["feature"]],
        density=100 * frame["density"],
        cosine=[cosines.get(n) for n in frame["feature"]],
    )
    near = ["cosine"] if cosines else []
    number = st.column_config.NumberColumn
    row = clicked_row(
        shown,
        f"map_table_{hash(tuple(numbers))}",
        most=14,
        column_order=["feature", *near, "label", "tokens", "density", "max"],
        column_config={
            "feature": number("feature", width=80, format="%d"),
            "cosine": number("cosine", format="%.2f", help="Of the meanings of text and label."),
            "tokens": st.column_config.TextColumn("top tokens", width="large"),
            "density": number("density", format="%.4f %%"),
            "max": number("strongest", format=COLUMN),
        },
    )
    more = f"The first {_MOST_ROWS:,}. " if len(numbers) > _MOST_ROWS else ""
    st.caption(f"{more}Click a row to open its feature.")
    if row is not None:
        open_feature(session, int(frame["feature"].iloc[row]))


def _keep(session: Session, numbers: Sequence[int], what: str) -> None:
    """The fields that put the features on a list, or forget them."""
    notes = session.notes
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        name = st.selectbox(
            "List",
            list(notes.lists()),
            index=None,
            key="map_list",
            accept_new_options=True,
            placeholder="choose or type one",
            width=260,
            disabled=notes.read_only,
            help="The store's folder is read-only." if notes.read_only else None,
        )
        if st.button("Put on this list", icon=":material/playlist_add:", disabled=not name):
            try:
                added = notes.add_all_to_list(numbers, str(name))
            except SaescopeError as error:
                st.error(plain(error), icon=":material/error:")
            else:
                st.toast(
                    f"{counted(added, 'feature')} added to {plain(name)}", icon=":material/check:"
                )
        if what == "chosen":
            st.button("Choose none", icon=":material/deselect:", on_click=_forget)


def _forget() -> None:
    st.session_state["map_features"] = []


if __name__ == "__main__":
    render()
