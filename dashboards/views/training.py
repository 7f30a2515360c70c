"""Training: the curves of runs beside the stores, several overlaid, as they grow."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import streamlit as st

from dashboards import address, catalogue, emergence, figures
from dashboards.amounts import counted
from dashboards.pages import Page
from dashboards.run_folders import MEASUREMENTS, RunFolder
from dashboards.session import Session, begin_page
from dashboards.tokens import plain
from saescope.errors import SaescopeError
from saescope.metrics import metric

PAGE = Page(title="Training", icon=":material/show_chart:", order=70, url="training")
EVERY = 5.0
"""seconds between readings while a run goes on"""
_MOST = 8


@dataclass(frozen=True)
class Curve:
    """A measurement over a run: where it stands in a line of metrics.jsonl."""

    title: str
    part: str
    key: str
    about: str
    logarithmic: bool = False


CURVES = (
    Curve(metric("fvu").title, "held_out", "fvu", metric("fvu").about + " On held-out rows."),
    Curve(f"{metric('fvu').title}, training", "train", "fvu", "Of the batch that was trained on."),
    Curve(metric("l0").title, "held_out", "l0", metric("l0").about + " On held-out rows."),
    Curve(
        "dead features",
        "train",
        "dead",
        "Features that have not fired for the tokens of "
        "`dead_after_tokens`; none is known to be dead before.",
    ),
    Curve("learning rate", "train", "lr", "Of the optimiser, warm-up and decay included.", True),
    Curve(
        "sparsity coefficient",
        "train",
        "penalty",
        "The factor that a target L0 is reached by; only where `target_l0` is set.",
        True,
    ),
    Curve("loss", "train", "loss", "What is minimised, auxiliary terms included."),
)


def render() -> None:
    """Draw the page."""
    session = begin_page("Training", ("runs", "emerged"))
    runs = {run.name: run for run in catalogue.runs()}
    if not runs:
        st.info(
            "No training run is beside the stores. `saescope train` writes one into runs/; start "
            "the explorer on the folder of stores that runs/ stands beside.",
            icon=":material/show_chart:",
        )
        return
    chosen = _choice(session, runs)
    address.write("training", {"runs": ",".join(chosen)})
    if not chosen:
        st.info("Choose a run.", icon=":material/show_chart:")
        return
    going = any(runs[name].state == "running" for name in chosen)
    shown = [runs[name] for name in chosen]
    st.fragment(_curves, run_every=EVERY if going else None)(shown)
    emergence.section(shown)


def _choice(session: Session, runs: Mapping[str, RunFolder]) -> list[str]:
    arrived = address.arrived("training", ("runs",))
    state, key = st.session_state, "training_runs"
    if arrived:
        state[key] = arrived["runs"].split(",")
    default = session.name if session.name in runs else next(iter(runs))
    state[key] = [name for name in state.get(key, [default]) if name in runs][:_MOST]
    return st.multiselect(
        "Runs",
        list(runs),
        format_func=lambda name: f"{name} ({runs[name].state})",
        key=key,
        max_selections=_MOST,
        persist_state="session",
    )


def _curves(runs: Sequence[RunFolder]) -> None:
    """Read the measurements anew and draw them; again every few seconds while a run goes on."""
    lines = {}
    for run in runs:
        try:
            lines[run.name] = _read(run)
        except (SaescopeError, OSError) as error:
            st.error(plain(error), icon=":material/error:")
    st.caption("  \n".join(_state(run, lines[run.name]) for run in runs if run.name in lines))
    if not any(lines.values()):
        st.info(
            "Nothing has been measured yet: the first point comes after `trainer.evaluate_every` "
            "steps.",
            icon=":material/hourglass_empty:",
        )
        return
    columns = st.columns(2, gap="large")
    drawn = 0
    for curve in CURVES:
        series = [(name, *_series(found, curve)) for name, found in lines.items()]
        series = [each for each in series if each[2]]
        if not series:
            continue
        with columns[drawn % 2]:
            st.markdown(f"##### {plain(curve.title)}", help=curve.about)
            st.plotly_chart(
                figures.curves(series, curve.title, logarithmic=curve.logarithmic),
                config=figures.CONFIG,
                key=f"curve_{curve.part}_{curve.key}",
                alt=f"{curve.title} over the tokens of training",
            )
        drawn += 1


def _read(run: RunFolder) -> list[dict[str, Any]]:
    """The run's measurements; DamagedError, with the line, if one is not as it was written."""
    from sae.training.telemetry import read_metrics

    return read_metrics(run.path / MEASUREMENTS)


def _series(lines: Sequence[Mapping[str, Any]], curve: Curve) -> tuple[list[float], list[float]]:
    """Tokens and values of one curve; lines without it are passed over."""
    tokens, values = [], []
    for line in lines:
        part = line.get(curve.part)
        value = part.get(curve.key) if isinstance(part, Mapping) else None
        if isinstance(value, int | float) and isinstance(line.get("tokens"), int | float):
            tokens.append(float(line["tokens"]))
            values.append(float(value))
    return tokens, values


def _state(run: RunFolder, lines: Sequence[Mapping[str, Any]]) -> str:
    """A run in a line: how far it is, and its last held-out figures."""
    words = [f"**{plain(run.name)}**", run.state]
    if lines:
        last = lines[-1]
        words.append(counted(int(last["step"]), "step"))
        held_out = last.get("held_out")
        for name in ("fvu", "l0"):
            value = held_out.get(name) if isinstance(held_out, Mapping) else None
            if isinstance(value, int | float):
                words.append(metric(name).text(value))
    if run.state == "running":
        words.append(f"read at {time.strftime('%H:%M:%S')}, again every {EVERY:.0f} s")
    return " · ".join(words)


if __name__ == "__main__":
    render()
