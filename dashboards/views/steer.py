"""Steer: a prompt continued with and without an edit of features, side by side, as it is made."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import streamlit as st

from dashboards import address, doses, model_cache, queries
from dashboards.amounts import amount
from dashboards.edits import IN_CHATS, KINDS, WHERE, Edit, edits_of, steer_arguments
from dashboards.pages import Page
from dashboards.session import Session, begin_page, link_named
from dashboards.tokens import plain, steered_html
from saescope.chat import messages_of
from saescope.errors import SaescopeError

PAGE = Page(title="Steer", icon=":material/explore:", order=45, url="steer")

EXAMPLE = "The weather today"
LONGEST, MOST_TOKENS, MOST_EDITS = 4000, 400, 20
MODES = {"text": "Text", "chat": "Chat"}
PARAMETERS = ("prompt", "mode", "edits", "where", "tokens", "temperature", "seed")
DOSES = {"½ ×": 0.5, "1 ×": 1.0, "1½ ×": 1.5, "3 ×": 3.0}
WAIT = "The first one takes 10 to 60 seconds, because the model has to be loaded."


def render() -> None:
    """Draw the page."""
    session = begin_page("Steer", PARAMETERS)
    arrived = address.arrived("steer", PARAMETERS)
    problem = _take(session, arrived)
    if problem:
        st.warning(plain(problem), icon=":material/link_off:")
    left, right = st.columns([5, 6], gap="large")
    with left:
        sent = _prompt()
    with right:
        edits = _edits(session)
    asked = st.session_state["steer_prompt"] or ""
    _tell(asked, edits)
    linked = bool(arrived.get("prompt") and arrived.get("edits") and not problem)
    if sent or linked:
        _run(session, asked, edits)
    else:
        _kept(session)
    doses.section(session, edits)


# ---- the fields ---------------------------------------------------------------------------------


def _take(session: Session, arrived: Mapping[str, str]) -> str:
    """Fill the fields with what a link says; what is wrong with the link, or ""."""
    state = st.session_state
    for name, value in {
        "steer_prompt": EXAMPLE,
        "steer_mode": "text",
        "steer_tokens": 40,
        "steer_temperature": 0.0,
        "steer_seed": 0,
        "steer_where": "kept",
        "steer_rows": [],
        "steer_next": 0,
    }.items():
        state.setdefault(name, value)
    if state.get("steer_sae", session.name) != session.name:
        state["steer_rows"] = []  # the numbers are another SAE's
    state["steer_sae"] = session.name
    if arrived.get("prompt"):
        state["steer_prompt"] = arrived["prompt"][:LONGEST]
    if arrived:
        state["steer_mode"] = "chat" if arrived.get("mode") == "chat" else "text"
        state["steer_where"] = arrived["where"] if arrived.get("where") in _where() else "kept"
        if arrived.get("where", "kept") not in _where():
            return f"where in the address is none of {', '.join(_where())}."
    limits: dict[str, tuple[Callable[[str], Any], float, float]] = {
        "tokens": (int, 1, MOST_TOKENS),
        "temperature": (float, 0, 5),
        "seed": (int, 0, 2**31),
    }
    wrong = ""
    for name, (kind, low, high) in limits.items():
        if name in arrived:
            try:
                value = kind(arrived[name][:20])
                if not low <= value <= high:
                    raise ValueError
                state[f"steer_{name}"] = value
            except ValueError:
                wrong = f"{name} in the address is not a number from {low:g} to {high:g}."
    if "edits" in arrived:
        try:
            edits = edits_of(arrived["edits"], session.store.d_sae)
        except SaescopeError as error:
            return str(error)
        state["steer_rows"] = []
        for edit in edits:
            _add(edit)
    return wrong


def _where() -> dict[str, str]:
    """Which tokens can be edited, with their names: of a chat, those of a role too."""
    return {**WHERE, **IN_CHATS} if st.session_state["steer_mode"] == "chat" else WHERE


def _prompt() -> bool:
    st.text_area(
        "Prompt", key="steer_prompt", max_chars=LONGEST, height=110, persist_state="session"
    )
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        st.segmented_control(
            "Kind",
            list(MODES),
            format_func=MODES.__getitem__,
            required=True,
            key="steer_mode",
            help="A chat goes through the model's chat template; begin each turn with `system:`, "
            "`user:` or `assistant:`.",
            persist_state="session",
        )
        whole: dict[str, Any] = {"step": 1, "width": 105, "persist_state": "session"}
        st.number_input("New tokens", 1, MOST_TOKENS, key="steer_tokens", **whole)
        st.number_input(
            "Temperature",
            0.0,
            5.0,
            step=0.1,
            key="steer_temperature",
            width=105,
            help="0 takes the likeliest token.",
            persist_state="session",
        )
        st.number_input("Seed", 0, 2**31, key="steer_seed", **whole)
    return st.button("Continue the prompt", type="primary", icon=":material/play_arrow:")


def _add(edit: Edit) -> None:
    """A further row, whose fields show this edit."""
    number = st.session_state["steer_next"]
    st.session_state["steer_next"] = number + 1
    st.session_state["steer_rows"] = [*st.session_state["steer_rows"], number]
    for name in ("kind", "feature", "amount"):
        st.session_state[f"steer_{name}_{number}"] = getattr(edit, name)


def _remove(number: int) -> None:
    st.session_state["steer_rows"] = [n for n in st.session_state["steer_rows"] if n != number]


def _add_seen(session: Session) -> None:
    """Add the feature that was looked at last, or the first live one, at its strongest."""
    seen = st.session_state.get(f"feature_of_{session.name}")
    feature = session.store.next_live(-1) or 0 if seen is None else seen
    _add(Edit("add", feature, _rounded(session.store.feature(feature).max)))


def _add_suggested(session: Session) -> None:
    """Take the feature that `saescope steer --store` takes, at 1.5 times its strongest."""
    from sae.commands.steer import suggest

    try:
        feature, strongest, word = suggest(str(session.store.path))
    except SaescopeError as error:
        st.session_state["steer_said"] = str(error)
        return
    st.session_state["steer_rows"] = []
    _add(Edit("add", feature, round(1.5 * strongest, 1)))
    st.session_state["steer_said"] = f"Feature {feature} fires on “{word}”."


def _dose(session: Session, factor: float) -> None:
    """Set what is added or held to this many times each feature's strongest activation."""
    for number in st.session_state["steer_rows"]:
        if st.session_state[f"steer_kind_{number}"] in ("add", "clamp"):
            strongest = session.store.feature(st.session_state[f"steer_feature_{number}"]).max
            st.session_state[f"steer_amount_{number}"] = _rounded(factor * strongest)


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _edits(session: Session) -> list[Edit]:
    """Draw the rows of edits and the presets; the edits as they stand."""
    rows = st.session_state["steer_rows"]
    edits = [_row(session, number, first=index == 0) for index, number in enumerate(rows)]
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.button(
            "Add a feature",
            icon=":material/add:",
            on_click=_add_seen,
            args=(session,),
            disabled=len(rows) >= MOST_EDITS,
            help="The feature that you looked at last, at its strongest activation in the store.",
        )
        st.button(
            "A suggestion",
            icon=":material/lightbulb:",
            on_click=_add_suggested,
            args=(session,),
            help="A feature that is plainly about one word, at 1.5 times its strongest activation.",
        )
        for name, factor in DOSES.items() if rows else ():
            st.button(
                name,
                key=f"steer_dose_{factor}",
                on_click=_dose,
                args=(session, factor),
                help=f"Set every strength to {factor:g} times the feature's strongest activation.",
            )
    if rows:
        if st.session_state["steer_where"] not in _where():
            st.session_state["steer_where"] = "kept"  # a role's, of what was a chat before
        st.segmented_control(
            "Edited tokens",
            list(_where()),
            format_func=_where().__getitem__,
            required=True,
            key="steer_where",
            help="Never the first token, nor special tokens.",
            persist_state="session",
        )
    if said := st.session_state.pop("steer_said", ""):
        st.info(plain(said), icon=":material/lightbulb:")
    if not rows:
        st.caption("No feature is edited yet: add one, or take the suggestion.")
    return edits


def _row(session: Session, number: int, *, first: bool) -> Edit:
    """One row of fields, its keys kept alive for as long as the row is there."""
    names = {name: f"steer_{name}_{number}" for name in ("feature", "kind", "amount")}
    for key in names.values():
        st.session_state[key] = st.session_state[key]
    columns = st.columns([1.2, 2.1, 1.3, 0.5], vertical_alignment="bottom")
    shown: Any = "visible" if first else "collapsed"
    feature = columns[0].number_input(
        "Feature", 0, session.store.d_sae - 1, key=names["feature"], label_visibility=shown
    )
    kind = columns[1].selectbox(
        "What to do",
        list(KINDS),
        format_func=KINDS.__getitem__,
        key=names["kind"],
        label_visibility=shown,
    )
    off = kind == "ablate"
    value = columns[2].number_input(
        "Strength",
        key=names["amount"],
        disabled=off,
        format="%.4g",
        label_visibility=shown,
        help="In the model's units, as `saescope steer` takes them; of “multiply”, the factor. The "
        "part along a feature is the activation's component along its decoder direction.",
    )
    columns[3].button(
        "",
        icon=":material/close:",
        key=f"steer_remove_{number}",
        on_click=_remove,
        args=(number,),
        help="Leave this feature alone",
    )
    name = queries.named(session.store, session.notes, [feature])[feature]
    strongest = session.store.feature(feature).max
    with st.container(horizontal=True, vertical_alignment="center", key=f"marked_{number}"):
        link_named(session, feature, name)
        st.caption(f"strongest in the store: {amount(strongest)}", width="content")
    return Edit(kind or "add", int(feature), 0.0 if off else float(value or 0.0))


# ---- the texts ----------------------------------------------------------------------------------


def _run(session: Session, asked: str, edits: list[Edit]) -> None:
    """Continue the prompt twice, drawing each token as it comes."""
    st.session_state.pop("steer_result", None)
    if not asked.strip():
        st.warning("Type a prompt first.", icon=":material/edit:")
        return
    if not edits:
        st.warning("Add a feature to steer with first.", icon=":material/add:")
        return
    options = {
        "max_new_tokens": int(st.session_state["steer_tokens"]),
        "temperature": float(st.session_state["steer_temperature"]),
        "seed": int(st.session_state["steer_seed"]),
    }
    question = (session.version, asked, st.session_state["steer_mode"], tuple(options.items()))
    try:
        arguments = steer_arguments(edits)
        with st.spinner(f"Continuing the prompt. {WAIT}"):
            chat = st.session_state["steer_mode"] == "chat"
            prompt = messages_of(asked) if chat else asked
            left, right = _columns()
            known = st.session_state.get("steer_untouched")
            if known is None or known[0] != question:
                known = (question, _stream(session, left, prompt, {}, options))
                st.session_state["steer_untouched"] = known
            else:
                left.html(steered_html(known[1].tokens, known[1].prompt, known[1].edited))
            steered = _stream(session, right, prompt, arguments, options)
    except SaescopeError as error:
        st.error(plain(error), icon=":material/error:")
        return
    st.session_state["steer_result"] = (session.version, edits, known[1], steered)
    _summary(steered)


def _columns() -> tuple[Any, Any]:
    """Two places side by side, under their headings."""
    left, right = st.columns(2, gap="large")
    left.markdown("##### Untouched")
    right.markdown("##### Steered")
    return left.empty(), right.empty()


def _stream(
    session: Session, where: Any, prompt: Any, edits: dict[str, Any], options: dict[str, Any]
) -> model_cache.SteeredText:
    """Draw a continuation as it grows; the whole of it."""
    last = None
    # closed at once if the reader goes elsewhere meanwhile: the model is then free, and unedited
    with contextlib.closing(
        model_cache.continuations(
            session.store, prompt, edits, options, st.session_state["steer_where"]
        )
    ) as growing:
        for text in growing:
            edited = text.edited if edits else [False] * len(text.tokens)
            last = model_cache.SteeredText(text.tokens, text.prompt, edited)
            where.html(steered_html(last.tokens, last.prompt, last.edited))
    assert last is not None
    return last


def _kept(session: Session) -> None:
    """Draw the last result again, if it is this store's."""
    version, edits, untouched, steered = st.session_state.get("steer_result", [None] * 4)
    if version != session.version:
        st.caption(f"“Continue the prompt” writes both texts here. {WAIT}")
        return
    left, right = _columns()
    left.html(steered_html(untouched.tokens, untouched.prompt, untouched.edited))
    right.html(steered_html(steered.tokens, steered.prompt, steered.edited))
    st.caption(f"Steered with {', '.join(edit.text for edit in edits)}.")
    _summary(steered)


def _summary(steered: model_cache.SteeredText) -> None:
    count = sum(steered.edited)
    st.caption(
        f"Underlined are the steered positions, {count} of {len(steered.tokens)}. Left alone "
        "are position 0, special tokens, and a last token that the model has only written. The "
        "texts are those of `saescope steer` with the same edits, temperature and seed."
    )
    with st.expander("Share this", icon=":material/link:"):
        st.caption("This address opens the page with the same prompt, edits and seed.")
        st.code(_address(), language=None, wrap_lines=True)


def _address() -> str:
    from urllib.parse import urlencode

    base = (st.context.url or "steer").split("?")[0]
    return f"{base}?{urlencode({name: st.query_params[name] for name in st.query_params})}"


def _tell(asked: str, edits: list[Edit]) -> None:
    """Write the page's state into its address."""
    state = st.session_state
    address.write(
        "steer",
        {
            "prompt": asked,
            "mode": "chat" if state["steer_mode"] == "chat" else None,
            "edits": ",".join(edit.text for edit in edits),
            "where": state["steer_where"] if state["steer_where"] != "kept" else None,
            "tokens": str(state["steer_tokens"]) if state["steer_tokens"] != 40 else None,
            "temperature": f"{state['steer_temperature']:g}"
            if state["steer_temperature"]
            else None,
            "seed": str(state["steer_seed"]) if state["steer_seed"] else None,
        },
    )


if __name__ == "__main__":
    render()
