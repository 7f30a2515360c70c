"""One feature: examples, activations, effects on the logits, relatives, label and note."""

import streamlit as st

from dashboards import fields, figures, queries, session
from dashboards.amounts import amount, span
from dashboards.queries import FeatureData
from dashboards.session import Session
from dashboards.tokens import effects_html, examples_html, plain, plain_visible
from saescope.errors import SaescopeError
from store.annotations import ChangedError
from store.results import Feature
from store.summaries import BINS, INTERVALS

WINDOWS: dict[int | None, str] = {4: "4", 8: "8", 16: "16", 32: "32", None: "all"}
KINDS = {"top": "Strongest", "interval": "By interval"}


def page() -> None:
    """Draw the page."""
    _follow()
    here = session.begin("", ("feature",))
    number = session.current_feature(here)
    data = queries.feature(here.store, here.version, number)
    _heading(here, data)
    left, right = st.columns([5, 9], gap="large")
    with left:
        _label(here, number)
        if not data.feature.dead:
            st.markdown("##### Activations")
            st.plotly_chart(
                figures.activation_histogram(data.histogram),
                config=figures.CONFIG,
                key="activations",
                alt="Histogram of the feature's activations",
            )
        _effects(data)
        _relatives(here, data)
    with right:
        _examples(here, data)


def _follow() -> None:
    """Go where the reader wants to: by a button, or else by the number typed.

    With a button pressed before the page was drawn, the browser sends the number it was on before.
    """
    wishes = [st.session_state.pop(name, None) for name in ("go_by_button", "go_by_number")]
    wanted = next((wish for wish in wishes if wish is not None), None)
    if wanted is not None:
        st.query_params["feature"] = str(wanted)


def _go(number: int) -> None:
    st.session_state["go_by_button"] = number


def _go_to_given() -> None:
    st.session_state["go_by_number"] = st.session_state["feature_number"]


def _go_to_random(here: Session) -> None:
    number = here.store.random_live()
    if number is not None:
        _go(number)


def _heading(here: Session, data: FeatureData) -> None:
    feature = data.feature
    left, right = st.columns([4, 5], vertical_alignment="center")
    label = here.notes.get(feature.feature).label
    with left:
        title = f"## Feature {feature.feature}"
        st.markdown(f"{title} · {plain(label)}" if label else title)
    with right, st.container(horizontal=True, horizontal_alignment="right", gap="small"):
        st.session_state["feature_number"] = feature.feature
        st.number_input(
            "Go to feature",
            min_value=0,
            max_value=here.store.d_sae - 1,
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
            args=(here,),
            help="A live feature, each with equal chance",
            shortcut="X",
        )
    st.caption(" · ".join(_summary(here, feature)))


def _summary(here: Session, feature: Feature) -> list[str]:
    place = plain(here.name)
    if feature.dead:
        return [place, "never fires in this store"]
    return [
        place,
        f"fires at {figures.percent(feature.density)} of positions ({feature.n_active:,})",
        f"in {feature.n_documents:,} documents",
        f"strongest {amount(feature.max)}",
        f"mean {amount(feature.mean)} ± {amount(feature.std)} where it fires",
    ]


def _save(here: Session, number: int, kind: str, key: str, seen: str) -> None:
    """Save what was typed, unless somebody has changed what the reader saw."""
    text = fields.typed(key)
    if text is None:
        return
    write = here.notes.set_label if kind == "label" else here.notes.set_note
    try:
        write(number, text, seen=seen)
    except ChangedError as error:
        fields.forget(key)  # the same text is the reader's own the next time
        st.session_state["save_problem"] = (
            f"The {kind} was changed elsewhere meanwhile, to “{error.found}”; yours, “{text}”, is "
            "not saved. Type it again to put it there all the same."
        )
    except SaescopeError as error:
        st.session_state["save_problem"] = str(error)
    else:
        st.toast(f"{kind.capitalize()} saved", icon=":material/check:")


def _favour(here: Session, number: int, key: str) -> None:
    chosen = fields.typed(key)
    if chosen is None:
        return
    try:
        if chosen:
            here.notes.add_to_list(number)
        else:
            here.notes.remove_from_list(number)
    except SaescopeError as error:
        st.session_state["save_problem"] = str(error)


def _label(here: Session, number: int) -> None:
    problem = st.session_state.pop("save_problem", None)
    if problem:
        st.error(plain(problem))
    written = here.notes.get(number)
    closed = here.notes.read_only
    reason = "The store's folder is read-only, so labels cannot be saved." if closed else None
    keys = {kind: f"{kind}_{here.name}_{number}" for kind in ("label", "note", "favourite")}
    fields.fill(keys["label"], written.label)
    fields.fill(keys["note"], written.note)
    fields.fill(keys["favourite"], number in here.notes.members())
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.text_input(
            "Label",
            key=keys["label"],
            max_chars=200,
            disabled=closed,
            help=reason,
            placeholder="what does it stand for?",
            on_change=_save,
            args=(here, number, "label", keys["label"], written.label),
        )
        st.toggle(
            "Favourite",
            key=keys["favourite"],
            disabled=closed,
            on_change=_favour,
            args=(here, number, keys["favourite"]),
        )
    with st.expander("Note", expanded=bool(written.note), icon=":material/notes:"):
        st.text_area(
            "Note",
            key=keys["note"],
            max_chars=20_000,
            disabled=closed,
            height=110,
            label_visibility="collapsed",
            on_change=_save,
            args=(here, number, "note", keys["note"], written.note),
        )


def _effects(data: FeatureData) -> None:
    st.markdown(
        "##### Effect on the next token",
        help="Tokens whose logit the feature's decoder direction raises and lowers most, directly "
        "through the unembedding; what later layers make of it is not counted.",
    )
    if not data.logits.top and not data.logits.bottom:
        st.caption("Not computed for this store.")
        return
    st.html(
        effects_html(
            [(e.token, e.value) for e in data.logits.top],
            [(e.token, e.value) for e in data.logits.bottom],
        )
    )


def _relatives(here: Session, data: FeatureData) -> None:
    near = {n.feature: f"cosine {n.cosine:+.2f}" for n in data.neighbours}
    together = {
        c.feature: f"r {c.correlation:.2f} · PMI {c.pmi:.1f} · in {figures.percent(c.share)}"
        for c in data.coactivating
    }
    labels = here.notes.labels([*near, *together])
    tokens = here.store.top_tokens([*near, *together], 3)
    blocks = (
        ("Nearest decoder directions", near, "Cosine of the two decoder directions."),
        (
            "Fires together with",
            together,
            "Counted over all positions. r: Pearson's correlation of whether the two fire. PMI: "
            "pointwise mutual information, in nats. The share is of this feature's positions.",
        ),
    )
    with st.container(key="relatives"):
        for title, rows, text in blocks:
            st.markdown(f"##### {title}", help=text)
            if not rows:
                st.caption("None more than by chance." if rows is together else "None.")
            for number, value in rows.items():
                words = labels.get(number) or " ".join(map(_word, tokens[number]))
                with st.container(horizontal=True, horizontal_alignment="distribute"):
                    session.link(here, number, f"{number}  {words}"[:60])
                    st.caption(value, width="content")


def _word(token: str) -> str:
    return plain_visible(token).strip()


@st.fragment
def _examples(here: Session, data: FeatureData) -> None:
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        kind = st.segmented_control(
            "Examples",
            list(KINDS),
            format_func=KINDS.__getitem__,
            default="top",
            required=True,
            key="examples_kind",
            persist_state="session",
        )
        window = st.select_slider(
            "Tokens on each side",
            list(WINDOWS),
            value=16,
            format_func=WINDOWS.__getitem__,
            key="examples_window",
            width=230,
            persist_state="session",
        )
        breaks = st.toggle("Line breaks", key="examples_breaks", persist_state="session")
    feature = data.feature
    found = queries.examples(here.store, here.version, feature.feature, kind or "top", window)
    if not found:
        st.info("This feature never fires in this store.", icon=":material/visibility_off:")
        return
    if kind != "interval":
        st.html(examples_html(found, feature.max, line_breaks=breaks))
        return
    sizes = data.histogram.counts.reshape(INTERVALS, BINS // INTERVALS).sum(axis=1)
    width = feature.max / INTERVALS
    for interval in range(INTERVALS - 1, -1, -1):
        count = int(sizes[interval])
        st.markdown(
            f"**{span(interval * width, (interval + 1) * width)}** · {count:,} positions "
            f"({figures.percent(count / feature.n_active)})"
        )
        mine = [example for example in found if example.interval == interval]
        if mine:
            st.html(examples_html(mine, feature.max, line_breaks=breaks))


page()
