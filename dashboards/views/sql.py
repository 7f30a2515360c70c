"""SQL: a reader's own questions to the store, answered as a table, a chart or CSV."""

import html
import time
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pandas as pd
import streamlit as st

from dashboards import figures, queries
from dashboards.amounts import COLUMN
from dashboards.pages import Page
from dashboards.session import Session, begin_page, open_feature
from dashboards.tokens import plain
from saescope.errors import InputError
from store.sql import MOST_ROWS, SECONDS

PAGE = Page(title="SQL", icon=":material/database:", order=120, url="sql")

EXAMPLES = {
    "Strongest features": """SELECT feature, density, mean, max, n_documents
FROM feature
ORDER BY max DESC
LIMIT 20""",
    "How many features fire how often": """SELECT floor(log10(density) * 4) / 4 AS log10_density,
       count(*) AS features
FROM feature
WHERE n_active > 0
GROUP BY log10_density
ORDER BY log10_density""",
    "Active features at each index of a sequence": """WITH context AS (
  SELECT value::INTEGER AS size FROM meta WHERE key = 'context'
)
SELECT position % size AS index, count(*) / (SELECT count(*) FROM sequence) AS active_features
FROM activation_by_position, context
GROUP BY index
ORDER BY index""",
    "Commonest tokens": """SELECT token_id, text, count(*) AS times
FROM (SELECT unnest(tokens) AS token_id FROM sequence)
JOIN vocabulary USING (token_id)
GROUP BY token_id, text
ORDER BY times DESC
LIMIT 30""",
    "Tokens that a feature fires on": """WITH context AS (
  SELECT value::INTEGER AS size FROM meta WHERE key = 'context'
), chosen AS (
  SELECT position, activation FROM activation_by_feature
  WHERE feature = (SELECT feature FROM feature ORDER BY max DESC LIMIT 1)
)
SELECT v.text, count(*) AS times, max(activation) AS strongest
FROM chosen, context
JOIN sequence s ON s.sequence = position // size
JOIN vocabulary v ON v.token_id = s.tokens[position % size + 1]
GROUP BY v.text
ORDER BY times DESC
LIMIT 30""",
    "Pairs that fire together": """SELECT feature, other, together, share, correlation
FROM coactivation
WHERE feature < other
ORDER BY correlation DESC
LIMIT 50""",
    "Facts about the store": """SELECT key, left(value, 200) AS value
FROM meta
ORDER BY key""",
}
KINDS = {"bar": "Bars", "line": "Line", "point": "Points"}
MOST_POINTS = 5000
_LONGEST_LINK = 1500
_PICK = "Choose an example …"


@dataclass(frozen=True)
class _Result:
    """An answer that is shown until the next one."""

    version: queries.Version
    query: str
    frame: pd.DataFrame
    seconds: float


def render() -> None:
    """Draw the page."""
    session = begin_page("SQL", ("q",))
    key = f"sql_result_{session.name}"
    linked = _read_address()
    left, right = st.columns([8, 5], gap="large")
    with right:
        _schema(session)
    with left:
        ran = _editor() or linked
        query = st.session_state["sql_query"] or ""
        if ran:
            _run(session, key, query)
        result: _Result | None = st.session_state.get(key)
        if result is None:
            st.caption(
                f"One SELECT of DuckDB's SQL, which reads the store and nothing else; up to "
                f"{SECONDS:g} s and {MOST_ROWS:,} rows."
            )
            return
        if result.version != session.version:
            st.info("The store has changed since; run the query again.", icon=":material/sync:")
            return
        _show(session, result)


def _read_address() -> bool:
    """Take over the query that the address has; whether there is a new one."""
    linked = st.query_params.get("q")
    if linked is None or linked == st.session_state.get("sql_address"):
        st.session_state.setdefault("sql_query", EXAMPLES["Strongest features"])
        return False
    st.session_state["sql_query"] = linked
    st.session_state["sql_address"] = linked
    return True


def _take_example() -> None:
    chosen = st.session_state["sql_example"]
    if chosen in EXAMPLES:
        st.session_state["sql_query"] = EXAMPLES[chosen]
    st.session_state["sql_example"] = _PICK


def _editor() -> bool:
    """Draw the field for the query; whether it is to be run."""
    st.selectbox(
        "Examples",
        [_PICK, *EXAMPLES],
        key="sql_example",
        on_change=_take_example,
        label_visibility="collapsed",
    )
    with st.form("sql_form", border=False), st.container(key="sql_editor"):
        st.text_area(
            "Query", key="sql_query", height=230, max_chars=20_000, label_visibility="collapsed"
        )
        return st.form_submit_button("Run", type="primary", icon=":material/play_arrow:")


def _run(session: Session, key: str, query: str) -> None:
    st.session_state.pop(key, None)
    if not query.strip():
        st.warning("Write a query first, or choose an example.", icon=":material/edit:")
        return
    began = time.perf_counter()
    try:
        with st.spinner("Asking the store …"):
            table = session.store.sql(query)
    except InputError as error:
        st.error(plain(str(error).removeprefix("query: ")), icon=":material/error:")
        return
    seconds = time.perf_counter() - began
    st.session_state[key] = _Result(session.version, query, _frame(table), seconds)
    if len(query) <= _LONGEST_LINK:
        st.query_params["q"] = query
        st.session_state["sql_address"] = query
    else:
        st.query_params.pop("q", None)


def _frame(table: Any) -> pd.DataFrame:
    """An answer as a frame: the names of its columns are unique, exact numbers are plain ones."""
    frame = table.to_pandas()
    repeated: Counter[str] = Counter()
    names = []
    for name in frame.columns:
        repeated[name] += 1
        names.append(name if repeated[name] == 1 else f"{name}_{repeated[name]}")
    frame.columns = names
    for name in names:
        values = frame[name].dropna()
        if len(values) and isinstance(values.iloc[0], Decimal):
            numbers = frame[name].astype(float)
            whole = len(values) == len(frame) and bool((numbers % 1 == 0).all())
            frame[name] = numbers.astype("int64") if whole else numbers
    return frame


def _show(session: Session, result: _Result) -> None:
    frame = result.frame
    rows = "row" if len(frame) == 1 else "rows"
    with st.container(horizontal=True, vertical_alignment="center"):
        took = (
            f"{result.seconds:.1f} s" if result.seconds >= 1 else f"{1000 * result.seconds:.0f} ms"
        )
        st.caption(f"{len(frame):,} {rows} in {took}", width="content")
        st.download_button(
            "CSV",
            frame.to_csv(index=False).encode(errors="replace"),
            file_name="result.csv",
            mime="text/csv",
            icon=":material/download:",
            type="tertiary",
            on_click="ignore",
        )
    if frame.empty:
        st.info("No row fits the query.", icon=":material/filter_alt_off:")
        return
    table, chart = st.tabs(["Table", "Chart"])
    with table:
        _table(session, frame)
    with chart:
        _chart(frame)


def _table(session: Session, frame: pd.DataFrame) -> None:
    opened = st.session_state.get("sql_opened", 0)
    has_features = "feature" in frame and pd.api.types.is_integer_dtype(frame["feature"])
    key = f"sql_table_{opened}"
    st.dataframe(
        frame,
        key=key,
        hide_index=True,
        height=35 * min(len(frame) + 1, 16) + 3,
        on_select="rerun" if has_features else "ignore",
        selection_mode="single-cell",
        column_config={
            name: st.column_config.NumberColumn(format=COLUMN)
            for name in frame
            if pd.api.types.is_float_dtype(frame[name])
        },
    )
    if not has_features:
        return
    st.caption("Click a row to open its feature.")
    cells = st.session_state[key].selection.cells
    if cells and cells[0][0] < len(frame):
        number = int(frame["feature"].iloc[cells[0][0]])
        if 0 <= number < session.store.d_sae:
            st.session_state["sql_opened"] = opened + 1  # nothing is selected on coming back
            open_feature(session, number)


def _chart(frame: pd.DataFrame) -> None:
    columns = list(frame.columns)
    numbers = [name for name in columns if pd.api.types.is_numeric_dtype(frame[name])]
    if not numbers:
        st.info("A chart needs a column of numbers.", icon=":material/bar_chart:")
        return
    left, middle, right = st.columns([2, 2, 2], vertical_alignment="bottom")
    asked = "|".join(columns)  # other columns are another choice
    x = left.selectbox("Across", columns, key=f"sql_x_{asked}") or columns[0]
    others = [name for name in numbers if name != columns[0]] or numbers
    y = (
        middle.selectbox("Up", numbers, index=numbers.index(others[0]), key=f"sql_y_{asked}")
        or others[0]
    )
    kind = right.segmented_control(
        "As",
        list(KINDS),
        format_func=KINDS.__getitem__,
        default="bar",
        required=True,
        key=f"sql_kind_{asked}",
    )
    shown = frame.head(MOST_POINTS)
    st.plotly_chart(
        figures.query_chart(shown, x, y, kind or "bar"),
        config=figures.DOWNLOADABLE,
        key="sql_chart",
        alt=f"Chart of {y} over {x}",
    )
    if len(frame) > MOST_POINTS:
        st.caption(f"The first {MOST_POINTS:,} of {len(frame):,} rows.")


def _schema(session: Session) -> None:
    st.markdown("##### Tables")
    blocks = []
    for table in session.store.tables():
        columns = "".join(
            f"<code>{html.escape(c.name)}</code><span>{html.escape(c.type.lower())}</span>"
            f"<span>{html.escape(c.about)}</span>"
            for c in table.columns
        )
        blocks.append(
            f"<details><summary><code>{html.escape(table.name)}</code> "
            f"<span>{html.escape(table.about)}</span></summary>"
            f'<div class="ss-columns">{columns}</div></details>'
        )
    st.html(f'<div class="ss-schema">{"".join(blocks)}</div>')


if __name__ == "__main__":
    render()
