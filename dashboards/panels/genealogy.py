"""What a feature was in the snapshots of its run, and when it became what it is."""

from pathlib import Path

import pandas as pd
import streamlit as st

from dashboards import figures
from dashboards.amounts import counted
from dashboards.genealogies import ABOUT, Emergence, emergence, has_ended, run_of, snapshots
from dashboards.pages import Panel
from dashboards.queries import FeatureData
from dashboards.session import Session
from dashboards.tokens import plain
from saescope.errors import SaescopeError

PANEL = Panel(title="How it emerged", order=45, help=ABOUT)


def panel(session: Session, data: FeatureData) -> None:
    """Draw the panel."""
    run = run_of(session.store)
    if run is None:
        st.caption("The run that trained this SAE is not beside the stores.")
        return
    kept = snapshots(run)
    if not kept:
        st.caption(
            "Its run kept no snapshots to find this feature in. `saescope train … "
            "--trainer.snapshots 12` keeps some along the way."
        )
        return
    if not has_ended(run):
        st.caption("Its run has not ended: what its features become is known when it has.")
        return
    asked = f"genealogy_of_{session.name}"
    if not st.session_state.get(asked):
        st.button(
            f"Find it in {counted(len(kept), 'snapshot')}",
            icon=":material/family_history:",
            help="For all features of this SAE at once: a second or so a snapshot for 4,096.",
            on_click=_ask,
            args=(asked,),
        )
        return
    try:
        _draw(session, data.feature.feature, emergence(run), run)
    except (SaescopeError, OSError) as error:
        st.error(plain(error), icon=":material/error:")
        st.caption("`saescope doctor` says which files of a run are damaged.")


def _ask(key: str) -> None:
    st.session_state[key] = True


def _draw(session: Session, number: int, found: Emergence, run: Path) -> None:
    if found.sae_hash != session.store.meta.get("sae_hash"):
        st.caption(
            f"The SAE in {plain(run.name)} is not the one that this store was made with: it was "
            "trained anew, or the store is of a snapshot. `saescope index` makes a store of it."
        )
        return
    genealogy, tokens = found.found, found.tokens
    feature = number % genealogy.similarity.shape[1]  # both ends of a signed feature are one there
    cosines = genealogy.similarity[:, feature]
    by_chance = genealogy.null.mean(1)
    st.caption(_when(int(genealogy.emerged()[feature]), found))
    st.plotly_chart(
        figures.curves(
            [
                ("this feature", tokens, [*cosines.tolist(), 1.0]),
                ("random direction, mean", tokens[:-1], by_chance.tolist()),
            ],
            "largest cosine",
            log_tokens=True,
        ),
        config=figures.CONFIG,
        key="genealogy",
        alt="Largest cosine of this feature with any of each snapshot, over tokens",
    )
    table = pd.DataFrame(
        {
            "snapshot": tokens[:-1],
            "nearest": genealogy.nearest[:, feature],
            "cosine": cosines,
            "random": by_chance,
        }
    )
    column = st.column_config.NumberColumn
    st.dataframe(
        table,
        key="genealogy_table",
        hide_index=True,
        height=35 * min(len(table) + 1, 7) + 3,
        column_config={
            "snapshot": column("tokens", format="localized", help="Trained on when it was kept."),
            "nearest": column("nearest", format="%d", help="Its number among the snapshot's."),
            "cosine": column("cosine", format="%.3f"),
            "random": column(
                "random", format="%.3f", help="Mean largest cosine of random directions."
            ),
        },
    )


def _when(emerged: int, found: Emergence) -> str:
    threshold = f"a feature of cosine {found.found.threshold:g} or more"
    if emerged == len(found.found.names):
        return (
            f"No snapshot that lasts has {threshold} to it: it became what it is after the last, "
            f"by the end of training at {found.tokens[-1]:,} tokens."
        )
    if emerged == 0:
        return (
            f"Every snapshot, from the first at {found.tokens[0]:,} tokens on, has {threshold} to "
            "it. A feature that never fires hardly moves, and seems to be early."
        )
    return f"It emerged at {found.tokens[emerged]:,} tokens: from there on each has {threshold}."
