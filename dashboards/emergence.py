"""The section of the Training page on the features of a run as they emerge from its snapshots."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import streamlit as st

from dashboards import figures, queries
from dashboards.amounts import counted
from dashboards.genealogies import ABOUT, Emergence, emergence, snapshots
from dashboards.pages import page_at
from dashboards.run_folders import RunFolder
from dashboards.session import Session, session_of_sae
from dashboards.tokens import plain
from saescope.errors import SaescopeError

MOST_ROWS = 1000
_LINES = 5


def section(runs: Sequence[RunFolder]) -> None:
    """Draw it for one of these runs: those that are trained and kept snapshots."""
    st.markdown("##### Features as they emerge", help=ABOUT)
    kept = {run.name: run for run in runs if run.state == "finished" and snapshots(run.path)}
    if not kept:
        st.caption(
            "None of these runs is trained and has snapshots to find its features in. `saescope "
            "train … --trainer.snapshots 12` keeps some along the way."
        )
        return
    asked = st.query_params.get("emerged")
    if asked in kept:
        st.session_state["emergence_run"] = asked
    name = next(iter(kept))
    if len(kept) > 1:
        name = st.selectbox("Of the run", list(kept), key="emergence_run", width=360)
    if asked != name:
        versions = counted(len(snapshots(kept[name].path)), "snapshot")
        if not st.button(
            f"Find its features in {versions}",
            icon=":material/family_history:",
            help="Takes a second or so a snapshot for 4,096 features, and four times as long for "
            "twice as many.",
        ):
            return
        st.query_params["emerged"] = name
    try:
        _draw(name, emergence(kept[name].path))
    except (SaescopeError, OSError) as error:
        st.error(plain(error), icon=":material/error:")
        st.caption("`saescope doctor` says which files of a run are damaged.")


def _draw(name: str, emergence: Emergence) -> None:
    found, tokens = emergence.found, emergence.tokens
    emerged = found.emerged()
    early = int((emerged == 0).sum())
    last = int((emerged == len(found.names)).sum())
    st.caption(
        f"Of {counted(len(emerged), 'feature')} {early:,} are in the first snapshot and all after "
        f"it, {last:,} in none that lasts. Dead features count too: they hardly move, and seem to "
        "emerge early."
    )
    session = session_of_sae(emergence.sae_hash)
    left, right = st.columns(2, gap="large")
    with right:
        chosen = _table(name, emergence, emerged, session)
    with left:
        st.markdown("###### Share of the features found")
        st.plotly_chart(
            figures.curves(
                [
                    ("features of the trained SAE", tokens, [*found.share, 1.0]),
                    ("random directions", tokens[:-1], found.null_share.tolist()),
                ],
                f"share found (cosine ≥ {found.threshold:g})",
                log_tokens=True,
            ),
            config=figures.CONFIG,
            key="emergence_share",
            alt="Share of the trained SAE's features that each snapshot has, over tokens",
        )
        st.markdown("###### Cosine of a feature to its final self")
        lines = [
            (f"feature {feature}", tokens, [*found.similarity[:, feature], 1.0])
            for feature in chosen
        ]
        null = ("random direction, mean", tokens[:-1], found.null.mean(1).tolist())
        st.plotly_chart(
            figures.curves([*lines, null], "largest cosine", log_tokens=True, height=300),
            config=figures.CONFIG,
            key="emergence_lines",
            alt="Largest cosine of some features with any of each snapshot, over tokens",
        )


def _table(
    name: str, emergence: Emergence, emerged: np.ndarray, session: Session | None
) -> list[int]:
    """The features by when they emerged; the numbers of those whose lines to draw."""
    names = emergence.names
    counts = np.bincount(emerged, minlength=len(names))
    when = st.selectbox(
        "Features that emerged at",
        [-1, *range(len(names))],
        format_func=lambda n: (
            f"any time ({len(emerged):,})" if n < 0 else f"{names[n]} ({counts[n]:,})"
        ),
        key="emergence_when",
    )
    numbers = np.argsort(emerged, kind="stable")
    if when >= 0:
        numbers = numbers[emerged[numbers] == when]
    if not len(numbers):
        st.info("None emerged then.", icon=":material/filter_alt_off:")
        return []
    shown = numbers[:MOST_ROWS]
    frame = _rows(emergence, emerged, shown, session)
    event = st.dataframe(
        frame,
        key=f"emergence_table_{name}_{when}",
        hide_index=True,
        height=35 * min(len(frame) + 1, 14) + 3,
        on_select="rerun",
        selection_mode="multi-row",
        column_config=_COLUMNS,
    )
    cut = f"{len(shown):,} of {len(numbers):,}" if len(shown) < len(numbers) else f"{len(shown):,}"
    st.caption(f"{cut} rows, earliest first. Select rows to draw their lines.")
    selected = [int(frame["feature"].iloc[row]) for row in event.selection.rows][:_LINES]
    if not selected:
        at = np.linspace(0, len(numbers) - 1, min(_LINES, len(numbers))).round().astype(int)
        return [int(feature) for feature in numbers[at]]
    if session is not None:
        first = selected[0]
        name_of = queries.named(session.store, session.notes, [first])[first]
        st.page_link(
            page_at("feature"),
            label=f"Feature {selected[0]} · {name_of.markdown}",
            icon=":material/search:",
            query_params={"sae": session.name, "feature": str(selected[0])},
        )
    return selected


def _rows(
    emergence: Emergence, emerged: np.ndarray, numbers: np.ndarray, session: Session | None
) -> pd.DataFrame:
    columns: dict[str, object] = {"feature": numbers}
    if session is not None:
        listed = [int(number) for number in numbers]
        names = queries.names(session.store, session.notes, listed)
        columns["about"] = [names[number] for number in listed]
    columns["emerged at"] = [emergence.names[emerged[number]] for number in numbers]
    similarity = emergence.found.similarity
    columns["cosine"] = [[*similarity[:, number].round(3), 1.0] for number in numbers]
    return pd.DataFrame(columns)


_COLUMNS = {
    "feature": st.column_config.NumberColumn("feature", width=80, format="%d"),
    "about": st.column_config.TextColumn(
        "about", width="small", help="Its label, or the commonest tokens of its examples."
    ),
    "cosine": st.column_config.LineChartColumn(
        "cosine",
        help="With the most similar feature of each snapshot, from the first to the end.",
        y_min=0,
        y_max=1,
    ),
}
