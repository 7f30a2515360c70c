"""Two SAEs side by side: which of their features are the same, and which only one of them has."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from dashboards import comparisons, figures, find_stores, queries
from dashboards.amounts import counted
from dashboards.comparisons import SAEComparison
from dashboards.genealogies import lineage
from dashboards.pages import Page, page_at
from dashboards.parameters import shown
from dashboards.session import Session, begin_page
from dashboards.tokens import plain, plain_visible
from saescope.errors import SaescopeError
from saescope.metrics import metric
from saescope.paths import AnyPath
from store import Annotations, FeatureStore
from store.genealogy import merges_and_splits
from store.matching import MATCHED

PAGE = Page(title="Compare", icon=":material/compare_arrows:", order=55, url="compare")

SHOWN = ("matched", "a", "b")
MOST_ROWS = 1000
_ABOUT = {
    "activations": "Two features are as similar as their activations correlate (Pearson) over the "
    "positions of the harvest that both stores are of.",
    "decoder": "Two features are as similar as the cosine of their decoder directions. Both SAEs "
    "are loaded, which takes some seconds the first time.",
}
_MATCHED = (
    "Pairs one to one, of the largest total similarity (Hungarian matching). A pair counts as "
    f"matched from a similarity of {MATCHED:g} on, as in Paulo and Belrose 2025."
)


class _Side(NamedTuple):
    """One of the two SAEs."""

    name: str
    store: FeatureStore
    notes: Annotations
    version: queries.Version


def render() -> None:
    """Draw the page."""
    session = begin_page("Compare", ("other", "by", "show"))
    stores = find_stores.stores()
    if len(stores) < 2:
        _empty(session)
        return
    left, right = st.columns([1, 1.5], gap="large", vertical_alignment="bottom")
    sides = (_side(stores, session.name), _side(stores, _other(session, stores, left)))
    by = _way(sides, right)
    try:
        found = comparisons.compare(sides[0].version, sides[1].version, by, MATCHED)
    except SaescopeError as error:
        st.error(plain(error), icon=":material/error:")
        st.caption("Choose another SAE or another way to compare above.")
        _pareto(stores, sides)
        return
    _numbers(found, sides)
    _lineage(found, sides)
    left, right = st.columns(2, gap="large")
    with left:
        st.markdown("##### How alike")
        matching = found.matching
        st.plotly_chart(
            figures.similarity_histogram(
                matching.similarity_a,
                matching.similarity_b,
                (f"A, {_short(sides[0].name)}", f"B, {_short(sides[1].name)}"),
                found.chance,
            ),
            config=figures.CONFIG,
            key="similarities",
            alt="Histogram of each feature's largest similarity to one of the other SAE",
        )
    with right:
        _pareto(stores, sides)
    _tables(found, sides)


def _empty(session: Session) -> None:
    st.info(
        "Two SAEs are compared here, and there is one. Index another one into the same folder "
        "(`saescope index RUN --out FOLDER/NAME`), then open it: `saescope explore FOLDER`.",
        icon=":material/compare_arrows:",
    )
    st.page_link(
        page_at("features"),
        label="All features",
        icon=":material/table_rows:",
        query_params={"sae": session.name},
    )


def _side(stores: Mapping[str, AnyPath], name: str) -> _Side:
    store = queries.open_store(stores[name])
    return _Side(name, store, queries.annotations(store), queries.version_of(stores[name]))


def _short(name: str) -> str:
    text = plain_visible(name)
    return text if len(text) <= 30 else f"{text[:29]}…"


def _other(session: Session, stores: Mapping[str, AnyPath], column: DeltaGenerator) -> str:
    """The SAE to compare with, as the address says or a reader chooses."""
    names = [name for name in stores if name != session.name]
    asked = st.query_params.get("other")
    if asked is not None and asked not in names:
        st.warning(
            plain(f"There is no other SAE named {shown(asked)} here; this is {names[0]!r}."),
            icon=":material/link_off:",
        )
    st.session_state["compare_other"] = asked if asked in names else names[0]
    chosen = column.selectbox(
        f"A is {plain(session.name)}; compare it with B",
        names,
        key="compare_other",
        on_change=_change_other,
    )
    st.query_params["other"] = chosen
    return chosen


def _change_other() -> None:
    st.query_params["other"] = st.session_state["compare_other"]


def _way(sides: tuple[_Side, _Side], column: DeltaGenerator) -> str:
    """How to compare: by what the features fire on, or by what they write."""
    allowed = comparisons.ways(sides[0].store, sides[1].store)
    asked = st.query_params.get("by")
    if asked is not None and asked not in _ABOUT:
        st.warning(
            plain(f"{shown(asked)} is no way to compare; allowed: {', '.join(_ABOUT)}."),
            icon=":material/link_off:",
        )
    elif asked is not None and asked not in allowed:
        st.warning(
            "What they fire on can be compared only over one harvest, and these stores are of two.",
            icon=":material/link_off:",
        )
    first = next(iter(allowed))
    st.session_state["compare_by"] = asked if asked in allowed else first
    by = column.segmented_control(
        "Compare by",
        list(allowed),
        format_func=allowed.__getitem__,
        key="compare_by",
        required=True,
        on_change=_change_way,
    )
    chosen = by or first
    st.query_params["by"] = chosen
    st.caption(_ABOUT[chosen])
    return chosen


def _change_way() -> None:
    st.query_params["by"] = st.session_state["compare_by"]


def _numbers(found: SAEComparison, sides: tuple[_Side, _Side]) -> None:
    matching = found.matching
    pairs = len(matching.matched)
    chance = "" if found.chance is None else f" Random directions would have {found.chance:.3f}."
    mean = f"Mean over its features of the {found.over} with the most similar one of the other."
    shown_ = (
        ("matched pairs", f"{pairs:,}", _MATCHED),
        ("only in A", f"{len(matching.unmatched_a):,}", "Features of A in no matched pair."),
        ("only in B", f"{len(matching.unmatched_b):,}", "Features of B in no matched pair."),
        ("mean max similarity, A", f"{matching.mean_max_a:.3f}", mean + chance),
        ("mean max similarity, B", f"{matching.mean_max_b:.3f}", mean),
    )
    for column, (label, value, text) in zip(st.columns(5), shown_, strict=True):
        column.metric(label, value, help=text, border=True)
    dead = [side.store.overview().n_dead for side in sides]
    st.caption(
        f"By the {found.over}.{chance} Dead features count too: "
        f"A has {dead[0]:,} of {sides[0].store.d_sae:,}, B {dead[1]:,} of {sides[1].store.d_sae:,}."
    )


def _lineage(found: SAEComparison, sides: tuple[_Side, _Side]) -> None:
    """What became of features between two SAEs of one run; nothing of others."""
    times = lineage(sides[0].store, sides[1].store)
    if times is None:
        return
    earlier, later = (1, 0) if times.first_is_later else (0, 1)
    matching = found.matching if times.first_is_later else found.matching.flipped
    there = matching.similarity_a >= matching.threshold
    letters = ("A", "B")
    st.markdown(
        f"##### One run: {letters[earlier]} became {letters[later]}",
        help="A feature counts as there where the most similar one of the other is at least "
        f"{matching.threshold:g} similar. A split: several later features have the same most "
        "similar earlier one; a merge: the other way round.",
    )
    events = merges_and_splits(matching)
    kinds = [event["kind"] for event in events]
    st.caption(
        f"From {times.tokens[0]:,} to {times.tokens[1]:,} tokens of training. "
        f"{figures.percent(float(there.mean()))} of the features of {letters[later]} were there in "
        f"{letters[earlier]}, and {counted(int((~there).sum()), 'feature')} came after. "
        f"{counted(kinds.count('split'), 'split')}, {counted(kinds.count('merge'), 'merge')}."
    )
    if not events:
        return
    rows = [
        {
            "what": event["kind"],
            f"in {letters[earlier]}": str(event["feature" if split else "others"]),
            f"in {letters[later]}": str(event["others" if split else "feature"]),
        }
        for event in events[:MOST_ROWS]
        for split in [event["kind"] == "split"]
    ]
    with st.expander(f"Merges and splits ({len(events):,})", icon=":material/family_history:"):
        st.dataframe(
            pd.DataFrame(rows),
            key="compare_events",
            hide_index=True,
            height=35 * min(len(rows) + 1, 12) + 3,
        )
        if len(rows) < len(events):
            st.caption(f"The first {len(rows):,} of {len(events):,}.")


def _pareto(stores: Mapping[str, AnyPath], sides: tuple[_Side, _Side]) -> None:
    st.markdown("##### How good, at which L0")
    rows = comparisons.quality(stores, "fvu")
    names = [side.name for side in sides]
    missing = [name for name in names if name not in set(rows["name"])]
    if missing:
        which = " and ".join(plain(name) for name in missing)
        st.caption(f"Not measured: {which}. `saescope eval RUN`, then index it again.")
        return
    protocol = dict(zip(rows["name"], rows["protocol"], strict=True))[names[0]]
    same = pd.DataFrame(rows[rows["protocol"] == protocol])
    if names[1] not in set(same["name"]):
        st.caption(
            "They were measured under different protocols (other text or another number of "
            "tokens), so that their metrics cannot be compared: `saescope eval` both alike."
        )
        return
    st.plotly_chart(
        figures.pareto(same, "fvu", {name: metric(name).title for name in ("l0", "fvu")}),
        config=figures.CONFIG,
        key="pareto",
        alt="FVU against L0 of all SAEs that were measured alike",
    )
    left_out = len(stores) - len(same)
    if left_out:
        verb = "was" if left_out == 1 else "were"
        st.caption(f"{left_out:,} more {verb} not measured, or under another protocol.")


def _tables(found: SAEComparison, sides: tuple[_Side, _Side]) -> None:
    matching = found.matching
    counts = {
        "matched": f"In both ({len(matching.matched):,})",
        "a": f"Only in A ({len(matching.unmatched_a):,})",
        "b": f"Only in B ({len(matching.unmatched_b):,})",
    }
    asked = st.query_params.get("show", "matched")
    if asked not in SHOWN:
        st.warning(
            plain(f"{shown(asked)} is no table; allowed: {', '.join(SHOWN)}."),
            icon=":material/link_off:",
        )
        asked = "matched"
    st.session_state["compare_show"] = asked
    chosen = st.segmented_control(
        "Features",
        SHOWN,
        format_func=counts.__getitem__,
        key="compare_show",
        required=True,
        label_visibility="collapsed",
        on_change=_change_table,
    )
    st.query_params["show"] = chosen or "matched"
    rows = _rows(found, chosen or "matched")
    if not len(rows):
        st.info("There are none.", icon=":material/filter_alt_off:")
        return
    _table(rows, sides, f"{sides[0].name}_{sides[1].name}_{st.query_params['by']}_{chosen}")


def _change_table() -> None:
    st.query_params["show"] = st.session_state["compare_show"]


def _rows(found: SAEComparison, chosen: str) -> pd.DataFrame:
    """feature_a, feature_b, similarity; unmatched ones with the most similar of the other SAE."""
    matching = found.matching
    if chosen == "matched":
        return matching.matched.to_pandas()
    if chosen == "a":
        own, other, value = matching.unmatched_a, matching.nearest_a, matching.similarity_a
        frame = {"feature_a": own, "feature_b": other[own], "similarity": value[own]}
    else:
        own, other, value = matching.unmatched_b, matching.nearest_b, matching.similarity_b
        frame = {"feature_a": other[own], "feature_b": own, "similarity": value[own]}
    order = np.argsort(frame["similarity"], kind="stable")
    return pd.DataFrame(frame).iloc[order].reset_index(drop=True)


def _table(rows: pd.DataFrame, sides: tuple[_Side, _Side], key: str) -> None:
    frame = rows.head(MOST_ROWS).copy()
    labelled = {}
    for name, side in zip(("a", "b"), sides, strict=True):
        numbers = [int(number) for number in frame[f"feature_{name}"]]
        names = queries.named(side.store, side.notes, numbers, 5)
        frame[f"about_{name}"] = [names[number].text for number in numbers]
        labelled[f"about_{name}"] = [names[number].labelled for number in numbers]
    number = st.column_config.NumberColumn
    words = st.column_config.TextColumn
    about = "Its label, or the commonest tokens of its strongest examples."
    event = st.dataframe(
        queries.muted(frame, labelled),
        key=f"compare_table_{key}",
        hide_index=True,
        height=35 * min(len(frame) + 1, 14) + 3,
        on_select="rerun",
        selection_mode="single-row",
        column_order=["feature_a", "about_a", "similarity", "feature_b", "about_b"],
        column_config={
            "feature_a": number("in A", width=80, format="%d"),
            "about_a": words("about", width="large", help=about),
            "similarity": number("similarity", format="%.3f"),
            "feature_b": number("in B", width=80, format="%d"),
            "about_b": words("about", width="large", help=about),
        },
    )
    total = f"{len(frame):,} of {len(rows):,}" if len(frame) < len(rows) else f"{len(rows):,}"
    st.caption(f"{total} rows. Select a row for links to both features.")
    if event.selection.rows:
        row = frame.iloc[event.selection.rows[0]]
        columns = st.columns(2)
        for column, side, name in zip(columns, sides, ("a", "b"), strict=True):
            feature = int(row[f"feature_{name}"])
            about = queries.named(side.store, side.notes, [feature])[feature]
            column.page_link(
                page_at("feature"),
                label=f"Feature {feature} of {plain(side.name)} · {about.markdown}",
                icon=":material/search:",
                query_params={"sae": side.name, "feature": str(feature)},
            )


if __name__ == "__main__":
    render()
