"""One feature: its heading, and below it the panels of dashboards/panels/ in two columns."""

import streamlit as st

from dashboards import figures, queries
from dashboards.amounts import amount, counted
from dashboards.pages import Page, find_panels
from dashboards.queries import FeatureData
from dashboards.session import Session, begin_page, current_feature
from dashboards.tokens import plain
from store.results import Feature

PAGE = Page(title="Feature", icon=":material/search:", order=30, url="feature")


def render() -> None:
    """Draw the page."""
    _follow()
    session = begin_page("", ("feature",))
    number = current_feature(session)
    data = queries.feature(session.store, session.version, number)
    _heading(session, data)
    left, right = st.columns([5, 9], gap="large")
    with left:
        _panels(session, data, "left")
    with right:
        _panels(session, data, "right")


def _panels(session: Session, data: FeatureData, column: str) -> None:
    for found in find_panels(column):
        panel = found.declared
        if not panel.applies(data):
            continue
        if panel.heading:
            st.markdown(f"##### {panel.title}", help=panel.help)
        found.draw(session, data)


def _follow() -> None:
    """Go to the feature chosen by a button, or else to the number that was typed.

    If a button is pressed before the page is drawn, the browser also sends an outdated number.
    """
    wishes = [st.session_state.pop(name, None) for name in ("go_by_button", "go_by_number")]
    wanted = next((wish for wish in wishes if wish is not None), None)
    if wanted is not None:
        st.query_params["feature"] = str(wanted)


def _go(number: int) -> None:
    st.session_state["go_by_button"] = number


def _go_to_given() -> None:
    st.session_state["go_by_number"] = st.session_state["feature_number"]


def _go_to_random(session: Session) -> None:
    number = session.store.random_live()
    if number is not None:
        _go(number)


def _heading(session: Session, data: FeatureData) -> None:
    feature = data.feature
    left, right = st.columns([4, 5], vertical_alignment="center")
    with left:
        name = queries.named(session.store, session.notes, [feature.feature])[feature.feature]
        st.markdown(f"## Feature {feature.feature} · {name.markdown}")
        if not name.labelled:
            _machine_label(session, feature.feature)
    with right, st.container(horizontal=True, horizontal_alignment="right", gap="small"):
        st.session_state["feature_number"] = feature.feature
        st.number_input(
            "Go to feature",
            min_value=0,
            max_value=session.store.d_sae - 1,
            step=1,
            key="feature_number",
            on_change=_go_to_given,
            label_visibility="collapsed",
            width=130,
        )
        st.button(
            "Previous",
            icon=":material/chevron_left:",
            on_click=_go,
            args=(data.previous,),
            disabled=data.previous is None,
            help="The previous live feature",
            shortcut="P",
        )
        st.button(
            "Next",
            icon=":material/chevron_right:",
            icon_position="right",
            on_click=_go,
            args=(data.next,),
            disabled=data.next is None,
            help="The next live feature",
            shortcut="N",
        )
        st.button(
            "Random",
            icon=":material/shuffle:",
            on_click=_go_to_random,
            args=(session,),
            help="A live feature, each with equal chance",
            shortcut="X",
        )
    st.caption(" · ".join(_summary(session, feature)))


def _machine_label(session: Session, number: int) -> None:
    """Say what a machine calls a feature that nobody has labelled, with the label's score."""
    best = session.notes.best_machine_labels([number]).get(number)
    if best is not None and best.score is not None:
        st.caption(f"{plain(best.label)} · machine label, score {best.score:.2f}")


def _summary(session: Session, feature: Feature) -> list[str]:
    name = plain(session.name)
    if feature.dead:
        return [name, "never fires in this store"]
    return [
        name,
        f"fires at {figures.percent(feature.density)} of positions ({feature.n_active:,})",
        f"in {counted(feature.n_documents, 'document')}",
        f"strongest {amount(feature.max)}",
        f"mean {amount(feature.mean)} ± {amount(feature.std)} where it fires",
    ]


if __name__ == "__main__":
    render()
