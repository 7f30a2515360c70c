"""The Steer page's dose-response: strength against effect and collateral, beside nulls."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import streamlit as st

from dashboards import figures, model_cache
from dashboards.edits import Edit
from dashboards.session import Session
from dashboards.tokens import plain
from saescope.errors import SaescopeError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from sae.steering.dose_result import DoseResponse

FACTORS = (0.5, 1.0, 2.0, 4.0)
"""strengths, in units of the feature's largest activation"""
_COLOURS = {
    "feature": figures.BLUE,
    "random": figures.GREY,
    "untrained": figures.ORANGE,
}
_NAMES = {
    "feature": "the feature",
    "random": "random directions",
    "untrained": "an untrained SAE's features",
}
_TEXTS, _TOKENS = 4, 16


def section(session: Session, edits: Sequence[Edit]) -> None:
    """Draw the section for the first feature that is added; nothing where none is."""
    added = [each.feature for each in edits if each.kind == "add"]
    if not added:
        return
    feature = added[0]
    with st.expander(f"Dose-response of feature {feature}", icon=":material/show_chart:"):
        st.caption(
            f"Adds the feature at {', '.join(f'{each:g}' for each in FACTORS)} times its strongest "
            f"activation, and random directions and an untrained SAE's features of the same norm, "
            f"to {_TEXTS} held-out texts of the store. It takes about half a minute."
        )
        key = (session.version, feature)
        if st.button("Measure", key="steer_measure_dose", icon=":material/science:"):
            try:
                with st.spinner("Measuring …"):
                    found = model_cache.dose_response(
                        session.store, feature, FACTORS, texts=_TEXTS, new_tokens=_TOKENS
                    )
            except SaescopeError as error:
                st.error(plain(error), icon=":material/error:")
                return
            st.session_state["steer_measured_dose"] = (key, found)
        known = st.session_state.get("steer_measured_dose")
        if known is not None and known[0] == key:
            _draw(known[1])


def _draw(found: "DoseResponse") -> None:
    words = found.words[-1]
    left, right = st.columns(2)
    for column, metric, title in (
        (left, f"target:{words}", f"ln p of its words ({words})"),
        (right, "kl", "KL, nats a token"),
    ):
        column.plotly_chart(
            dose_figure(found, metric, title),
            config=figures.CONFIG,
            key=f"dose_{metric}",
            alt=f"{title} by strength, of the feature, random directions and an untrained SAE's",
        )
    for name in found.words:
        for metric in ("target", "word_rate"):
            st.caption(spot_caption(found, name, metric))


def spot_caption(found: "DoseResponse", words: str, metric: str = "word_rate") -> str:
    """The sweet spot for a set of words, in a sentence."""
    spot = found.sweet_spot(metric, words)
    if spot.strength is None or spot.effect is None or spot.above_null is None:
        return f"{words.capitalize()} words: every strength costs 1 nat a token or more."
    unit = found.strengths[0] / FACTORS[0]
    low, high = spot.above_null_low or 0, spot.above_null_high or 0
    of = (
        f"{100 * spot.effect:.1f} % of the new tokens, {100 * spot.above_null:+.1f} points beside "
        f"the null ({100 * low:+.1f} to {100 * high:+.1f}"
        if metric == "word_rate"
        else f"their log-probability rises by {spot.effect:.2f} nats, {spot.above_null:+.2f} "
        f"beside the null ({low:+.2f} to {high:+.2f}"
    )
    return (
        f"{words.capitalize()} words: at KL below 1, best at {spot.strength / unit:g} × "
        f"({(spot.strength_low or 0) / unit:g} to {(spot.strength_high or 0) / unit:g}): {of}; "
        f"95 % over {_TEXTS} texts)."
    )


def dose_figure(found: "DoseResponse", metric: str, title: str, height: int = 230) -> "Figure":
    """A metric by strength, a line with its 95 % interval for each source of directions."""
    from plotly.graph_objects import Figure, Scatter

    figure = Figure()
    table = found.table()
    for source, colour in _COLOURS.items():
        rows = [row for row in table if row["source"] == source]
        low = [row[metric] - row[f"{metric}_low"] for row in rows]
        high = [row[f"{metric}_high"] - row[metric] for row in rows]
        figure.add_trace(
            Scatter(
                x=[f"{each:g} ×" for each in FACTORS],
                y=[row[metric] for row in rows],
                error_y={"type": "data", "array": high, "arrayminus": low, "thickness": 1},
                mode="lines+markers",
                name=_NAMES[source],
                line={"color": colour, "dash": "solid" if source == "feature" else "dot"},
            )
        )
    if metric == "kl":
        figure.add_hline(y=1.0, line={"color": figures.GREY, "width": 1, "dash": "dash"})
    finished = figures.finish(figure, "strength (of its strongest activation)", title, height)
    finished.update_layout(
        showlegend=True, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    )
    return finished
