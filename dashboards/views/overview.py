"""A store at a glance: what was trained on what, how good it is, how its features fire."""

from collections.abc import Mapping
from typing import Any

import streamlit as st

from dashboards import figures, queries
from dashboards.pages import Page, page_at
from dashboards.session import Session, begin_page, link, open_feature
from dashboards.tokens import facts_html, plain
from saescope.metrics import measured_rows, metric
from store.results import Overview

PAGE = Page(title="Overview", icon=":material/dashboard:", order=10, url="overview")
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


def render() -> None:
    """Draw the page."""
    session = begin_page("")
    facts = queries.overview(session.store, session.version)
    st.markdown(f"## {plain(facts.name)}")
    known = [fact for fact in (facts.model, facts.site, facts.architecture) if fact]
    st.caption(" · ".join(plain(fact) for fact in known))
    _metrics(facts)
    left, right = st.columns([3, 2], gap="large")
    with left:
        st.markdown("##### How often features fire")
        _densities(session, facts)
    with right:
        st.markdown("##### Where it comes from")
        st.html(facts_html(_facts(session.store.meta, facts)))
    _links(session)


def _metrics(facts: Overview) -> None:
    shown = [
        (
            "live features",
            f"{facts.d_sae - facts.n_dead:,}",
            f"Features that fire at least once in this store, of {facts.d_sae:,}; "
            f"{facts.n_dead:,} never do.",
        ),
    ]
    for row in measured_rows(facts.metrics, facts.table):
        value = facts.metrics[row.name]
        if row.minor or not isinstance(value, int | float):
            continue
        interval = facts.metrics.get(f"{row.name}_interval")
        more = f" 95 % interval: ± {interval:.2g}." if isinstance(interval, float) else ""
        shown.append((plain(row.title), row.shown(value), plain(row.about) + more))
    if not facts.metrics:
        l0 = metric("l0")
        text = "Mean number of features active at a position, over this whole store."
        shown.append((f"{l0.label} (store)", l0.shown(facts.mean_active), text))
    for first in range(0, len(shown), 5):
        columns = st.columns(5)
        for column, (label, value, text) in zip(columns, shown[first : first + 5], strict=False):
            column.metric(label, value, help=text, border=True)
    if facts.metrics:
        st.caption("Metrics are on held-out text; rest the pointer on ? to see what each means.")
    else:
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
        f"{facts.n_dead:,} dead features are not shown; {dense:,} fire at more than 10 % of "
        f"positions. On average {facts.mean_active:.1f} features fire at a position."
    )


def _facts(meta: Mapping[str, Any], facts: Overview) -> list[tuple[str, str]]:
    rows = []
    for key, name in _FACTS.items():
        value = meta.get(key)
        if value in (None, ""):
            continue
        if key == "tokens_trained" and isinstance(value, int):
            value = f"{value:,} tokens"
        if key in ("harvest", "protocol"):
            value = str(value)[:16]
        if isinstance(value, dict):
            value = value.get("source") or value
        rows.append((name, str(value)))
    rows += [
        ("indexed", f"{facts.n_documents:,} documents, {facts.n_tokens:,} tokens"),
        ("sequences", f"{facts.n_sequences:,} of {facts.context} tokens"),
        ("positions seen", f"{facts.n_kept:,} (position 0 and special tokens are left out)"),
        ("activations", f"{facts.n_activations:,} ({facts.bytes / 1e6:,.0f} MB)"),
    ]
    return rows


def _links(session: Session) -> None:
    st.markdown("##### Look around")
    query = {"sae": session.name}
    columns = st.columns([1, 1, 1, 3], vertical_alignment="center")
    with columns[0]:
        st.page_link(
            page_at("features"),
            label="All features",
            icon=":material/table_rows:",
            query_params=query,
        )
    with columns[1]:
        if st.button("Random feature", icon=":material/shuffle:", type="tertiary"):
            number = session.store.random_live()
            if number is not None:
                open_feature(session, number)
    with columns[2]:
        st.page_link(
            page_at("text"), label="Try a prompt", icon=":material/edit_note:", query_params=query
        )
    labels = session.notes.labels()
    favourites = session.notes.members()
    if not labels and not favourites:
        return
    st.markdown("##### Labelled and favourite features")
    numbers = list(dict.fromkeys([*favourites, *labels]))[:24]
    with st.container(key="marked"):
        columns = st.columns(4)
        for index, number in enumerate(numbers):
            star = "★ " if number in favourites else ""
            with columns[index % 4]:
                link(session, number, f"{star}{number}  {labels.get(number, '')}")
