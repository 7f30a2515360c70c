"""Models: what each feature of a crosscoder over two models is to each of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from dashboards import address, catalogue, comparisons, figures, queries
from dashboards.amounts import counted
from dashboards.pages import Page
from dashboards.run_folders import RunFolder
from dashboards.session import Session, begin_page, link_named, session_of_sae
from dashboards.tokens import plain
from saescope.errors import SaescopeError

PAGE = Page(title="Models", icon=":material/join_inner:", order=60, url="models")
MOST_ROWS = 1000
_FILE = "model_diff.parquet"
_COLOURS = {
    "only_a": figures.BLUE,
    "only_b": figures.ORANGE,
    "shared": figures.GREEN,
}
_TITLES = {
    "only_a": "only A",
    "only_b": "only B",
    "shared": "shared",
    "not_only_a": "not only A",
    "not_only_b": "not only B",
    "other": "between",
    "silent": "silent",
}
_RATIOS = ("error_ratio", "reconstruction_ratio")
_LARGEST = 2.0
"""of a ratio in the chart; larger ones are drawn there"""


def render() -> None:
    """Draw the page."""
    begin_page("Models", ("run", "class", "ratio"))
    runs = {run.name: run for run in catalogue.runs() if (run.path / _FILE).is_file()}
    if not runs:
        st.info(
            "Two models are compared here by a crosscoder over both. Harvest one text through "
            "each, then: `saescope join data/A data/B --out data/both`, `saescope train --harvest "
            "data/both --sae.kind crosscoder --sae.activation batchtopk --out runs/both`, and "
            "`saescope diff-models runs/both`.",
            icon=":material/join_inner:",
        )
        return
    arrived = address.arrived("models", ("run", "class", "ratio"))
    name = _choice(runs, arrived)
    try:
        frame, facts = _read(runs[name].path, (runs[name].path / _FILE).stat().st_mtime_ns)
    except (SaescopeError, OSError) as error:
        st.error(plain(error), icon=":material/error:")
        st.caption("`saescope diff-models RUN` writes the table anew.")
        return
    st.caption(
        f"A is **{plain(facts['sites'][0])}**, B is **{plain(facts['sites'][1])}**; "
        f"{counted(int(facts['rows']), 'row')}."
    )
    _numbers(frame)
    session = session_of_sae(str(facts["sae_hash"]))
    left, right = st.columns([1, 1.25], gap="large")
    with left:
        ratio = _chart(frame, arrived, facts["thresholds"], session)
    with right:
        chosen = _table(frame, name, arrived, session)
    address.write("models", {"run": name, "class": chosen, "ratio": ratio})


def _choice(runs: Mapping[str, RunFolder], arrived: Mapping[str, str]) -> str:
    asked, key = arrived.get("run"), "models_run"
    if asked is not None and asked not in runs:
        st.warning(plain(f"No run {asked!r} has been diffed here."), icon=":material/link_off:")
    elif asked is not None:
        st.session_state[key] = asked
    if st.session_state.get(key) not in runs:
        st.session_state[key] = next(iter(runs))
    if len(runs) == 1:
        return next(iter(runs))
    return st.selectbox("Crosscoder", list(runs), key=key, width=360)


@st.cache_data(max_entries=16, show_spinner=False)
def _read(run: Path, stamp: int) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The table and how it was made; ArtefactError for a damaged one."""
    del stamp
    from sae.commands.diff_models import facts_of, read_model_diff

    table = read_model_diff(run)
    return table.to_pandas(), facts_of(table)


def _about(name: str) -> str:
    from sae.commands.diff_models import meaning

    text = meaning(name)
    return f"{text[0].upper()}{text[1:]}."


def _numbers(frame: pd.DataFrame) -> None:
    for column, name in zip(st.columns(4), ("only_a", "only_b", "shared", "silent"), strict=True):
        count = frame["class"].tolist().count(name)
        column.metric(_TITLES[name], f"{count:,}", help=_about(name), border=True)


def _chart(
    frame: pd.DataFrame,
    arrived: Mapping[str, str],
    limits: Mapping[str, Any],
    session: Session | None,
) -> str:
    key = "models_ratio"
    if arrived.get("ratio") in _RATIOS:
        st.session_state[key] = arrived["ratio"]
    chosen = st.segmented_control(
        "How much of a feature the other model has, by its",
        _RATIOS,
        format_func=lambda name: "error" if name == "error_ratio" else "reconstruction",
        key=key,
        default=None if key in st.session_state else _RATIOS[0],
        required=True,
        help="Latent scaling (Minder et al. 2025, section 3): over how much the model that the "
        "feature is written to most has of it. Near 0: it has none. Near 1: as much.",
    )
    ratio = chosen or _RATIOS[0]
    points = pd.DataFrame(frame[frame["class"] != "silent"])
    points["of the other"] = _of_the_other(points, ratio)
    points = pd.DataFrame(points[np.isfinite(points["of the other"])])
    points["of the other"] = points["of the other"].clip(-_LARGEST, _LARGEST)
    if not len(points):
        st.info("No feature fires on enough rows.", icon=":material/filter_alt_off:")
        return ratio
    titles = {
        "norm_difference": "decoder norms (0: A alone, 1: B alone)",
        "of the other": "share of it in the other model",
    }
    names = [_TITLES[str(each)] for each in points["class"]]
    figure = figures.scatter(points, "norm_difference", "of the other", names, titles, height=430)
    figure.data[0].marker.color = [_COLOURS.get(str(c), figures.GREY) for c in points["class"]]  # type: ignore[attr-defined]
    figure.update_xaxes(range=[-0.03, 1.03])
    limit = limits["most_error" if ratio == "error_ratio" else "most_reconstruction"]
    figure.add_hline(y=limit, line={"dash": "dot", "width": 1.5, "color": "gray"})
    event = st.plotly_chart(
        figure,
        config=figures.CONFIG,
        key="models_chart",
        on_select="rerun",
        selection_mode="points",
        alt="Features by their decoder norms and by how much of them the other model has",
    )
    st.caption(
        "Blue: only A has it; orange: only B; green: shared; grey: else. Below the dotted line the "
        "other model has little of it. Click a point for its feature."
    )
    for point in event.selection.points[:1]:
        _link(session, int(points["feature"].tolist()[point["point_index"]]))
    return ratio


def _link(session: Session | None, feature: int) -> None:
    """Lead to a feature's page, where there is one."""
    if session is None:
        st.markdown(f"Feature **{feature}**")
        return
    link_named(session, feature, queries.named(session.store, session.notes, [feature])[feature])


def _of_the_other(frame: pd.DataFrame, ratio: str) -> np.ndarray:
    """The ratio for the model that a feature is written to less."""
    to_b = frame["norm_difference"].to_numpy() >= 0.5
    return np.where(to_b, frame[ratio].to_numpy(), frame[f"{ratio}_of_a"].to_numpy())


def _table(
    frame: pd.DataFrame, name: str, arrived: Mapping[str, str], session: Session | None
) -> str:
    counts = frame["class"].value_counts()
    classes = [each for each in _TITLES if counts.get(each, 0)]
    key = "models_class"
    if arrived.get("class") in classes:
        st.session_state[key] = arrived["class"]
    if st.session_state.get(key) not in classes:
        st.session_state[key] = classes[0]
    chosen = st.selectbox(
        "Features",
        classes,
        format_func=lambda each: f"{_TITLES[each]} ({counts[each]:,})",
        key=key,
        help="  \n".join(f"{_TITLES[each]}: {_about(each)}" for each in classes),
    )
    some = pd.DataFrame(frame[frame["class"] == chosen])
    some = some.sort_values("rows", ascending=False, kind="stable")
    shown = some.head(MOST_ROWS).drop(columns=["class"]).reset_index(drop=True)
    for ratio in _RATIOS:
        shown[ratio] = _of_the_other(shown, ratio)
    if session is not None:
        shown = comparisons.with_names(shown, session.store, session.notes)
    number = st.column_config.NumberColumn
    event = st.dataframe(
        shown,
        key=f"models_table_{name}_{chosen}",
        hide_index=True,
        height=35 * min(len(shown) + 1, 14) + 3,
        on_select="rerun",
        selection_mode="single-row",
        column_order=["feature", "label", "tokens", "rows", "norm_difference", *_RATIOS],
        column_config={
            "feature": number("feature", width=80, format="%d"),
            "label": st.column_config.TextColumn("label", width="small"),
            "tokens": st.column_config.TextColumn("tokens", width="small"),
            "rows": number("rows", format="localized", help="On which it fires."),
            "norm_difference": number("norms", format="%.3f", help="0: A alone, 1: B alone."),
            "error_ratio": number("error", format="%.3f", help="Of the other model."),
            "reconstruction_ratio": number("reconstruction", format="%.3f"),
        },
    )
    more = f"The {len(shown):,} that fire most of " if len(shown) < len(some) else ""
    st.caption(f"{more}{counted(len(some), 'feature')}, those that fire most first.")
    if session is None:
        st.caption("Index the crosscoder to see what its features fire on: `saescope index RUN`.")
    elif event.selection.rows:
        _link(session, int(shown["feature"].tolist()[event.selection.rows[0]]))
    return chosen


if __name__ == "__main__":
    render()
