"""Circuits: a saved attribution graph, what is pinned of it, and what can be done with that."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import streamlit as st

from dashboards import address, find_stores
from dashboards.amounts import counted
from dashboards.circuits import drawing, export, saved
from dashboards.circuits.choice import Chosen, chosen_of, take
from dashboards.circuits.drawing import Texts
from dashboards.circuits.saved import Kept
from dashboards.circuits.steering import WAYS, steerings
from dashboards.pages import Page, page_at
from dashboards.session import begin_page
from dashboards.tokens import plain
from sae.circuits.graph import Graph
from sae.circuits.subgraphs import (
    GRAPHS_FOLDER,
    save_subgraph,
    saved_subgraphs,
)
from saescope.errors import InputError, SaescopeError

PAGE = Page(title="Circuits", icon=":material/account_tree:", order=47, url="circuits")

PARAMETERS = ("graph", "keep", "edges", "node", "pinned", "supernodes", "subgraph")
KEEP, EDGES = 80, 98
"""percent of influence that nodes, and edges, are kept of"""
LEAST_KEEP, LEAST_EDGES = 5, 50
_BOTH = "From tokens at the bottom to outputs at the top."
_LINEAR = (
    "The larger a mark, the more influence its node has on the outputs, direct and indirect. Links "
    "are what the target gets straight from the source on this prompt, attention held; they say "
    "nothing of other prompts."
)
_ESTIMATED = (
    "The larger a mark, the larger the effect that its node has on the outputs, as estimated by "
    "gradients. Links too are estimates, gradient times activation, on this prompt alone; sums, "
    "scores and shares of them are no better than they are."
)


def render() -> None:
    """Draw the page."""
    begin_page("Circuits", PARAMETERS)
    graphs = saved.saved_graphs()
    if not graphs:
        folder = find_stores.beside_stores() / GRAPHS_FOLDER
        st.info(
            f"There is no graph yet in {plain(folder)}. A graph says what a model's next token "
            "comes from, feature by feature: `saescope circuit RUNS --prompt TEXT --prune 1 "
            f"--edges 1 --out {GRAPHS_FOLDER}/NAME.npz` writes one there, to be pruned here.",
            icon=":material/account_tree:",
        )
        return
    arrived = address.arrived("circuits", PARAMETERS)
    name, unknown = _choice(graphs, arrived)
    version = saved.version(graphs[name])
    try:
        whole = saved.loaded(version).graph
    except (SaescopeError, OSError) as error:
        st.error(plain(error), icon=":material/error:")
        return
    chosen, new = chosen_of(whole, name)
    wrong = [*unknown, *_shares(whole, arrived, new=new)]
    wrong += take(chosen, whole, graphs[name], arrived)
    address.complain(wrong)
    _heading(whole)
    nodes, edges = _sliders()
    kept = saved.kept(version, nodes / 100, edges / 100, chosen.always())
    stores = saved.stores_of(whole)
    texts = saved.texts_of(kept.graph, stores)
    _scores(whole, kept)
    _draw(whole, kept.graph, texts, chosen)
    left, right = st.columns(2, gap="large")
    with left:
        _supernodes(kept.graph, chosen, texts)
        _files(whole, graphs[name], chosen)
    with right:
        _steer(whole, chosen, stores)
        _export(kept.graph, texts, chosen, f"nodes {nodes} %, links {edges} %")
    cut = {"keep": str(nodes), "edges": str(edges)}
    address.write("circuits", {"graph": name, **cut, **chosen.parameters()})


# ---- what is chosen -----------------------------------------------------------------------------


def _choice(graphs: Mapping[str, Path], arrived: Mapping[str, str]) -> tuple[str, list[str]]:
    """The graph to draw, and "graph" if the address names none of them."""
    key, asked = "circuits_graph", arrived.get("graph")
    if asked in graphs:
        st.session_state[key] = asked
    if st.session_state.get(key) not in graphs:
        st.session_state[key] = next(iter(graphs))
    name = st.selectbox("Graph", list(graphs), key=key, persist_state="session")
    return name, ["graph"] if asked and asked not in graphs else []


def _shares(whole: Graph, arrived: Mapping[str, str], *, new: bool) -> list[str]:
    """Set the sliders, of a new graph and from a link; the parameters that make no sense."""
    state, wrong = st.session_state, []
    if new:
        cut = whole.facts.get("node_threshold") is not None
        state["circuits_keep"] = 100 if cut else KEEP
        state["circuits_edges"] = 100 if cut else EDGES
    for name, low in (("keep", LEAST_KEEP), ("edges", LEAST_EDGES)):
        if text := arrived.get(name):
            value = int(text) if text.isascii() and text.isdigit() and len(text) < 4 else -1
            if low <= value <= 100:
                state[f"circuits_{name}"] = value
            else:
                wrong.append(name)
    return wrong


# ---- the graph ----------------------------------------------------------------------------------


def _heading(whole: Graph) -> None:
    st.markdown(f"#### {plain(whole.prompt)}")
    words = [whole.model, f"edges: {whole.method}"]
    if left := whole.facts.get("left_out"):
        words.append(f"left out when it was made: {counted(left, 'active feature')}")
    st.caption(plain(" · ".join(words)))
    share = whole.facts.get("node_threshold")
    if isinstance(share, int | float) and share < 1:
        found = whole.facts.get("scores")
        own = found if isinstance(found, dict) else {}
        known = [f"{name} {own[name]}" for name in ("replacement", "completeness") if name in own]
        before = f" Before, the scores were: {plain(', '.join(known))}." if known else ""
        st.caption(
            f"This graph was pruned, to {share:.0%} of the influence, before it was written: the "
            f"scores below do not count what is not in its file.{before}"
        )


def _sliders() -> tuple[int, int]:
    """Percent of influence that nodes and links are kept of."""
    left, right = st.columns(2, gap="large")
    nodes = left.slider(
        "Nodes that have this much of the influence (%)",
        LEAST_KEEP,
        100,
        key="circuits_keep",
        help="Tokens, outputs and what is pinned are always kept.",
        persist_state="session",
    )
    edges = right.slider(
        "Links that carry this much of it (%)",
        LEAST_EDGES,
        100,
        key="circuits_edges",
        persist_state="session",
    )
    return int(nodes), int(edges)


def _scores(whole: Graph, kept: Kept) -> None:
    """What is kept explains so much; a random choice of as many features so much."""
    explained = {
        "replacement": "Of what reaches the outputs, the share that comes from tokens through the "
        "features kept; the rest comes from errors and features left out.",
        "completeness": "Of what nodes get, counted by their influence, the share that does not "
        "come from errors and features left out.",
    }
    with st.container(horizontal=True, gap="large"):
        _metric("Nodes", f"{len(kept.graph):,}", f"of {len(whole):,}")
        _metric("Links", f"{kept.graph.n_edges:,}", f"of {whole.n_edges:,}")
        for name, text in explained.items():
            drawn = [getattr(each, name) for each in kept.random]
            _metric(
                f"{name.capitalize()} score",
                _score(getattr(kept.scores, name)),
                f"random {_span(drawn)} · all {_score(getattr(kept.all, name))}",
                help=f"{text} Beside it: the range over {len(drawn)} draws of as many features at "
                "random, and all features of the file.",
            )


def _metric(label: str, value: str, beside: str, help: str | None = None) -> None:
    st.metric(
        label, value, beside, delta_color="off", delta_arrow="off", help=help, width="content"
    )


def _score(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _span(values: Sequence[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    return f"{min(known):.3f} to {max(known):.3f}" if known else "–"


def _draw(whole: Graph, kept: Graph, texts: Texts, chosen: Chosen) -> None:
    data = drawing.picture(
        kept, texts, whole=whole, subgraph=chosen.subgraph, selected=chosen.selected
    )

    def changed(selected: str | None, pinned: Sequence[str]) -> None:
        chosen.selected = selected
        chosen.pin(pinned)

    drawing.draw(data, f"circuit_{chosen.graph}", changed)
    left = data["left_out"]
    if left["nodes"] or left["links"]:
        st.caption(
            f"Not drawn: {counted(left['nodes'], 'node')} and {counted(left['links'], 'link')} of "
            "least influence; scores, sums and JSON have them. Prune further to draw all."
        )
    st.caption(f"{_BOTH} {_LINEAR if whole.method == drawing.LINEAR else _ESTIMATED}")


# ---- what is pinned -----------------------------------------------------------------------------


def _supernodes(graph: Graph, chosen: Chosen, texts: Texts) -> None:
    st.markdown("##### Supernodes")
    pinned = chosen.subgraph.pinned
    if not pinned:
        st.caption("Pin nodes; then they can be grouped here under a name, their links summed.")
        return
    nodes = [graph.index(each) for each in pinned]
    names = {
        each: f"{drawing.node_name(graph, node, texts)} · {drawing.node_words(graph, node)}"
        for each, node in zip(pinned, nodes, strict=True)
    }
    for number, (name, own) in enumerate(chosen.subgraph.supernodes.items()):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(f"**{plain(name)}** · {counted(len(own), 'node')}", width="content")
            key = f"circuits_ungroup_{number}"
            st.button("Ungroup", key=key, on_click=chosen.ungroup, args=(name,))
    with st.form("circuits_group", border=False, clear_on_submit=True):
        members = st.multiselect(
            "Group these pinned nodes", list(names), format_func=names.__getitem__
        )
        name = st.text_input("under the name", max_chars=100)
        grouped = st.form_submit_button("Group")
    if grouped:
        try:
            chosen.group(name.strip(), members)
        except InputError:
            st.warning("Choose nodes, and type a name.", icon=":material/edit:")
            return
        st.rerun()


def _files(whole: Graph, file: Path, chosen: Chosen) -> None:
    """Subgraphs beside the graph: open one, save this one."""
    st.markdown("##### Subgraphs")
    if named := saved_subgraphs(file):
        with st.form("circuits_open", border=False):
            name = st.selectbox("Saved beside the graph", named)
            opened = st.form_submit_button("Open")
        if opened and _done(lambda: chosen.open(whole, file, name)):
            st.rerun()
    if not chosen.subgraph.pinned:
        st.caption("What is pinned and grouped can be saved beside the graph.")
        return
    with st.form("circuits_save", border=False):
        name = st.text_input(
            "Save what is pinned as", chosen.saved, max_chars=60, placeholder="a-z, 0-9, - and _"
        )
        replace = st.checkbox("in the place of one that has this name")
        asked = st.form_submit_button("Save")
    if not asked:
        return
    if name in named and not replace:
        st.warning(f"There is a subgraph {plain(name)} already.", icon=":material/save:")
    elif _done(lambda: save_subgraph(chosen.subgraph, file, name, replace=replace)):
        chosen.saved = name
        st.rerun()


def _done(act: Callable[[], object]) -> bool:
    """Whether it could be done; why not is shown."""
    try:
        act()
    except (SaescopeError, OSError) as error:
        st.error(plain(error), icon=":material/error:")
        return False
    return True


def _steer(whole: Graph, chosen: Chosen, stores: Mapping[int, str]) -> None:
    st.markdown("##### Steer this subgraph")
    if not chosen.subgraph.pinned:
        st.caption("Pin features; then the Steer page opens with edits of them and this prompt.")
        return
    way = st.segmented_control(
        "What to do with each feature",
        list(WAYS),
        format_func=WAYS.__getitem__,
        required=True,
        default="ablate",
        key="circuits_way",
    )
    found, refused = steerings(whole, chosen.subgraph, stores, way or "ablate")
    for each in found:
        st.page_link(
            page_at("steer"),
            label=f"Steer {counted(len(each.features), 'feature')} of {plain(each.store)}",
            icon=":material/explore:",
            query_params=each.parameters,
        )
    if found:
        several = " One SAE at a time: the others stay as they are." if len(found) > 1 else ""
        st.caption(f"A feature is edited at every token, not at its node's alone.{several}")
    if refused:
        st.caption("Not steered:\n" + "\n".join(f"- {plain(each)}" for each in refused))


def _export(graph: Graph, texts: Texts, chosen: Chosen, about: str) -> None:
    st.markdown("##### Take it along")
    slug = export.slug(Path(chosen.graph).name)

    def page() -> str:
        return export.page(graph, texts, chosen.subgraph, about)

    def viewer() -> str:
        found = export.neuronpedia(graph, slug, texts, chosen.subgraph)
        return json.dumps(found, ensure_ascii=False, allow_nan=False)

    with st.container(horizontal=True, gap="small"):
        for label, make, ending, mime in (
            ("HTML page", page, "html", "text/html"),
            ("JSON for Neuronpedia's viewer", viewer, "neuronpedia.json", "application/json"),
        ):
            st.download_button(
                label,
                data=make,  # made only when it is asked for
                file_name=f"{slug}.{ending}",
                mime=mime,
                key=f"circuits_{ending}",
                on_click="ignore",
            )
    st.caption(
        "Both have the pruned graph as shown, with labels, pins and supernodes. The page opens "
        "without a network."
    )


if __name__ == "__main__":
    render()
