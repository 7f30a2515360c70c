"""Prompt: which features of one SAE, or of several layers', fire on each token of a text."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import streamlit as st

from dashboards import address, find_stores, model_cache, prompt_grid, queries
from dashboards.amounts import amount, counted
from dashboards.figures import percent
from dashboards.pages import Page, page_at
from dashboards.prompt_grid import Cell, Choice
from dashboards.session import Session, begin_page, link, session_of, text_features_key
from dashboards.tokens import per_token_html, plain
from saescope.chat import messages_of
from saescope.errors import SaescopeError

if TYPE_CHECKING:
    import numpy as np

    from sae import TextFeatures

# the address is the one that this page had as "Try your text"
PAGE = Page(title="Prompt", icon=":material/edit_note:", order=40, url="text")

EXAMPLE = "The old harbour lay quiet under the snow until the first ferry of the year came in."
LONGEST = 4000
LOADED = (
    "Loaded are only models and SAEs that are beside the stores or were named when the explorer "
    "was started (--model, --sae), and only with the weights that the store was made with."
)
WAIT = "The first text takes 10 to 60 seconds, because the model has to be loaded."
MODES = {"text": "Text", "chat": "Chat"}
ORDERS = {
    "share": "share of strongest",
    "activation": "activation",
    "effect": "effect on the loss",
}
DENSITIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
PARAMETERS = ("text", "mode", "by", "densest", "special", "with", "token", "locked")
_MOST_LISTED = 12


def render() -> None:
    """Draw the page."""
    session = begin_page("Prompt", PARAMETERS)
    arrived = address.arrived("prompt", PARAMETERS)
    _take(arrived)
    sent = _form() or "text" in arrived
    choice, others = _choices(session)
    asked, mode = st.session_state["text"] or "", st.session_state["prompt_mode"]
    key = "prompt_asked"
    if sent and not asked.strip():
        st.session_state.pop(key, None)
        st.warning("Type some text first.", icon=":material/edit:")
    elif sent:
        st.session_state[key] = (asked, mode)
        st.session_state["prompt_locked"] = _locked_in(arrived)
    if key in st.session_state:
        asked, mode = st.session_state[key]
        for each in (session, *others):
            _one(each, asked, mode, choice, alone=not others)
    else:
        st.caption(f"{WAIT} {LOADED}")
        asked = ""
    _tell(asked, mode, choice, others)


def _take(arrived: Mapping[str, str]) -> None:
    """Fill the fields with what a link says; what a link gets wrong is left as it is."""
    state = st.session_state
    for name, value in {
        "text": EXAMPLE,
        "prompt_mode": "text",
        "prompt_by": "share",
        "prompt_densest": 1.0,
        "prompt_special": False,
    }.items():
        state.setdefault(name, value)
    if arrived.get("text"):
        state["text"] = arrived["text"][:LONGEST]
    if arrived.get("mode") in MODES:
        state["prompt_mode"] = arrived["mode"]
    if arrived.get("by") in ORDERS:
        state["prompt_by"] = arrived["by"]
    by_text = {f"{density:g}": density for density in DENSITIES}
    if arrived.get("densest") in by_text:
        state["prompt_densest"] = by_text[arrived["densest"]]
    if arrived:
        state["prompt_special"] = arrived.get("special") == "1"
        state["prompt_with"] = [name for name in arrived.get("with", "").split(",") if name]


def _form() -> bool:
    with st.form("text_form", border=False):
        st.text_area("Prompt", key="text", max_chars=LONGEST, height=110, persist_state="session")
        with st.container(horizontal=True, vertical_alignment="center", gap="medium"):
            st.segmented_control(
                "Kind",
                list(MODES),
                format_func=MODES.__getitem__,
                required=True,
                key="prompt_mode",
                label_visibility="collapsed",
                persist_state="session",
            )
            sent = st.form_submit_button("Show features", type="primary")
            st.caption(
                "A chat goes through the model's chat template; begin each turn with `system:`, "
                "`user:` or `assistant:`."
            )
    return sent


def _choices(session: Session) -> tuple[Choice, list[Session]]:
    """What to draw, and the further SAEs to draw it for."""
    stores = find_stores.stores()
    same = queries.same_model(session.name, stores)[1:]
    widths = [3.6, 2.2, 1.5, 2.2] if same else [3.6, 2.2, 3.7]
    columns = st.columns(widths, vertical_alignment="bottom")
    columns[0].segmented_control(
        "Order and colour by",
        list(ORDERS),
        format_func=ORDERS.__getitem__,
        required=True,
        key="prompt_by",
        persist_state="session",
    )
    columns[1].select_slider(
        "Leave out features that fire on more than",
        DENSITIES,
        format_func=lambda density: f"{percent(density)} of positions" if density < 1 else "any",
        key="prompt_densest",
        persist_state="session",
    )
    columns[2].toggle("Special tokens", key="prompt_special", persist_state="session")
    chosen: list[str] = []
    if same:
        known = st.session_state.get("prompt_with", [])
        st.session_state["prompt_with"] = [name for name in known if name in same]
        chosen = columns[3].multiselect(
            "Beside it, SAEs of the same model",
            same,
            key="prompt_with",
            placeholder="other layers",
            persist_state="session",
        )
    choice = Choice(
        by=st.session_state["prompt_by"] or "share",
        densest=st.session_state["prompt_densest"],
        special=st.session_state["prompt_special"],
    )
    return choice, [session_of(name) for name in chosen]


def _one(session: Session, asked: str, mode: str, choice: Choice, *, alone: bool) -> None:
    """One SAE's features of the text, or why there are none."""
    if not alone:
        site = str(session.store.meta.get("site") or "")
        st.markdown(f"##### {plain(session.name)} · {plain(site)}")
    try:
        result = _features(session, asked, mode)
    except SaescopeError as error:
        st.error(plain(error), icon=":material/error:")
        return
    if problem := prompt_grid.unread(result.keep):
        st.info(problem, icon=":material/visibility_off:")
        return
    _result(session, result, choice)


def _features(session: Session, asked: str, mode: str) -> "TextFeatures":
    """The text's features, computed once for as long as the same text is asked for."""
    key, question = text_features_key(session.name), (session.version, asked, mode)
    known = st.session_state.get(key)
    if known is None or known[0] != question:
        st.session_state.pop(key, None)
        with st.spinner(f"Running the model over the text. {WAIT}"):
            text = asked
            if mode == "chat":
                text = model_cache.chat_text(session.store, messages_of(asked))
            known = (question, model_cache.features_of_text(session.store, text))
        st.session_state[key] = known
    return known[1]


def _effects(session: Session, result: "TextFeatures") -> "np.ndarray | None":
    """The features' effects on the loss, once for a text; None, and why, where there are none."""
    key, question = f"prompt_effects_{session.name}", (session.version, tuple(result.token_ids))
    known = st.session_state.get(key)
    if known is None or known[0] != question:
        try:
            with st.spinner("Running the model back from each token's loss: seconds to a minute …"):
                known = (question, model_cache.loss_effects(session.store, result))
        except SaescopeError as error:
            st.warning(plain(error), icon=":material/error:")
            return None
        st.session_state[key] = known
    st.caption(
        "Effect on the loss: how much the cross-entropy of the next token, in nats, would rise if "
        "the feature were ablated at this token. It is a first-order estimate, by the gradient; "
        "orders and colours are by its size, its sign stands in the tooltips and lists."
    )
    return known[1]


def _result(session: Session, result: "TextFeatures", choice: Choice) -> None:
    numbers = tuple(sorted({int(feature) for feature in result.feature}))
    facts = queries.statistics(session.store, session.version, numbers)
    strongest = {feature: top for feature, (top, _) in facts.items()}
    density = {feature: dense for feature, (_, dense) in facts.items()}
    effects = _effects(session, result) if choice.by == "effect" else None
    cells = prompt_grid.cells_of(result, strongest, density, choice, effects)
    locked = st.session_state.get("prompt_locked") or {}
    features = prompt_grid.drawn_features(cells, choice, locked.get("token"))
    if not features:
        st.info(
            "No feature fires on this text, or all that do fire on more positions than are let "
            "through: move the slider to the right.",
            icon=":material/visibility_off:",
        )
        return
    names = queries.names(session.store, session.notes, sorted({cell.feature for cell in cells}))
    data = prompt_grid.picture(result, cells, features, names, choice)
    key = f"grid_{session.name}_{hash((session.version, tuple(result.token_ids)))}"
    prompt_grid.draw(data, locked, key, "prompt_locked")
    st.caption(
        f"{len(result.tokens)} tokens, {len(set(numbers))} features fire, {len(features)} are "
        "drawn: the first of each token. Position 0 is faded: SAEs never read it. Click a "
        "token or a feature to lock it."
    )
    _details(session, result, cells, names, density, locked)
    with st.expander("The first features of each token, as a list"):
        st.html(per_token_html(_per_token(result, cells, names, choice), session.name))


def _details(
    session: Session,
    result: "TextFeatures",
    cells: list[Cell],
    names: Mapping[int, str],
    density: Mapping[int, float],
    locked: Mapping[str, int | None],
) -> None:
    """What is locked, in words and links."""
    feature, token = locked.get("feature"), locked.get("token")
    left, right = st.columns(2, gap="large")
    if feature is not None and feature in names:
        with left:
            _of_feature(session, result, cells, names, density, feature)
    if token is not None and 0 <= token < len(result.tokens):
        with right:
            _of_token(session, result, cells, names, token)


def _of_feature(
    session: Session,
    result: "TextFeatures",
    cells: list[Cell],
    names: Mapping[int, str],
    density: Mapping[int, float],
    feature: int,
) -> None:
    mine = [cell for cell in cells if cell.feature == feature]
    best = max(mine, key=lambda cell: cell.activation)
    name = queries.named(session.store, session.notes, [feature])[feature]
    st.markdown(f"##### Feature {feature} · {name.markdown}")
    st.caption(
        f"fires on {counted(len(mine), 'token')} of this text, strongest "
        f"{amount(best.activation)} on “{plain(result.tokens[best.position])}” "
        f"({100 * best.share:.3g} % of its strongest in the store) · fires at "
        f"{percent(density.get(feature, 0.0))} of all positions"
    )
    with st.container(horizontal=True, gap="medium", key=f"locked_{session.name}"):
        link(session, feature, f"Open feature {feature}")
        st.page_link(
            page_at("steer"),
            label=f"Steer with feature {feature}",
            icon="",
            query_params=_steering(session, feature, best),
        )


def _of_token(
    session: Session,
    result: "TextFeatures",
    cells: list[Cell],
    names: Mapping[int, str],
    token: int,
) -> None:
    by = st.session_state["prompt_by"] or "share"
    here = (cell for cell in cells if cell.position == token)
    mine = sorted(here, key=lambda cell: -cell.measure(by))
    st.markdown(f"##### Token “{plain(result.tokens[token])}” at position {token}")
    if not mine:
        st.caption("No feature fires here, or SAEs do not read this position.")
    with st.container(key=f"marked_{session.name}"):
        for cell in mine[:_MOST_LISTED]:
            with st.container(horizontal=True, horizontal_alignment="distribute"):
                link(session, cell.feature, f"{cell.feature}  {names[cell.feature]}")
                st.caption(cell.words(), width="content")


def _steering(session: Session, feature: int, best: Cell) -> dict[str, str]:
    """The address of the Steer page for this prompt and a feature, at its strongest."""
    strongest = best.activation / best.share
    prompt, mode = st.session_state["prompt_asked"]
    return {
        "sae": session.name,
        "edits": f"add:{feature}:{strongest:.4g}",
        "prompt": prompt,
        "mode": mode,
    }


def _per_token(
    result: "TextFeatures", cells: list[Cell], names: Mapping[int, str], choice: Choice
) -> list[tuple[int, str, list[tuple[int, str, float, float]]]]:
    rows = []
    for position, text in enumerate(result.tokens):
        mine = [cell for cell in cells if cell.position == position]
        shown = set(prompt_grid.drawn_features(mine, choice))
        entries = [
            (cell.feature, names[cell.feature], cell.activation, cell.share)
            for cell in sorted(mine, key=lambda cell: -cell.measure(choice.by))
            if cell.feature in shown
        ]
        rows.append((position, text, entries))
    return rows


def _locked_in(arrived: Mapping[str, str]) -> dict[str, int | None]:
    """What a link says is locked."""

    def number(name: str) -> int | None:
        raw = arrived.get(name, "")
        return int(raw) if raw.isascii() and raw.isdigit() and len(raw) < 10 else None

    return {"token": number("token"), "feature": number("locked")}


def _tell(asked: str, mode: str, choice: Choice, others: list[Session]) -> None:
    """Write the page's state into its address."""
    locked = st.session_state.get("prompt_locked") or {}

    def shown(name: str) -> str | None:
        return None if locked.get(name) is None or not asked else str(locked[name])

    address.write(
        "prompt",
        {
            "text": asked,
            "mode": mode if mode != "text" else None,
            "by": choice.by if choice.by != "share" else None,
            "densest": f"{choice.densest:g}" if choice.densest < 1 else None,
            "special": "1" if choice.special else None,
            "with": ",".join(each.name for each in others),
            "token": shown("token"),
            "locked": shown("feature"),
        },
    )


if __name__ == "__main__":
    render()
