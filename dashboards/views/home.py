"""Home: all SAEs here with their metrics and what to do next, and one of them at a glance."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import streamlit as st

from dashboards import catalogue, figures, queries
from dashboards.amounts import counted
from dashboards.catalogue import Entry
from dashboards.clicks import clicked_row
from dashboards.pages import Page, page_at
from dashboards.session import Session, begin_page, link_named, open_feature
from dashboards.tokens import facts_html, measured_html, plain
from saescope.metrics import measured_rows, metric, shown_with_interval
from store.results import Overview

# the address is the one that this page had as "Overview"
PAGE = Page(title="Home", icon=":material/home:", order=10, url="overview")
_FACTS = {
    "model": "model",
    "site": "site",
    "architecture": "architecture",
    "corpus": "corpus",
    "tokens_trained": "trained on",
    "harvest": "harvest",
    "protocol": "metrics' protocol",
    "sae_path": "SAE folder",
    "created": "created",
}
_LISTED = ("l0", "fvu", "delta_ce", "dead_fraction")
_CHARTS = ("fvu", "delta_ce")


def render() -> None:
    """Draw the page."""
    session = begin_page("Home")
    entries = catalogue.entries()
    _list(entries)
    if len(entries) > 1:
        _pareto(entries)
        _one(session)
    else:  # a chart with one point says less than what is known of it
        _one(session)
        _pareto(entries)


# ---- all of them --------------------------------------------------------------------------------


def _list(entries: Sequence[Entry]) -> None:
    rows = [
        {
            "SAE": entry.name,
            "is": entry.state,
            "model": entry.model,
            "site": entry.site,
            "architecture": entry.architecture,
            "features": entry.d_sae,
            **{metric(name).title: entry.shown(name) for name in _LISTED},
        }
        for entry in entries
    ]
    frame = pd.DataFrame(rows)
    row = clicked_row(
        frame,
        "home",
        most=12,
        column_config={
            "SAE": st.column_config.TextColumn("SAE", width="medium"),
            "features": st.column_config.NumberColumn("features", format="localized"),
            **{
                metric(name).title: st.column_config.TextColumn(help=metric(name).about)
                for name in _LISTED
            },
        },
    )
    st.caption(
        "Metrics are on held-out text, with half of their 95 % intervals. Click a row to see that "
        "SAE below."
    )
    if row is not None:
        _open(entries[row])
    for entry in entries:
        if entry.problem:
            st.error(plain(entry.problem), icon=":material/error:")
    todo = [entry for entry in entries if entry.todo]
    if todo:
        with st.expander(f"What to do next ({len(todo)})", icon=":material/checklist:"):
            for entry in todo:
                what, _, command = entry.todo.partition(": ")
                st.markdown(f"**{plain(entry.name)}** · {plain(what)}")
                st.code(command, language=None, wrap_lines=True)


def _open(entry: Entry) -> None:
    if entry.store is None:
        st.switch_page(page_at("training"), query_params={"runs": entry.name})
    st.query_params["sae"] = entry.store
    st.rerun()


def _pareto(entries: Sequence[Entry]) -> None:
    """L0 against each of two metrics, over all SAEs that were evaluated."""
    titles = {name: metric(name).title for name in ("l0", *_CHARTS)}
    drawn = {name: points for name in _CHARTS if len(points := _points(entries, name))}
    if not drawn:
        st.info(
            "No SAE here has been evaluated: `saescope eval RUN` measures one, and a chart of L0 "
            "against error stands here.",
            icon=":material/monitoring:",
        )
        return
    columns = st.columns(len(_CHARTS), gap="large")
    for column, (name, points) in zip(columns, drawn.items(), strict=False):
        column.markdown(f"##### L0 and {plain(titles[name])}")
        column.plotly_chart(
            figures.pareto(points, name, titles),
            config=figures.CONFIG,
            key=f"pareto_{name}",
            alt=f"{titles[name]} of all evaluated SAEs against their L0",
        )
    protocols = {entry.protocol for entry in entries if entry.metrics}
    text = "Nearer to the corner at zero is better; bars are 95 % intervals."
    if len(protocols) > 1:
        text += " SAEs in different colours were measured differently, and do not compare."
    st.caption(text)


def _points(entries: Sequence[Entry], name: str) -> pd.DataFrame:
    rows = [
        (
            entry.name,
            entry.protocol,
            entry.metrics["l0"],
            entry.metrics[name],
            entry.metrics.get(f"{name}_interval"),
        )
        for entry in entries
        if all(isinstance(entry.metrics.get(each), int | float) for each in ("l0", name))
    ]
    frame = pd.DataFrame(rows, columns=["name", "protocol", "l0", name, "half"])
    return frame.astype({"half": float})


# ---- one of them --------------------------------------------------------------------------------


def _one(session: Session) -> None:
    facts = queries.overview(session.store, session.version)
    known = [fact for fact in (facts.model, facts.site, facts.architecture) if fact]
    st.markdown(f"### {plain(session.name)}")
    st.caption(" · ".join(plain(fact) for fact in known))
    _links(session)
    left, right = st.columns([3, 2], gap="large")
    with left:
        st.markdown("##### How often features fire")
        _densities(session, facts)
        st.markdown("##### What was measured")
        _metrics(facts)
    with right:
        st.markdown("##### Where it comes from")
        st.html(facts_html(_facts(session.store.meta, facts)))
        _marked(session)


def _metrics(facts: Overview) -> None:
    """Each metric with its interval and, in words beside it, what it is."""
    rows = [
        (
            "live features",
            f"{facts.d_sae - facts.n_dead:,} of {facts.d_sae:,}",
            "Features that fire at least once in this store.",
        )
    ]
    rows += [
        (row.title, shown_with_interval(row, facts.metrics), row.about)
        for row in measured_rows(facts.metrics, facts.table)
        if not row.minor and isinstance(facts.metrics[row.name], int | float)
    ]
    if not facts.metrics:
        l0 = metric("l0")
        text = "Mean number of features active at a position, over this whole store."
        rows.append((f"{l0.label} (store)", l0.shown(facts.mean_active), text))
    st.html(measured_html(rows))
    if not facts.metrics:
        st.caption("No metrics were recorded: `saescope eval` measures them, indexing keeps them.")


def _densities(session: Session, facts: Overview) -> None:
    densities = queries.densities(session.store, session.version)
    if facts.n_live:
        st.plotly_chart(
            figures.density_histogram(densities),
            config=figures.CONFIG,
            key="densities",
            alt="Histogram of the features' densities",
        )
    dense = int((densities > 0.1).sum())
    st.caption(
        f"{counted(facts.n_dead, 'dead feature')} not shown; {dense:,} fire at more than 10 % of "
        f"positions. On average {facts.mean_active:.1f} features fire at a position."
    )


def _facts(meta: Mapping[str, Any], facts: Overview) -> list[tuple[str, str]]:
    rows = []
    for key, name in _FACTS.items():
        value = meta.get(key)
        if value in (None, ""):
            continue
        if key == "tokens_trained" and isinstance(value, int):
            value = counted(value, "row")
        if key in ("harvest", "protocol"):
            value = str(value)[:16]
        if isinstance(value, dict):
            value = value.get("source") or value
        rows.append((name, str(value)))
    rows += [
        ("indexed", f"{counted(facts.n_documents, 'document')}, {facts.n_tokens:,} tokens"),
        ("sequences", f"{facts.n_sequences:,} of {facts.context} tokens"),
        ("positions seen", f"{facts.n_kept:,} (position 0 and special tokens are left out)"),
        ("activations", f"{facts.n_activations:,} ({facts.bytes / 1e6:,.0f} MB)"),
    ]
    return rows


def _links(session: Session) -> None:
    query = {"sae": session.name}
    with st.container(horizontal=True, vertical_alignment="center", gap="medium"):
        for url, label, icon in (
            ("features", "All features", ":material/table_rows:"),
            ("text", "Try a prompt", ":material/edit_note:"),
            ("steer", "Steer", ":material/explore:"),
        ):
            st.page_link(page_at(url), label=label, icon=icon, query_params=query, width="content")
        if st.button("Random feature", icon=":material/shuffle:", type="tertiary"):
            number = session.store.random_live()
            if number is not None:
                open_feature(session, number)


def _marked(session: Session) -> None:
    labels = session.notes.labels()
    favourites = session.notes.members()
    numbers = list(dict.fromkeys([*favourites, *labels]))[:24]
    if not numbers:
        return
    names = queries.named(session.store, session.notes, numbers)
    st.markdown("##### Labelled and favourite features")
    with st.container(key="marked"):
        for number in numbers:
            star = "★ " if number in favourites else ""
            link_named(session, number, names[number], before=star)


if __name__ == "__main__":
    render()
