"""Heads: which families of features share each attention head of an SAE's layer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import streamlit as st

from dashboards import address, catalogue, comparisons, figures, head_figures, queries
from dashboards.amounts import amount, counted
from dashboards.pages import Page
from dashboards.session import Session, begin_page, link_named
from dashboards.tokens import plain, plain_visible
from sae.analysis.attention.sums import sum_at
from saescope.errors import SaescopeError

PAGE = Page(title="Heads", icon=":material/hub:", order=63, url="heads")
MOST_ROWS = 500
_FILE = "attention.json"
_SITES = ("attn.hook_z", "hook_attn_out")
_FAMILIES = (
    "Where a feature fires, what raised its pre-activation is sorted by source token. Induction: "
    "what came after the same token earlier; local: a few tokens back; long-range: far back. More "
    "than half makes the family, the text's first token apart."
)
_OVERVIEW = (
    "Of each head's features the share of each family, its 95% interval over texts and, after the "
    "dot, the same of random directions read at the same places. Families: their effective number, "
    "and what as many features of all heads have."
)


def render() -> None:
    """Draw the page."""
    session = begin_page("Heads", ("head",))
    found = _measured(session)
    if found is None:
        return
    protocol = found["protocol"]
    st.caption(
        f"Layer {found['layer']}, {plain(found['site'])}: on {counted(protocol['texts'], 'text')}, "
        f"{counted(protocol['tokens'], 'token')}; features that fire at least "
        f"{counted(protocol['least'], 'time')}."
    )
    head = _choose(found)
    address.write("heads", {"head": str(head)})
    row, repeat = found["heads"][head], found["prefix_heads"][head]
    _numbers(found, row, repeat)
    left, right = st.columns(2, gap="large")
    with left:
        st.markdown("###### Families of its features", help=_FAMILIES)
        if row["shares"]:
            st.plotly_chart(
                head_figures.family_bars(row),
                config=figures.CONFIG,
                key=f"heads_families_{head}",
                alt="The share of each family in the head's features, beside random directions",
            )
            st.caption("Lines: 95% over texts. Dashes: random directions read at the same places.")
        else:
            st.info("No feature has most of its decoder in this head.", icon=":material/block:")
    with right:
        st.markdown(
            "###### Attention to what came next",
            help="From the end of a repeat in random tokens to the token that followed earlier.",
        )
        st.plotly_chart(
            head_figures.prefix_curve(repeat, "attention"),
            config=figures.CONFIG,
            key=f"heads_repeats_{head}",
            alt="Attention after a repeat by its length, and after a shuffled one",
        )
        st.caption("Lines: the effect's 95% interval over texts. Dotted: repeats shuffled.")
    _features(session, found, head)
    _tests(session, found)


def _measured(session: Session) -> dict[str, Any] | None:
    """What was measured of the SAE; None, after a sentence, where nothing can be shown."""
    meta = session.store.meta
    site = str(meta.get("site") or "")
    if (sum_at(site) or (0, ""))[1] not in _SITES:
        st.info(
            f"This SAE reads {plain(site) or 'an unknown site'}. Attention heads have features of "
            "their own where an SAE reads attention's outputs: attn.hook_z, hook_attn_out.",
            icon=":material/hub:",
        )
        return None
    (entry,) = (each for each in catalogue.entries() if each.store == session.name)
    path = None if entry.folder is None else entry.folder / _FILE
    if path is None or not path.is_file():
        st.info(
            "The heads of this SAE have not been measured: which families of features share each, "
            "and how they act on repeats.",
            icon=":material/hub:",
        )
        run = meta.get("sae_path") if entry.folder is None else entry.folder
        st.code(f"saescope attention {run}", language=None)
        return None
    try:
        found = _read(path, path.stat().st_mtime_ns)
    except (SaescopeError, OSError) as error:
        st.error(plain(error), icon=":material/error:")
        st.caption("`saescope attention RUN` measures it anew.")
        return None
    if found["sae_hash"] != meta.get("sae_hash"):
        st.error(
            f"{_FILE} is about another SAE than this store; `saescope attention RUN` measures it "
            "anew.",
            icon=":material/error:",
        )
        return None
    return found


@st.cache_data(max_entries=8, show_spinner=False)
def _read(path: Path, stamp: int) -> dict[str, Any]:
    del stamp
    from sae.analysis.attention.results_file import read_attention

    return read_attention(path)


def _choose(found: Mapping[str, Any]) -> int:
    """The head that the address asks for, or that is chosen in the table of all."""
    count = len(found["heads"])
    asked = address.arrived("heads", ("head",)).get("head")
    key = f"heads_chosen_{found['sae_hash']}"
    if asked is not None:
        fits = asked.isdecimal() and int(asked) < count
        address.complain([] if fits else ["head"])
        if fits:
            st.session_state[key] = int(asked)
    with st.expander(f"All {count} heads", expanded=True):
        st.dataframe(
            head_figures.overview(found["heads"], found["prefix_heads"]),
            key="heads_overview",
            hide_index=True,
        )
        st.caption(_OVERVIEW)
    if st.session_state.get(key) not in range(count):
        most = max(found["heads"], key=lambda row: row["features"])
        st.session_state[key] = most["head"]
    return st.selectbox("Head", range(count), key=key, width=200)


def _numbers(found: Mapping[str, Any], row: Mapping[str, Any], repeat: Mapping[str, Any]) -> None:
    columns = st.columns(4)
    columns[0].metric(
        "features",
        f"{row['features']:,}",
        border=True,
        help="Whose decoder has its largest norm in this head. 95 of 100 random directions have "
        f"less than {figures.percent(found['random_top_share'])} of theirs in any head.",
    )
    various, null = "none", ""
    if row["effective"] is not None:
        low, high = row["effective_interval"]
        various = amount(row["effective"])
        null = f"95% over texts: {amount(low)} to {amount(high)}. "
        null += "As many features of all heads: {} to {}.".format(*map(amount, row["others"]))
    columns[1].metric(
        "effective families", various, border=True, help=f"exp of the entropy of families. {null}"
    )
    half = repeat["half_length"]
    columns[2].metric(
        "on repeats",
        repeat["verdict"],
        border=True,
        help="Half of the largest effect is reached with at most 2 repeated tokens (short-prefix), "
        f"or more (long-prefix). Here: {half if half is not None else 'no effect'}.",
    )
    best = max(range(len(repeat["effect"])), key=repeat["effect"].__getitem__)
    columns[3].metric(
        "attention above null",
        f"{amount(repeat['effect'][best])} ± {amount(repeat['half_width'][best])}",
        border=True,
        help=f"With {counted(repeat['lengths'][best], 'repeated token')}; the interval is 95%.",
    )


def _features(session: Session, found: Mapping[str, Any], head: int) -> None:
    frame = head_figures.features_of(found, head)
    shown = comparisons.with_names(frame.head(MOST_ROWS), session.store, session.notes)
    number, text = st.column_config.NumberColumn, st.column_config.TextColumn
    shares = ("induction", "local", "middle", "long-range", "first")
    event = st.dataframe(
        shown,
        key=f"heads_features_{head}",
        hide_index=True,
        height=35 * min(len(shown) + 1, 12) + 3,
        on_select="rerun",
        selection_mode="single-row",
        column_order=[
            "feature",
            "label",
            "tokens",
            "share",
            "firings",
            "family",
            *shares,
            "null",
            "random",
        ],
        column_config={
            "feature": number("feature", width=80, format="%d"),
            "label": text("label", width="small"),
            "tokens": text("tokens", width="small"),
            "share": number("in head", format="percent", help="Of its decoder's norm over heads."),
            "firings": number("fires", format="localized"),
            "family": text("family", help=_FAMILIES),
            **{name: number(name, format="percent") for name in shares},
            "null": number(
                "induction, null",
                format="percent",
                help="Of a random direction at the same places.",
            ),
            "random": text("random's family", help="The family of that random direction."),
        },
    )
    more = f"The first {len(shown):,} of " if len(shown) < len(frame) else ""
    st.caption(f"{more}{counted(len(frame), 'feature')} of head {head}; click a row for its page.")
    for chosen in event.selection.rows[:1]:
        _link(session, int(shown["feature"].tolist()[chosen]))


def _link(session: Session, feature: int) -> None:
    name = queries.named(session.store, session.notes, [feature])[feature]
    link_named(session, feature, name)


def _tests(session: Session, found: Mapping[str, Any]) -> None:
    if not found["prefix"]:
        return
    st.markdown(
        "###### Features on repeats",
        help="Activation at the end of a repeat in random tokens, of the features that go most by "
        "induction and of as many others, before the token that each reads where it fires most.",
    )
    tests = head_figures.tests_of_features(found)
    tests["before"] = [plain_visible(each) for each in tests["before"]]
    left, right = st.columns([1.4, 1], gap="large")
    with left:
        event = st.dataframe(
            tests,
            key="heads_tests",
            hide_index=True,
            on_select="rerun",
            selection_mode="single-row",
            column_config={
                "effect": st.column_config.NumberColumn(
                    "effect", format="%.3g", help="Largest over lengths, above shuffled repeats."
                ),
                "interval": st.column_config.NumberColumn("±", format="%.2g", help="95%"),
                "null": st.column_config.NumberColumn("null", format="%.2g"),
                "half": st.column_config.NumberColumn(
                    "half at", help="Repeated tokens for half of the largest effect."
                ),
            },
        )
    row = next(iter(event.selection.rows), 0)
    with right:
        feature = int(tests["feature"].tolist()[row])
        st.plotly_chart(
            head_figures.prefix_curve(found["prefix"][row]["activation"], "activation"),
            config=figures.CONFIG,
            key=f"heads_test_{feature}",
            alt="A feature's activation after a repeat by its length, and after a shuffled one",
        )
        _link(session, feature)


if __name__ == "__main__":
    render()
