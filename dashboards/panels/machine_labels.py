"""What machines make of the feature: their labels with scores, and baselines beside them."""

import html

import streamlit as st

from dashboards.pages import Panel
from dashboards.queries import FeatureData
from dashboards.session import Session
from dashboards.tokens import visible
from store.machine_labels import MachineLabel

PANEL = Panel(
    title="Machine labels",
    order=15,
    applies=lambda data: not data.feature.dead,
    help="Made by `saescope label`, and never put in the place of a person's label. The score is "
    "the balanced accuracy with which the label tells windows of text where the feature fires from "
    "windows where it is silent, on documents that it was not made from; 0.5 is chance. Beside it: "
    "the mean score of other features' labels (shuffled), and of the one commonest token.",
)
NAMES = {"token": "tokens", "ngram": "runs of tokens", "topic": "topic", "logit": "effect"}
_STYLE = """<style>
.ss-ml{display:grid;grid-template-columns:minmax(0,1fr) 3.2rem;gap:.1rem .8rem;font-size:.88rem;
padding:.4rem 0;border-bottom:1px solid rgba(128,128,128,.18)}
.ss-ml:last-child{border-bottom:none}
.ss-ml b{text-align:right;font-variant-numeric:tabular-nums}
.ss-ml small{opacity:.65;font-size:.78rem}.ss-ml small:last-child{text-align:right}
.ss-bar{grid-column:1/3;position:relative;height:6px;background:rgba(128,128,128,.18);
border-radius:3px;margin:.15rem 0}
.ss-bar i{position:absolute;top:0;bottom:0;left:0;background:#3d7ea6;border-radius:3px}
.ss-bar u{position:absolute;top:-3px;bottom:-3px;width:2px;background:currentColor;opacity:.75}
</style>"""


def panel(session: Session, data: FeatureData) -> None:
    """Draw the panel."""
    labels = session.notes.machine_labels([data.feature.feature])
    if not labels:
        st.caption("None yet. `saescope label STORE` makes and scores them, without a network.")
        return
    ordered = sorted(labels, key=lambda each: -(each.score or 0.0))
    st.html(_STYLE + "".join(map(label_html, ordered)))


def label_html(label: MachineLabel) -> str:
    """One label: its text, its score as a number and a bar, the baselines as marks on it."""
    method = NAMES.get(label.method, label.method)
    details = label.details
    if label.score is None:
        said = "not scored: it fires, or is silent, in too few windows"
        return (
            f'<div class="ss-ml"><span>{visible(label.label)}</span><b>–</b>'
            f"<small>{html.escape(method)} · {said}</small><small></small></div>"
        )
    baselines = [
        (name, _number(details.get(key)))
        for name, key in (("shuffled", "shuffled"), ("top token", "top_token"))
    ]
    said = [f"{name} {value:.2f}" for name, value in baselines if value is not None]
    fuzzing = _number(details.get("fuzzing"))
    if fuzzing is not None:
        said.append(f"fuzzing {fuzzing:.2f}")
    marks = "".join(
        f'<u style="left:{_percent(value):.1f}%" title="{name} {value:.2f}"></u>'
        for name, value in baselines
        if value is not None
    )
    area = _number(details.get("auc"))
    return (
        f'<div class="ss-ml"><span>{visible(label.label)}</span><b>{label.score:.2f}</b>'
        f'<div class="ss-bar"><i style="width:{_percent(label.score):.1f}%"></i>{marks}</div>'
        f"<small>{html.escape(method)} · {' · '.join(said)}</small>"
        f"<small>{'' if area is None else f'AUC {area:.2f}'}</small></div>"
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _percent(value: float) -> float:
    return 100 * min(max(value, 0.0), 1.0)
