"""Attribution graphs in files: .npz (arrays, small and fast) or .json (readable by anything)."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sae.circuits.graph import NODE_ARRAYS, Graph
from saescope.artefact import ArtefactError, atomic_path, check_schema, read_json, write_report
from saescope.errors import InputError
from saescope.paths import local
from saescope.replacing import Kind
from saescope.system import system_errors

SCHEMA = 1
_ARTEFACT = "circuit"
_SUFFIXES = (".npz", ".json")
_FIELDS = (
    "prompt",
    "token_ids",
    "tokens",
    "model",
    "n_layers",
    "sites",
    "saes",
    "method",
    "labels",
    "facts",
)
"""the fields of a graph that are no arrays"""
_EDGES = ("target", "source", "edge")


def save(graph: Graph, path: str | Path, *, replace: bool = False) -> Path:
    """Write a graph to a file that ends in .npz or .json; edges that are 0 are not written.

    Args: replace allows another graph's file to be replaced; nothing else ever is.

    Raises InputError for another ending, or where something is that may not be replaced.

    >>> save(prune(graph), "circuit.npz")                               # doctest: +SKIP
    """
    target = checked_path(path)
    if target.suffix == ".json":
        write_report(target, to_dict(graph), GRAPH_FILE, replace=replace)
        return target
    arrays: dict[str, Any] = {name: getattr(graph, name) for name in NODE_ARRAYS}
    rows, columns, weights = graph.edges()
    arrays |= {"target": rows.astype(np.int32), "source": columns.astype(np.int32), "edge": weights}
    arrays["head"] = np.array(json.dumps(_head(graph), ensure_ascii=False))
    with (
        system_errors(target),
        atomic_path(target, GRAPH_FILE, replace=replace) as temporary,
        temporary.open("wb") as stream,
    ):
        np.savez_compressed(stream, **arrays)
    return target


def load(path: str | Path) -> Graph:
    """Read a graph that `save` wrote.

    Raises InputError for another ending, ArtefactError for a file that is missing, damaged, or of
    a newer saescope.
    """
    target = checked_path(path)
    if target.suffix == ".json":
        return from_dict(read_json(target), where=str(target))
    try:
        with (
            system_errors(target),
            target.open("rb") as stream,
            np.load(stream, allow_pickle=False) as found,
        ):
            arrays = {name: found[name] for name in found.files}
        head = json.loads(str(arrays.pop("head")))
    except (ValueError, KeyError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        raise ArtefactError(f"is no graph that can be read: {error}", where=str(target)) from error
    return from_dict({**head, **arrays}, where=str(target))


def to_dict(graph: Graph) -> dict[str, Any]:
    """A graph as plain lists, numbers and texts, as its .json file holds it."""
    arrays = {name: getattr(graph, name) for name in NODE_ARRAYS}
    arrays |= dict(zip(_EDGES, graph.edges(), strict=True))
    return {**_head(graph), **{name: array.tolist() for name, array in arrays.items()}}


def from_dict(found: Any, *, where: str = "graph") -> Graph:
    """A graph from what `to_dict` made of one. Raises ArtefactError for anything else."""
    if not isinstance(found, Mapping) or found.get("artefact") != _ARTEFACT:
        raise ArtefactError("is no graph of saescope", where=where)
    check_schema(found.get("schema"), supported=SCHEMA, where=where)
    missing = [name for name in (*_FIELDS, *NODE_ARRAYS, *_EDGES) if name not in found]
    if missing:
        raise ArtefactError("lacks what a graph has", where=where, given=missing)
    try:
        arrays: dict[str, Any] = {
            name: np.asarray(found[name], dtype) for name, dtype in NODE_ARRAYS.items()
        }
        count = arrays["kind"].size
        adjacency = np.zeros((count, count), np.float32)
        ends = [np.asarray(found[name], np.int64) for name in ("target", "source")]
        if any(each.size and each.min() < 0 for each in ends):
            raise ValueError("an edge without an end")
        adjacency[ends[0], ends[1]] = np.asarray(found["edge"], np.float32)
        return Graph(**{name: found[name] for name in _FIELDS}, **arrays, adjacency=adjacency)
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        raise ArtefactError(f"is no graph that can be read: {error}", where=where) from error


def checked_path(path: str | Path) -> Path:
    """A graph's file. Raises InputError for another ending than .npz and .json."""
    target = local(str(path))
    if target.suffix not in _SUFFIXES:
        raise InputError(
            "a graph's file ends in .npz or .json",
            where="path",
            given=str(path),
            allowed=", ".join(_SUFFIXES),
        )
    return target


def _head(graph: Graph) -> dict[str, Any]:
    fields = {name: getattr(graph, name) for name in _FIELDS}
    return {"artefact": _ARTEFACT, "schema": SCHEMA, **fields}


def _is_graph(path: Path) -> bool:
    if path.suffix == ".json":
        found = read_json(path)
        return isinstance(found, dict) and found.get("artefact") == _ARTEFACT
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as found:
            return bool(json.loads(str(found["head"]))["artefact"] == _ARTEFACT)
    except (ValueError, KeyError, TypeError, zipfile.BadZipFile, EOFError):
        return False


GRAPH_FILE = Kind("a graph", _is_graph)
