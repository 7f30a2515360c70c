"""What a reader has chosen of a graph: the node selected, and what is pinned and grouped."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import streamlit as st

from sae.circuits.graph import Graph
from sae.circuits.subgraphs import Subgraph, as_dict, from_dict, load_subgraph
from saescope.errors import InputError, SaescopeError

_STATE = "circuits_chosen"


@dataclass
class Chosen:
    """Of one graph; kept in the session."""

    graph: str
    """the name of its file"""
    selected: str | None = None
    """a node's name"""
    subgraph: Subgraph = field(default_factory=Subgraph)
    saved: str = ""
    """what the subgraph is saved as, as it is; "" if it is not"""

    def always(self) -> tuple[str, ...]:
        """Nodes that are drawn however little they matter."""
        own = self.subgraph.pinned
        return own if self.selected is None or self.selected in own else (*own, self.selected)

    def pin(self, pinned: Sequence[str]) -> None:
        """Pin these nodes and no others; supernodes lose those that are not pinned."""
        if tuple(pinned) == self.subgraph.pinned:
            return
        here, groups = set(pinned), self.subgraph.supernodes
        left = {name: tuple(n for n in nodes if n in here) for name, nodes in groups.items()}
        self._change(pinned, left)

    def group(self, name: str, members: Sequence[str]) -> None:
        """Group pinned nodes, which leave the groups they were in.

        Raises InputError for no name, no nodes, or nodes that are not pinned.
        """
        if not members:
            raise InputError("wants a node at least", where="supernodes", given=name[:60])
        left = {
            other: tuple(n for n in nodes if n not in members)
            for other, nodes in self.subgraph.supernodes.items()
            if other != name
        }
        self._change(self.subgraph.pinned, {**left, name: tuple(members)})

    def ungroup(self, name: str) -> None:
        """Take a group apart; its nodes stay pinned."""
        groups = self.subgraph.supernodes
        left = {other: nodes for other, nodes in groups.items() if other != name}
        self._change(self.subgraph.pinned, left)

    def _change(self, pinned: Sequence[str], groups: Mapping[str, tuple[str, ...]]) -> None:
        full = {name: nodes for name, nodes in groups.items() if nodes}
        self.subgraph = Subgraph(pinned=tuple(dict.fromkeys(pinned)), supernodes=full)
        self.saved = ""

    def open(self, whole: Graph, file: Path, name: str) -> None:
        """Take a subgraph that is saved beside the graph's file.

        Raises ArtefactError or InputError, and changes nothing, where it cannot be.
        """
        found = load_subgraph(file, name)
        found.check(whole)
        self.subgraph, self.saved = found, name

    def parameters(self) -> dict[str, str | None]:
        """What the address says of it: the saved subgraph's name, or all that is pinned."""
        own = as_dict(self.subgraph)
        groups = own["supernodes"]
        return {
            "node": self.selected,
            "subgraph": self.saved or None,
            "pinned": None if self.saved else ",".join(own["pinned"]),
            "supernodes": json.dumps(groups, ensure_ascii=False)
            if groups and not self.saved
            else None,
        }


def chosen_of(whole: Graph, name: str) -> tuple[Chosen, bool]:
    """What is chosen of the graph of this name, and whether it is new: nothing was.

    Nodes that a graph does not have any more, written anew, are forgotten.
    """
    before: Chosen | None = st.session_state.get(_STATE)
    new = before is None or before.graph != name
    found = Chosen(name) if before is None or new else before
    st.session_state[_STATE] = found
    known = set(whole.ids)
    if found.selected not in known:
        found.selected = None
    found.pin([node for node in found.subgraph.pinned if node in known])
    return found, new


def take(chosen: Chosen, whole: Graph, file: Path, arrived: Mapping[str, str]) -> list[str]:
    """Take over what an address says; the names of its parameters that make no sense."""
    wrong = []
    try:
        if saved := arrived.get("subgraph"):
            chosen.open(whole, file, saved)
    except SaescopeError:
        wrong.append("subgraph")
    if "pinned" in arrived or "supernodes" in arrived:
        try:
            found = _linked(arrived)
            found.check(whole)
            chosen.subgraph, chosen.saved = found, ""
        except SaescopeError:
            wrong += [name for name in ("pinned", "supernodes") if name in arrived]
    if node := arrived.get("node"):
        known = node in set(whole.ids)
        chosen.selected = node if known else None
        wrong += [] if known else ["node"]
    return wrong


def _linked(arrived: Mapping[str, str]) -> Subgraph:
    """What an address says is pinned and grouped."""
    pinned = [name for name in arrived.get("pinned", "").split(",") if name]
    try:
        groups = json.loads(arrived.get("supernodes") or "{}")
    except (ValueError, RecursionError):
        groups = None
    return from_dict({"pinned": pinned, "supernodes": groups}, where="address")
