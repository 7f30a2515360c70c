"""Features of vision and diffusion models as pictures with heat maps."""

from collections.abc import Sequence

import numpy as np
import streamlit as st

from dashboards import address, fact_figures, figures, queries
from dashboards.amounts import amount, counted
from dashboards.feature_view import column_names
from dashboards.figures import percent
from dashboards.heat_maps import pictures_html
from dashboards.pages import Page
from dashboards.parameters import choose_feature
from dashboards.session import Session, begin_page, link
from dashboards.tokens import plain, shortened
from store import FeatureFilter, FeatureStore
from store.pictures import Grid
from store.results import Example

PAGE = Page(title="Pictures", icon=":material/photo_library:", order=65, url="pictures")

PER_PAGE, PICTURES = 12, 3
ORDERS = {"down": "Descending", "up": "Ascending"}
_PARAMETERS = ("sort", "order", "p", "feature")
_WIDTH = f"calc((100% - {14 * (PICTURES - 1)}px) / {PICTURES})"  # the gap is 14 px


def render() -> None:
    """Draw the page."""
    session = begin_page("Pictures", _PARAMETERS)
    grid = session.store.grid
    if grid is None:
        st.info(
            "This SAE reads the tokens of texts. Of an SAE of a vision or diffusion model this "
            "page shows the pictures on which each feature fires, with heat maps.",
            icon=":material/photo_library:",
        )
        st.code(
            'saescope harvest PICTURES.toml   # [model] kind = "vision", '
            '[corpus] source = "pictures/*.png"\n'
            "saescope train TRAIN.toml\nsaescope index RUN --out stores/NAME",
            language=None,
            wrap_lines=True,
        )
        return
    names = column_names(session.store.number_columns)
    sort, order = _order(session, names)
    heat = bool(st.session_state["pictures_page_heat"])
    one = st.session_state["pictures_feature"]
    if one is not None:
        _one(session, grid, int(one), heat)
        _write(sort, order, None, int(one))
        return
    filters = FeatureFilter(state="live")
    total = session.store.features(filters, limit=1).total
    if not total:
        st.info("No feature fires in this store.", icon=":material/visibility_off:")
        return
    page = _page(total, (session.name, sort, order))
    first = PER_PAGE * (page - 1)
    found = session.store.features(filters, sort, order == "down", PER_PAGE, first).rows
    _features(session, grid, found.select(["feature", "max", "density", sort]).to_pylist(), heat)
    st.caption(
        f"{first + 1:,} to {first + len(found):,} of {counted(total, 'live feature')}. The number "
        "below a picture is the activation at its frame; a full colour is the feature's strongest."
    )
    _write(sort, order, page, None)


def _write(sort: str, order: str, page: int | None, one: int | None) -> None:
    """Say in the address what is shown."""
    values = {
        "sort": sort if sort != "density" else None,
        "order": order if order != "down" else None,
        "p": str(page) if page and page > 1 else None,
        "feature": None if one is None else str(one),
    }
    address.write("pictures", values)


def _order(session: Session, names: dict[str, str]) -> tuple[str, str]:
    """The fields; the column and the direction to order by."""
    state, given = st.session_state, address.arrived("pictures", _PARAMETERS)
    if given:
        state["pictures_sort"] = given.get("sort", "density")
        state["pictures_order"] = given.get("order", "down")
        state["pictures_feature"] = None
        if "feature" in given:
            chosen = choose_feature(given["feature"], session.store.d_sae, 0)
            state["pictures_feature"] = chosen.value
            if chosen.problem:
                st.warning(plain(chosen.problem), icon=":material/link_off:")
        wanted = given.get("p", "")
        state["pictures_wanted"] = int(wanted) if wanted.isascii() and wanted.isdigit() else 1
    wrong = [
        n
        for n, known in (("sort", names), ("order", ORDERS))
        if n in given and given[n] not in known
    ]
    address.complain(wrong)
    for name, known, fallback in (("sort", names, "density"), ("order", ORDERS, "down")):
        if state.get(f"pictures_{name}") not in known:
            state[f"pictures_{name}"] = fallback
    if (state.get("pictures_feature") or 0) >= session.store.d_sae:  # of another store
        state["pictures_feature"] = None
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        st.number_input(
            "Feature",
            value=None,
            min_value=0,
            max_value=session.store.d_sae - 1,
            step=1,
            placeholder="all",
            key="pictures_feature",
            width=140,
            persist_state="session",
        )
        st.selectbox(
            "Order by",
            list(names),
            format_func=names.__getitem__,
            key="pictures_sort",
            width=220,
            persist_state="session",
        )
        st.segmented_control(
            "Order",
            list(ORDERS),
            format_func=ORDERS.__getitem__,
            required=True,
            key="pictures_order",
            persist_state="session",
        )
        st.toggle("Heat map", value=True, key="pictures_page_heat", persist_state="session")
    return state["pictures_sort"], state["pictures_order"]


def _page(total: int, question: tuple[object, ...]) -> int:
    """The page a reader is on; after a change of `question` (store, order) page 1."""
    pages = -(-total // PER_PAGE)
    wanted = min(max(st.session_state.pop("pictures_wanted", 1), 1), pages)
    if pages == 1:
        return 1
    key = f"pictures_page_{hash(question)}_{pages}"
    if wanted > 1:
        st.session_state[key] = wanted
    return st.pagination(pages, key=key, max_visible_pages=7, persist_state="session") or 1


def _features(session: Session, grid: Grid, rows: Sequence[dict], heat: bool) -> None:
    numbers = [int(row["feature"]) for row in rows]
    labels = session.notes.labels(numbers)
    for start in range(0, len(rows), 3):
        columns = st.columns(3, gap="large")
        for column, row in zip(columns, rows[start : start + 3], strict=False):
            with column.container(gap="small"):
                _feature(session, grid, row, labels.get(int(row["feature"]), ""), heat)


def _feature(session: Session, grid: Grid, row: dict, label: str, heat: bool) -> None:
    number = int(row["feature"])
    link(session, number, shortened(f"Feature {number}{' · ' + label if label else ''}", 44))
    st.caption(f"strongest {amount(row['max'])} · fires at {percent(row['density'])} of places")
    examples = queries.examples(session.store, session.version, number, "top", None)[:PICTURES]
    images = _images(session, examples)
    st.html(pictures_html(examples, images, grid, row["max"], heat=heat, width=_WIDTH))


def _images(session: Session, examples: Sequence[Example]) -> dict[int, bytes | None]:
    documents = {example.document for example in examples}
    return {n: queries.picture(session.store, session.version, n) for n in documents}


def _one(session: Session, grid: Grid, number: int, heat: bool) -> None:
    """The top pictures of one feature, and the places at which it fires."""
    feature = session.store.feature(number)
    link(session, number, f"Open feature {number}")
    if feature.dead:
        st.info("This feature never fires in this store.", icon=":material/visibility_off:")
        return
    left, right = st.columns([4, 9], gap="large")
    with left:
        st.markdown("##### Places")
        st.plotly_chart(
            fact_figures.place_map(_places(session.store, session.version, number)),
            config=figures.CONFIG,
            key="pictures_places",
            alt="Share of the pictures on which the feature fires at each place",
        )
        st.caption("The share of all pictures on which it fires at each place.")
    with right:
        st.markdown("##### Strongest pictures")
        examples = queries.examples(session.store, session.version, number, "top", None)
        images = _images(session, examples)
        st.html(pictures_html(examples, images, grid, feature.max, heat=heat))


@st.cache_data(max_entries=64, ttl=86_400, show_spinner=False)
def _places(_store: FeatureStore, version: queries.Version, number: int) -> np.ndarray:
    """The share of sequences in which a feature fires at each place, [rows, columns]."""
    grid = _store.grid
    assert grid is not None
    position, _ = _store.activations(number)
    counts = np.bincount(position % _store.context, minlength=_store.context)[grid.first :]
    return counts.reshape(grid.rows, grid.columns) / _store.overview().n_sequences


if __name__ == "__main__":
    render()
