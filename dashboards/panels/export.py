"""Taking the feature along: an HTML page, JSON, CSV, and HTML that embeds its page elsewhere."""

import csv
import io
import json

import streamlit as st

from dashboards.feature_html import features_page, iframe, page_title
from dashboards.pages import Panel
from dashboards.queries import FeatureData
from dashboards.session import Session
from dashboards.tokens import feature_url
from store.export.record import read_record
from store.export.saedashboard import dashboard_feature

PANEL = Panel(title="Export", order=60, heading=False)
_WINDOW = 16


def panel(session: Session, data: FeatureData) -> None:
    """Draw the panel."""
    number = data.feature.feature
    with st.expander("Export and embed", icon=":material/download:"):
        with st.container(horizontal=True, gap="small"):
            for name, kind, make in (
                ("HTML page", "html", _html),
                ("JSON", "json", _json),
                ("CSV of examples", "csv", _csv),
            ):
                st.download_button(
                    name,
                    data=lambda make=make: make(session, number),  # made only when it is asked for
                    file_name=f"feature-{number}.{kind}",
                    mime={"html": "text/html", "json": "application/json", "csv": "text/csv"}[kind],
                    key=f"export_{kind}_{session.name}_{number}",
                    on_click="ignore",
                )
        st.caption(
            "The page opens without a network. JSON is that of SAEDashboard. `saescope export` "
            "writes many features, for Neuronpedia and as Parquet, too."
        )
        st.caption("To show this page inside another while the explorer runs:")
        base = (st.context.url or "").split("?")[0].rpartition("/")[0]
        address = f"{base}/{feature_url(session.name, number)}&embed=true"
        st.code(iframe(address, f"Feature {number}"), language="html", wrap_lines=True)


def _html(session: Session, number: int) -> str:
    record = read_record(session.store, session.notes, number, _WINDOW)
    return features_page([record], session.store.overview(), page_title(record, session.name))


def _json(session: Session, number: int) -> str:
    record = read_record(session.store, session.notes, number)
    found = dashboard_feature(session.store, record)
    return json.dumps(found, ensure_ascii=False, allow_nan=False)


def _csv(session: Session, number: int) -> str:
    record = read_record(session.store, session.notes, number)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["kind", "interval", "activation", "title", "token", "text"])
    for each in [*record.top, *(e for interval in record.intervals for e in interval.examples)]:
        token, text = each.tokens[each.index - each.start], "".join(each.tokens)
        writer.writerow([each.kind, each.interval, each.activation, each.title, token, text])
    return stream.getvalue()
