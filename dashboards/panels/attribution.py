"""Where a pre-activation comes from: attention heads and their source tokens, layers, biases."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import streamlit as st

from dashboards import attribution_figures, figures, model_cache, queries
from dashboards.amounts import amount
from dashboards.pages import Panel
from dashboards.queries import FeatureData
from dashboards.session import Session, text_features_key
from dashboards.tokens import plain, plain_visible, shortened
from sae.analysis.attention.sums import SITES, sum_at
from saescope.errors import SaescopeError

if TYPE_CHECKING:
    from sae import Attribution

PANEL = Panel(
    title="Attribution",
    order=5,
    column="right",
    heading=False,
    applies=lambda data: data.grid is None and not data.feature.dead,
)
_BEFORE, _AFTER, _SNIPPET = 8, 3, 90
OPEN = "attribution_open"
"""key of whether it is open"""
_WAITING = (
    "From which tokens, through which attention heads, and from which layers a feature's "
    "pre-activation comes, as an exact sum. The model is loaded when you ask for it: 10 to 60 "
    "seconds the first time."
)
_PARTS_HELP = (
    "Each attention head, summed over its source tokens, each MLP, the embedding and the biases: "
    "together they are the pre-activation. Head 9.4 is head 4 of layer 9."
)
_HEADS_HELP = (
    "Attention pattern times value, through the head's output to the feature's encoder. What made "
    "the pattern (queries and keys) has no share of its own."
)
_OTHERWISE = 0.05
"""share by which an activation may differ from the store's, whose model ran in fewer bits"""


@dataclass(frozen=True)
class Choice:
    """A text to take a feature apart on."""

    label: str
    token_ids: tuple[int, ...]
    firing: dict[int, tuple[str, float]]
    """positions at which it fires, the strongest first, with their tokens and activations"""
    stored: bool
    """whether the activations are the store's"""


@st.fragment
def panel(session: Session, data: FeatureData) -> None:
    """Draw the panel; nothing is read before it is opened."""
    title = "Attribution by head and source token"
    with st.expander(title, key=OPEN, icon=":material/account_tree:", on_change="rerun") as opened:
        if not opened.open:
            return
        if reason := _impossible(session):
            st.caption(reason)
            return
        number = data.feature.feature
        choice, position, pressed = _ask(_choices(session, number), f"{session.name}_{number}")
        key = f"attribution_{session.name}"
        question = (session.version, number, choice.token_ids, position)
        if pressed:
            _compute(session, question, key)
        known = st.session_state.get(key)
        if known is not None and known[0] == question:
            _draw(known[1], choice)
        elif not pressed:
            st.caption(_WAITING)


def _impossible(session: Session) -> str:
    """Why this store's features cannot be taken apart, as far as is known without the model."""
    site = str(session.store.meta.get("site") or "")
    if sum_at(site) is None:
        allowed = ", ".join(name.removeprefix("attn.").removeprefix("hook_") for name in SITES)
        return (
            f"This SAE reads {plain(site) or 'an unknown site'}. Attribution is for SAEs that "
            f"read a language model's attention heads or residual stream: {plain(allowed)}."
        )
    try:
        model_cache.origin_of(session.store)
    except SaescopeError as error:
        return f"There is no attribution, because the model cannot be run: {plain(error)}"
    return ""


def _choices(session: Session, number: int) -> list[Choice]:
    """The strongest examples, and the text that Prompt showed last, if it did for this store."""
    found = []
    for example in queries.examples(session.store, session.version, number, "top", None):
        at = sorted(
            (index for index, value in enumerate(example.activations) if value > 0),
            key=lambda index: (index != example.index, -example.activations[index]),
        )
        found.append(
            Choice(
                f"{amount(example.activation)} · {_snippet(example.tokens, example.index)}",
                tuple(example.token_ids),
                {index: (example.tokens[index], example.activations[index]) for index in at},
                stored=True,
            )
        )
    known: Any = st.session_state.get(text_features_key(session.name))
    if known is not None and known[0][0] == session.version:
        text = known[1]
        mine = text.feature == number
        pairs = zip(text.activation[mine].tolist(), text.position[mine].tolist(), strict=True)
        firing = {at: (text.tokens[at], value) for value, at in sorted(pairs, reverse=True)}
        first = next(iter(firing), len(text.tokens) - 1)
        label = f"your text, the last on Prompt · {_snippet(text.tokens, first)}"
        found.append(Choice(label, tuple(text.token_ids), firing, stored=False))
    return found


def _snippet(tokens: list[str], at: int) -> str:
    """A few tokens up to one, which stands in brackets, and after it."""
    before, after = tokens[max(at - _BEFORE, 0) : at], tokens[at + 1 : at + 1 + _AFTER]
    around = [plain_visible("".join(texts)).strip() if texts else "" for texts in (before, after)]
    middle = f"[{plain_visible(tokens[at]).strip()}]"
    return shortened(f"{around[0]} {middle} {around[1]}".strip(), _SNIPPET)


def _ask(choices: list[Choice], key: str) -> tuple[Choice, int | None, bool]:
    """The text and the destination that the reader chooses, and whether to go on."""
    columns = st.columns([6, 2.4, 1.4], vertical_alignment="bottom")
    row = columns[0].selectbox(
        "Text",
        range(len(choices)),
        format_func=lambda row: choices[row].label,
        key=f"attribution_text_{key}",
    )
    choice = choices[row]
    names = {
        at: f"{plain_visible(token).strip() or '␣'} · {at}"
        for at, (token, _) in choice.firing.items()
    }
    position = columns[1].selectbox(
        "Destination token",
        list(names) or [None],
        format_func=lambda at: names.get(at, "the nearest to firing"),
        key=f"attribution_at_{key}_{row}",
        help="Where the feature is read, and its position: where it fires, the strongest first.",
    )
    pressed = columns[2].button(
        "Attribute", type="primary", key=f"attribution_go_{key}", width="stretch"
    )
    return choice, position, pressed


def _compute(session: Session, question: tuple[Any, ...], key: str) -> None:
    """Answer the question and keep the answer, or say why there is none."""
    st.session_state.pop(key, None)
    _, number, token_ids, position = question
    try:
        with st.spinner("Running the model over the text; it is loaded first, in 10 to 60 s …"):
            found = model_cache.attribution(session.store, number, token_ids, position)
    except SaescopeError as error:
        st.error(plain(error), icon=":material/error:")
        return
    st.session_state[key] = (question, found)


def _draw(found: "Attribution", choice: Choice) -> None:
    st.markdown(attribution_figures.in_words(found))
    row = _through(found)
    st.html(attribution_figures.sources_html(found, row))
    whose = "attention heads" if row is None else attribution_figures.head_names(found.heads)[row]
    st.caption(
        f"The text up to the destination, which is underlined. A token's colour is what {whose} "
        "brought from it: orange raises the pre-activation, blue lowers it."
    )
    left, right = st.columns([4, 5], gap="medium")
    with left:
        st.markdown("###### By part", help=_PARTS_HELP)
        st.plotly_chart(
            attribution_figures.part_bars(found),
            config=figures.DOWNLOADABLE,
            key="attribution_parts",
            alt="What heads, layers and biases contribute to the pre-activation",
        )
    with right:
        st.markdown("###### By head and source token", help=_HEADS_HELP)
        st.plotly_chart(
            attribution_figures.head_by_source(found),
            config=figures.DOWNLOADABLE,
            key="attribution_heads",
            alt="What each head contributes from each source token",
        )
    st.caption(f"{attribution_figures.left_out(found)} {_compared(found, choice)}")


def _through(found: "Attribution") -> int | None:
    """The head, by its row, whose sources alone are shown; None for all together."""
    rows = attribution_figures.largest_heads(found)
    if len(rows) < 2:
        return None
    names, shares = attribution_figures.head_names(found.heads), found.by_head.tolist()
    return st.pills(
        "Source tokens through one head",
        rows,
        format_func=lambda row: f"{names[row]} {amount(shares[row], signed=True)}",
        key=f"attribution_through_{found.site}_{found.feature}_{found.position}",
        help="What each of the heads with most in it brought, summed over source tokens. Choose "
        "one to see from where; choose it again for all together.",
    )


def _compared(found: "Attribution", choice: Choice) -> str:
    """How the activation compares with the store's."""
    if not choice.stored:
        return ""
    _, stored = choice.firing[found.position]
    said = f"The store has the activation {amount(stored)}; here it is {amount(found.activation)}"
    if abs(found.activation - stored) > _OTHERWISE * stored:
        return (
            f"{said}: more than rounding apart, so the store's model read this text otherwise "
            "(as the mean of positions, say)."
        )
    return f"{said}, computed in float32."
