"""Evaluation: everything that was measured on SAEs, side by side, with intervals and charts."""

from collections.abc import Sequence

import pandas as pd
import streamlit as st

from dashboards import address, catalogue, evaluations, figures
from dashboards.catalogue import Entry
from dashboards.pages import Page, page_at
from dashboards.reports import html_page, markdown
from dashboards.reports.content import report_of
from dashboards.reports.measured import Evaluation
from dashboards.reports.plotting import figure_of
from dashboards.session import Session, begin_page
from dashboards.tokens import plain
from saescope.errors import SaescopeError
from saescope.pieces import Chart, Report, Section, Table

PAGE = Page(title="Evaluation", icon=":material/fact_check:", order=57, url="evaluation")
_MOST = 12
_KEY, _LAST = "evaluation_saes", "evaluation_of"


def render() -> None:
    """Draw the page."""
    session = begin_page("Evaluation", ("saes",))
    entries = {entry.name: entry for entry in catalogue.entries()}
    measured = [name for name, entry in entries.items() if evaluations.is_measured(entry)]
    own = entries[session.name]
    if own.name not in measured:
        _unmeasured(own, alone=not measured)
    if not measured:
        return
    chosen = _choice(session, measured)
    address.write("evaluation", {"saes": ",".join(chosen)})
    found = _read([entries[name] for name in chosen])
    if not chosen:
        st.info("Choose an SAE.", icon=":material/fact_check:")
    if not found:
        return
    with st.spinner("Putting the figures together"):
        report = report_of(found)
    _ways([entries[each.name] for each in found], report)
    for warning in report.warnings:
        st.warning(plain(warning), icon=":material/balance:")
    for words in report.words:
        st.caption(plain(words))
    for section in report.sections:
        _section(section)


def _unmeasured(entry: Entry, *, alone: bool) -> None:
    """Say that the SAE the page is about was not measured, and how to."""
    what = "No SAE here" if alone else plain(entry.name)
    has = "has been measured" if alone else "has not been measured"
    st.info(
        f"{what} {has}. `saescope eval` measures one on text that it was not trained on; this page "
        "shows the result at once.",
        icon=":material/fact_check:",
    )
    command = entry.todo.removeprefix("measure it: ")
    st.code(command if command.startswith("saescope eval") else "saescope eval RUN", language=None)


def _choice(session: Session, measured: Sequence[str]) -> list[str]:
    arrived, state = address.arrived("evaluation", ("saes",)), st.session_state
    if arrived:
        asked = arrived["saes"].split(",")
        address.complain(["saes"] if any(name not in measured for name in asked) else [])
        state[_KEY] = asked
    elif state.get(_LAST) != session.name:  # another SAE was chosen above, or the page is new
        state[_KEY] = [session.name]
    state[_LAST] = session.name
    default = [session.name] if session.name in measured else [measured[0]]
    known = [name for name in state.get(_KEY, default) if name in measured][:_MOST]
    state[_KEY] = known or default
    return st.multiselect("SAEs", measured, key=_KEY, max_selections=_MOST, persist_state="session")


def _read(entries: Sequence[Entry]) -> list[Evaluation]:
    """The evaluations that can be read; of others a sentence says why not."""
    found = []
    for entry in entries:
        try:
            found.append(evaluations.evaluation_of(entry))
        except (SaescopeError, OSError) as error:
            st.error(plain(error), icon=":material/error:")
            st.caption("`saescope eval RUN --replace` measures it again.")
    return found


def _ways(entries: Sequence[Entry], report: Report) -> None:
    """Where to go from here, and the same as a file."""
    columns = st.columns([1, 1, 1.4, 2], vertical_alignment="center")
    for column, kind, name, text in (
        (columns[0], "HTML", "report.html", html_page.page(report)),
        (columns[1], "Markdown", "report.md", markdown.text(report)),
    ):
        column.download_button(
            f"Save as {kind}",
            text.encode(),
            name,
            icon=":material/download:",
            type="tertiary",
        )
    stores = [entry.store for entry in entries if entry.store is not None]
    if len(stores) > 1:
        columns[2].page_link(
            page_at("compare"),
            label="Compare their features",
            icon=":material/compare_arrows:",
            query_params={"sae": stores[0], "other": stores[1]},
        )


def _section(section: Section) -> None:
    st.markdown(f"### {plain(section.title)}")
    for words in section.words:
        st.caption(plain(words))
    for number, table in enumerate(section.tables):
        _table(table, f"{section.title}_{number}")
    for number in range(0, len(section.charts), 2):
        for column, chart in zip(
            st.columns(2, gap="large"), section.charts[number : number + 2], strict=False
        ):
            with column:
                _chart(chart)
    for number, table in enumerate(section.details):
        with st.expander(plain(table.title)):
            _frame(table, f"{section.title}_details_{number}")


def _table(table: Table, key: str) -> None:
    if table.title:
        st.markdown(f"**{plain(table.title)}**", help=table.about or None)
    _frame(table, key)


def _frame(table: Table, key: str) -> None:
    frame = pd.DataFrame(list(table.rows), columns=_told_apart(table.columns))
    st.dataframe(frame, key=f"evaluation_{key}", hide_index=True)


def _told_apart(names: Sequence[str]) -> list[str]:
    """Names of columns, of which no two may be the same."""
    return [f"{name}{' ' * list(names[:n]).count(name)}" for n, name in enumerate(names)]


def _chart(chart: Chart) -> None:
    st.markdown(f"**{plain(chart.title)}**", help=chart.about or None)
    st.plotly_chart(
        figure_of(chart), config=figures.CONFIG, key=f"evaluation_{chart.key}", alt=chart.title
    )


if __name__ == "__main__":
    render()
