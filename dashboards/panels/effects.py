"""Which tokens the feature makes likelier and less likely: by its decoder, and as measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from dashboards import fact_figures, figures
from dashboards.amounts import amount, counted
from dashboards.pages import Panel
from dashboards.queries import FeatureData
from dashboards.session import Session
from dashboards.tokens import effects_html
from store.fact_results import MeasuredEffect, MeasuredEffects
from store.measured import EFFECTS

PANEL = Panel(
    title="Effect on the next token",
    order=30,
    help="Direct: tokens whose logit the feature's decoder direction raises and lowers most, "
    "directly through the unembedding; what later layers make of it is not counted. The chart has "
    "the effects on all tokens of the vocabulary, about their mean. Measured: the mean change of "
    "log-probabilities, in nats, when the feature is added once more at its mean activation where "
    "it is active; ± is the standard error over positions.",
)


def panel(session: Session, data: FeatureData) -> None:
    """Draw the panel."""
    if not data.logits.top and not data.logits.bottom:
        st.caption("Not computed for this store.")
    else:
        _direct(data)
    if data.measured is not None:
        _measured(data, data.measured, session.store.meta.get(EFFECTS) or {})


def _direct(data: FeatureData) -> None:
    if data.measured is not None:
        st.markdown("**Direct**")
    st.html(
        effects_html(
            [(e.token, e.value) for e in data.logits.top],
            [(e.token, e.value) for e in data.logits.bottom],
        )
    )
    histogram = data.facts.logits if data.facts else None
    if histogram is not None:
        st.plotly_chart(
            fact_figures.logit_histogram(histogram),
            config=figures.CONFIG,
            key="logit_histogram",
            alt="Histogram of the feature's effects on the logits of all tokens",
        )


def _measured(data: FeatureData, measured: MeasuredEffects, said: Mapping[str, Any]) -> None:
    st.markdown("**Measured**")
    st.html(
        effects_html(
            [(e.token, e.value, _error(e)) for e in measured.top],
            [(e.token, e.value, _error(e)) for e in measured.bottom],
        )
    )
    st.caption(measured_words(data.feature.more, said))


def _error(effect: MeasuredEffect) -> str:
    return "" if effect.error is None else f" ± {amount(effect.error)}"


def measured_words(columns: Mapping[str, Any], said: Mapping[str, Any]) -> str:
    """A feature's scores of steering in words, each with what 95 % of random directions have.

    >>> null = {"null": {"measured_kl": [0.02, 0.03, 0.06]}}
    >>> measured_words({"measured_kl": 0.25, "measured_positions": 4}, null)
    'At 4 positions: KL 0.25 nats (random directions: 0.02 to 0.06).'
    """
    words = []
    for name, title in (
        ("measured_kl", "KL {} nats"),
        ("output_score", "output score {}"),
        ("confidence_change", "change of token confidence {}"),
    ):
        value, null = columns.get(name), (said.get("null") or {}).get(name)
        if value is not None:
            beside = f" (random directions: {_span(null)})" if null else ""
            words.append(title.format(amount(value)) + beside)
    positions = counted(int(columns.get("measured_positions") or 0), "position")
    return f"At {positions}: {'; '.join(words)}."


def _span(null: Sequence[float]) -> str:
    return f"{amount(null[0])} to {amount(null[-1])}"
