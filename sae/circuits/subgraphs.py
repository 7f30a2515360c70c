"""Subgraphs: nodes of a graph that somebody pinned and grouped, their sums, scores and files.

A supernode is a group of nodes under one name, as in Ameisen et al. 2025, "Circuit Tracing". A file
of a subgraph, GRAPH.NAME.subgraph.json, lies beside its graph's and names nodes alone.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

from sae.circuits.graph import EMBEDDING, FEATURE, LOGIT, Graph
from sae.circuits.pruning import influence, normalised
from saescope.artefact import ArtefactError, check_schema, read_json, write_report
from saescope.errors import InputError
from saescope.paths import local
from saescope.replacing import Kind

GRAPHS_FOLDER = "graphs"
"""the folder, beside those of runs and stores, where the explorer looks for graphs"""
SCHEMA = 1
_ARTEFACT, _ENDING = "circuit subgraph", ".subgraph.json"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,59}")
_LONGEST = 200


@dataclass(frozen=True, kw_only=True)
class Subgraph:
    """What is pinned of a graph, by names of nodes (`Graph.ids`), and how it is grouped."""

    pinned: tuple[str, ...] = ()
    supernodes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """groups of pinned nodes, by what they are called; a node is in no more than one"""

    def __post_init__(self) -> None:
        if len(set(self.pinned)) != len(self.pinned):
            raise InputError("a node is pinned twice", where="pinned", given=self.pinned)
        grouped = [node for nodes in self.supernodes.values() for node in nodes]
        if len(set(grouped)) != len(grouped):
            raise InputError("a node is in two supernodes", where="supernodes", given=grouped)
        if loose := sorted(set(grouped) - set(self.pinned)):
            raise InputError("a node is grouped, but not pinned", where="supernodes", given=loose)
        for name, nodes in self.supernodes.items():
            if not (name.strip() and len(name) <= _LONGEST and nodes):
                raise InputError("wants a name and a node", where="supernodes", given=name[:60])

    def groups(self) -> dict[str, tuple[str, ...]]:
        """The supernodes, and every other pinned node as a group of its own, by its own name."""
        grouped = {node for nodes in self.supernodes.values() for node in nodes}
        own = {node: (node,) for node in self.pinned if node not in grouped}
        return {**self.supernodes, **own}

    def check(self, graph: Graph) -> None:
        """Raise InputError for nodes that the graph does not have."""
        for node in self.pinned:
            graph.index(node)


def summed(graph: Graph, groups: Mapping[str, Sequence[str]]) -> NDArray[np.float32]:
    """[target, source]: the edges from the nodes of one group to those of another, summed.

    Groups are in the order given. Edges within one group are not counted: the diagonal is 0.

    Raises InputError for nodes that the graph does not have.
    """
    member = np.zeros((len(groups), len(graph)), np.float32)
    for row, nodes in enumerate(groups.values()):
        member[row, [graph.index(node) for node in nodes]] = 1
    found = member @ graph.adjacency @ member.T
    np.fill_diagonal(found, 0)
    return found


@dataclass(frozen=True)
class Scores:
    """How much of a graph is explained by some of its features (see `sae.circuits.pruning`)."""

    replacement: float
    completeness: float


class KeptScores:
    """The scores of a graph of which only some features are kept, the others counted as errors.

    With every feature kept they are those of the graph. The graph's edges are normalised once.

    >>> KeptScores(graph).of(keep).replacement                            # doctest: +SKIP
    0.42
    """

    def __init__(self, graph: Graph) -> None:
        self._kind, self._weight = graph.kind, graph.weight
        self._shares = normalised(graph.adjacency)

    def of(self, keep: Bool[np.ndarray, " nodes"]) -> Scores:
        """NaN for both where nothing reaches the outputs.

        Args: keep is a mask of nodes; tokens and outputs are kept whatever it says.
        """
        kept = (keep & (self._kind == FEATURE)) | np.isin(self._kind, (EMBEDDING, LOGIT))
        inner = self._shares[np.ix_(kept, kept)]
        through = influence(inner, self._weight[kept]) + self._weight[kept]
        rows = self._shares[kept]
        reached = through @ rows  # of all nodes, along walks whose other nodes are kept
        tokens, rest = reached[self._kind == EMBEDDING].sum(), reached[~kept].sum()
        total = through.sum() + rest
        return Scores(
            float(tokens / (tokens + rest)) if tokens + rest else float("nan"),
            float(1 - (rows[:, ~kept].sum(1) * through).sum() / total)
            if tokens + rest
            else float("nan"),
        )

    def of_random(
        self, keep: Bool[np.ndarray, " nodes"], draws: int = 5, seed: int = 0
    ) -> list[Scores]:
        """The scores of as many features drawn at random, so many times."""
        features = np.flatnonzero(self._kind == FEATURE)
        count = int(np.sum(keep[features]))
        generator, found = np.random.default_rng(seed), []
        for _ in range(draws):
            drawn = np.zeros(len(self._kind), bool)
            drawn[generator.choice(features, count, replace=False)] = True
            found.append(self.of(drawn))
        return found


# ---- files --------------------------------------------------------------------------------------


def subgraph_file(graph_file: str | Path, name: str) -> Path:
    """Where a subgraph of a graph is kept. Raises InputError for a name that cannot be a file's."""
    if not _NAME.fullmatch(name):
        raise InputError(
            "is part of a file's name and of an address",
            where="subgraph",
            given=name[:_LONGEST],
            allowed="up to 60 of a-z, 0-9, - and _, not beginning with - or _",
        )
    path = local(str(graph_file))
    return path.with_name(f"{path.name}.{name}{_ENDING}")


def save_subgraph(
    subgraph: Subgraph, graph_file: str | Path, name: str, *, replace: bool = False
) -> Path:
    """Write a subgraph beside its graph's file.

    Args: replace allows another subgraph of this name to be replaced.

    Raises InputError for a name that cannot be a file's, or where something is that may not be
    replaced.
    """
    path = subgraph_file(graph_file, name)
    value = {"artefact": _ARTEFACT, "schema": SCHEMA, "graph": Path(graph_file).name}
    write_report(path, {**value, **as_dict(subgraph)}, _SUBGRAPH_FILE, replace=replace)
    return path


def load_subgraph(graph_file: str | Path, name: str) -> Subgraph:
    """Read what `save_subgraph` wrote.

    Raises ArtefactError for a file that is missing or something else, InputError for a name that
    cannot be a file's. Whether the graph has its nodes is for `Subgraph.check` to say.
    """
    path = subgraph_file(graph_file, name)
    found = read_json(path)
    if not _is_subgraph(found):
        raise ArtefactError("is no subgraph of saescope", where=str(path))
    check_schema(found.get("schema"), supported=SCHEMA, where=str(path))
    return from_dict(found, where=str(path))


def saved_subgraphs(graph_file: str | Path) -> list[str]:
    """The names of the subgraphs that are beside a graph's file, in order."""
    path = local(str(graph_file))
    start = f"{path.name}."
    names = (file.name for file in _files(path.parent) if file.name.startswith(start))
    found = (name[len(start) : -len(_ENDING)] for name in names if name.endswith(_ENDING))
    return sorted(name for name in found if _NAME.fullmatch(name))


def is_subgraph_file(path: Path) -> bool:
    """Whether a file's name is that of a subgraph."""
    return path.name.endswith(_ENDING)


def as_dict(subgraph: Subgraph) -> dict[str, Any]:
    """A subgraph as plain lists and texts."""
    groups = {name: list(nodes) for name, nodes in subgraph.supernodes.items()}
    return {"pinned": list(subgraph.pinned), "supernodes": groups}


def from_dict(found: Any, *, where: str = "subgraph") -> Subgraph:
    """A subgraph from what `as_dict` made of one.

    Raises ArtefactError for anything else.
    """
    pinned = found.get("pinned") if isinstance(found, Mapping) else None
    groups = found.get("supernodes") if isinstance(found, Mapping) else None
    if not (
        _are_texts(pinned) and isinstance(groups, Mapping) and all(map(_are_texts, groups.values()))
    ):
        raise ArtefactError("is no list of nodes and table of supernodes", where=where)
    supernodes = {str(name): tuple(nodes) for name, nodes in groups.items()}
    try:
        return Subgraph(pinned=tuple(pinned), supernodes=supernodes)
    except InputError as error:
        raise ArtefactError(str(error), where=where) from error


def _are_texts(found: Any) -> TypeGuard[list[str]]:
    return isinstance(found, list) and all(isinstance(each, str) for each in found)


def _is_subgraph(found: Any) -> bool:
    return isinstance(found, Mapping) and found.get("artefact") == _ARTEFACT


def _files(folder: Path) -> Iterator[Path]:
    try:
        yield from (file for file in folder.iterdir() if file.is_file())
    except OSError:
        return


_SUBGRAPH_FILE = Kind("a subgraph", lambda path: _is_subgraph(read_json(path)))
