"""Which features fire more in one group of documents than in another."""

import functools
import io
from collections.abc import Mapping, Sequence
from itertools import compress

import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from dashboards import comparisons, figures, find_stores, queries
from dashboards.amounts import COLUMN
from dashboards.pages import Page
from dashboards.parameters import shown
from dashboards.queries import version_of
from dashboards.session import Session, begin_page, link
from dashboards.tokens import plain
from saescope.errors import SaescopeError
from saescope.paths import AnyPath
from store import FeatureStore
from store.diff import DatasetDiff, Group
from store.document_groups import matching
from store.fact_writer import GROUP_KINDS

PAGE = Page(title="Diff", icon=":material/difference:", order=50, url="diff")

KINDS = {
    "title": "Title contains",
    "key": "Key contains",
    "topic": "Topic is",
    "source": "Source is",
    "train": "Training documents",
    "held_out": "Held-out documents",
    "all": "All documents",
}
KINDS_B = {"rest": "All other documents", **KINDS}
PERMUTATIONS = {"1000": "1,000", "10000": "10,000", "100000": "100,000"}
RATES = {"0.01": "1 %", "0.05": "5 %", "0.1": "10 %", "0.2": "20 %"}
MOST_ROWS = 1000
_TEST = (
    "A feature's density in a group is the share of the group's kept positions at which it fires. "
    "p is the share of random divisions of the same documents into groups of the same sizes whose "
    "densities differ at least as much: documents are exchanged, not positions, because positions "
    "of one document are alike. q is p adjusted for all tested features (Benjamini and Hochberg "
    "1995): of the features with q up to 5 %, about 5 % are false discoveries. Features that fire "
    "in fewer than 5 documents are not tested."
)


def render() -> None:
    """Draw the page."""
    session = begin_page("Diff", ("a", "b", "other", "permutations", "fdr", "feature"))
    stores = find_stores.stores()
    _choose(session, comparisons.stores_of_same_sae(stores, session.name))
    a, b = st.query_params.get("a"), st.query_params.get("b", "rest")
    if a is None:
        _empty()
        return
    other = _other(stores, session)
    permutations = int(_one_of("permutations", PERMUTATIONS, "10000"))
    fdr = float(_one_of("fdr", RATES, "0.05"))
    try:
        found = comparisons.dataset_diff(
            session.version, other and version_of(other), a, b, permutations, fdr
        )
    except SaescopeError as error:
        st.error(plain(error), icon=":material/error:")
        st.caption("Choose other documents above, and press Compare.")
        return
    _summary(found)
    if not len(found.rows):
        st.info("No feature fires in these documents.", icon=":material/visibility_off:")
        return
    feature = _features(session, found)
    if feature is None:
        st.caption("Click a row, or a point, to see the documents that the feature fires in.")
        return
    _documents(session, other, found, feature)


def _empty() -> None:
    st.info(
        "Choose two groups of documents and press Compare: those whose title has a word and all "
        "others, say, or two topics, or training and held-out documents.",
        icon=":material/difference:",
    )
    st.caption(_TEST)


def _one_of(name: str, allowed: Mapping[str, str], fallback: str) -> str:
    raw = st.query_params.get(name, fallback)
    if raw in allowed:
        return raw
    st.warning(
        plain(f"{shown(raw)} is no choice of {name}; this is {allowed[fallback]}."),
        icon=":material/link_off:",
    )
    return fallback


def _other(stores: Mapping[str, AnyPath], session: Session) -> AnyPath | None:
    """The store that the address names for group B, if any."""
    name = st.query_params.get("other")
    if name is None or name == session.name:
        return None
    if name not in stores:
        st.warning(
            plain(f"There is no store named {shown(name)} here; B is of {session.name!r}."),
            icon=":material/link_off:",
        )
        return None
    return stores[name]


def _choose(session: Session, others: list[str]) -> None:
    """The fields, which show what the address says; Compare writes them into it."""
    of_b = _store_of_b(session, others)
    names = {
        "A": comparisons.names_of_groups(session.store),
        "B": comparisons.names_of_groups(of_b),
    }
    _fill_fields(others, names)
    columns = st.columns([1.3, 2, 0.25, 1.3, 2], vertical_alignment="bottom")
    a = _group(columns[0], columns[1], "A", KINDS, names["A"])
    columns[2].markdown("vs.", text_alignment="center")
    b = _group(columns[3], columns[4], "B", KINDS_B, names["B"])
    columns = st.columns([1.3, 1.3, 1.3, 1, 2], vertical_alignment="bottom")
    columns[0].selectbox(
        "False discoveries up to",
        list(RATES),
        format_func=RATES.__getitem__,
        key="diff_fdr",
        help="The expected share of features among those found that do not differ.",
    )
    columns[1].selectbox(
        "Permutations",
        list(PERMUTATIONS),
        format_func=PERMUTATIONS.__getitem__,
        key="diff_permutations",
        help="More of them tell differences of few features among many, and take longer.",
    )
    if others:
        columns[2].selectbox("B is of", [session.name, *others], key="diff_other")
    with columns[3 if others else 2]:
        if not st.button("Compare", type="primary", width="stretch"):
            return
    chosen = {"a": a, "b": b, "fdr": st.session_state["diff_fdr"]}
    chosen["permutations"] = st.session_state["diff_permutations"]
    st.query_params.pop("other", None)
    if others and st.session_state["diff_other"] != session.name:
        chosen["other"] = st.session_state["diff_other"]
    st.query_params.pop("feature", None)
    st.query_params.update(chosen)
    st.session_state["diff_shown"] = _address()


def _store_of_b(session: Session, others: list[str]) -> FeatureStore:
    """The store of group B as the field has it, or else the address."""
    chosen = st.session_state.get("diff_other", st.query_params.get("other"))
    if chosen not in others:
        return session.store
    return queries.open_store(find_stores.stores()[chosen])


def _address() -> tuple[str | None, ...]:
    names = ("sae", "a", "b", "other", "permutations", "fdr")
    return tuple(st.query_params.get(name) for name in names)


def _fill_fields(others: list[str], names: Mapping[str, Mapping[str, list[str]]]) -> None:
    """Put what the address says into the fields, where it is not what they were filled from."""
    if st.session_state.get("diff_shown") == _address() and "diff_A" in st.session_state:
        return
    st.session_state["diff_shown"] = _address()
    for name, kinds, fallback in (("A", KINDS, "title"), ("B", KINDS_B, "rest")):
        kind, words = comparisons.read_group(st.query_params.get(name.lower(), fallback))
        st.session_state[f"diff_{name}"] = kind if kind in kinds else fallback
        known = names[name].get(kind)
        st.session_state[f"diff_{name}_words"] = words if known is None else ""
        fits = matching(known or [], words)
        st.session_state[f"diff_{name}_names"] = list(compress(known or [], fits))
    raw = {name: st.query_params.get(name) for name in ("fdr", "permutations", "other")}
    st.session_state["diff_fdr"] = raw["fdr"] if raw["fdr"] in RATES else "0.05"
    known = raw["permutations"] in PERMUTATIONS
    st.session_state["diff_permutations"] = raw["permutations"] if known else "10000"
    if raw["other"] in others:
        st.session_state["diff_other"] = raw["other"]


def _group(
    left: DeltaGenerator,
    right: DeltaGenerator,
    name: str,
    kinds: Mapping[str, str],
    names: Mapping[str, list[str]],
) -> str:
    kind = left.selectbox(
        f"Documents {name}",
        list(kinds),
        format_func=kinds.__getitem__,
        key=f"diff_{name}",
        persist_state="session",
    )
    if kind in GROUP_KINDS:
        return comparisons.written_group(kind, _chosen_names(right, name, kind, names[kind]))
    words = right.text_input(
        f"Words of {name}",
        key=f"diff_{name}_words",
        max_chars=400,
        disabled=kind not in ("title", "key"),
        placeholder="music | song" if kind in ("title", "key") else "",
        help="Several are separated by |. A word is found anywhere in the title or key; with * or "
        "? in it, it must be the whole one.",
        persist_state="session",
    )
    return comparisons.written_group(kind or "title", words or "")


def _chosen_names(right: DeltaGenerator, name: str, kind: str, known: list[str]) -> str:
    """The field for topics or sources, of which there may be none; what is chosen, as a pattern."""
    key = f"diff_{name}_names"
    st.session_state[key] = [each for each in st.session_state.get(key, []) if each in known]
    chosen = right.multiselect(
        f"{kind.capitalize()}s of {name}",
        known,
        key=key,
        disabled=not known,
        placeholder=f"Choose {kind}s" if known else f"The store has no {kind}s of documents",
        help=f"Documents of any of these {kind}s.",
        persist_state="session",
    )
    return comparisons.written_names(chosen)


def _summary(found: DatasetDiff) -> None:
    differing = found.differing
    up = int((differing["difference"].to_numpy() > 0).sum())
    values = (
        ("features that differ", f"{len(differing):,}", f"of {found.tested:,} tested"),
        ("fire more in A", f"{up:,}", plain(_described(found.a))),
        ("fire more in B", f"{len(differing) - up:,}", plain(_described(found.b))),
    )
    for column, (label, value, about) in zip(st.columns(3), values, strict=True):
        with column.container(border=True):
            st.metric(label, value, help=_TEST if label.startswith("features") else None)
            st.caption(about)
    if found.undecided:
        st.warning(
            f"{found.undecided:,} more features are beyond every permutation, but too few were "
            "made to tell that among so many features: choose more permutations.",
            icon=":material/casino:",
        )


def _described(group: Group) -> str:
    name = "all others" if group.name == "rest" else group.name
    return f"{name} · {group.documents:,} documents · {group.positions:,} positions"


def _features(session: Session, found: DatasetDiff) -> int | None:
    """Draw all features as points and as a table; the one that is chosen."""
    rows = found.rows.to_pandas()
    key = f"{hash((session.name, _address()))}"
    points = f"diff_points_{key}"
    st.plotly_chart(
        figures.difference_scatter(rows, found.fdr),
        config=figures.CONFIG,
        key=points,
        on_select=functools.partial(_choose_point, points),
        selection_mode="points",
        alt="Features by density, and by the ratio of their densities in both groups",
    )
    only = st.toggle(
        f"Only features that differ (q ≤ {RATES[f'{found.fdr:g}']})",
        value=bool(len(found.differing)),
        key=f"diff_only_{key}",
    )
    chosen = rows[rows["q"] <= found.fdr] if only else rows
    _table(session, chosen, f"diff_table_{key}_{only}")
    known = {str(number) for number in rows["feature"]}
    asked = st.query_params.get("feature")
    if asked is not None and asked not in known:
        st.warning(
            plain(f"{shown(asked)} is no feature that fires in these documents."),
            icon=":material/link_off:",
        )
        return None
    return None if asked is None else int(asked)


def _choose_point(key: str) -> None:
    for point in st.session_state[key].selection.points:
        feature = point["customdata"]
        st.query_params["feature"] = str(feature[0] if isinstance(feature, list) else feature)


def _choose_row(key: str, features: Sequence[int]) -> None:
    for row in st.session_state[key].selection.rows:
        st.query_params["feature"] = str(features[row])


def _table(session: Session, rows: pd.DataFrame, key: str) -> None:
    """The table of features; selecting a row chooses its feature."""
    if not len(rows):
        st.info("No feature differs at this rate.", icon=":material/filter_alt_off:")
        return
    frame = comparisons.with_names(rows.head(MOST_ROWS), session.store, session.notes)
    number = st.column_config.NumberColumn
    shares = frame.assign(
        density_a=100 * frame["density_a"], density_b=100 * frame["density_b"]
    ).drop(columns=["difference", "positions_a", "positions_b"])
    features = [int(feature) for feature in frame["feature"]]
    st.dataframe(
        shares,
        key=key,
        hide_index=True,
        height=35 * min(len(frame) + 1, 12) + 3,
        on_select=functools.partial(_choose_row, key, features),
        selection_mode="single-row",
        column_order=[
            *("feature", "label", "tokens", "density_a", "density_b", "log2_ratio"),
            *("documents_a", "documents_b", "p", "q"),
        ],
        column_config={
            "feature": number("feature", width=80, format="%d"),
            "tokens": st.column_config.TextColumn("tokens", width="large"),
            "density_a": number("density in A", format="%.4f %%"),
            "density_b": number("density in B", format="%.4f %%"),
            "log2_ratio": number(
                "log₂ A/B",
                format="%+.2f",
                help="+1: fires twice as often in A. Half a position is added to both counts, so "
                "that no ratio is infinite.",
            ),
            "documents_a": number("documents A", format="localized"),
            "documents_b": number("documents B", format="localized"),
            "p": number("p", format="%.2g"),
            "q": number("q", format="%.2g", help="p, adjusted for all tested features."),
        },
    )
    left, right = st.columns([4, 1], vertical_alignment="center")
    more = f"the {len(frame):,} surest of " if len(frame) < len(rows) else ""
    left.caption(f"{more}{len(rows):,} features, surest first".capitalize())
    table = io.BytesIO()
    rows.to_csv(table, index=False)
    right.download_button(
        "Download CSV",
        table.getvalue(),
        f"{session.name}-diff.csv",
        "text/csv",
        icon=":material/download:",
        type="tertiary",
    )


def _documents(session: Session, other: AnyPath | None, found: DatasetDiff, feature: int) -> None:
    row = found.rows.filter(found.rows["feature"].to_numpy() == feature).to_pylist()[0]
    name = queries.named(session.store, session.notes, [feature])[feature]
    st.markdown(f"##### Feature {feature} · {name.markdown}")
    link(session, feature, "Open this feature")
    outside = found.a.name if other is None else None
    version_b = session.version if other is None else version_of(other)
    groups = (
        ("A", session.version, found.a, None, row["documents_a"], row["density_a"]),
        ("B", version_b, found.b, outside, row["documents_b"], row["density_b"]),
    )
    columns = st.columns(2, gap="large")
    for column, (name, version, group, outer, count, density) in zip(columns, groups, strict=True):
        documents = "document" if count == 1 else "documents"
        with column:
            st.markdown(f"**{name}**: {count:,} {documents}, {figures.percent(density)}")
            if not count:
                st.caption("It fires in none of these documents.")
                continue
            _document_table(comparisons.documents(version, feature, group.name, outer))


def _document_table(frame: pd.DataFrame) -> None:
    number = st.column_config.NumberColumn
    st.dataframe(
        frame.assign(share=100 * frame["share"]),
        hide_index=True,
        height=35 * min(len(frame) + 1, 9) + 3,
        column_order=["title", "positions", "share", "strongest"],
        column_config={
            "title": st.column_config.TextColumn("document", width="medium"),
            "positions": number("fires at", format="localized", help="Positions."),
            "share": number("of its positions", format="%.2f %%"),
            "strongest": number("strongest", format=COLUMN),
        },
    )
    if len(frame) == 20:
        st.caption("The 20 documents in which it fires most.")


if __name__ == "__main__":
    render()
