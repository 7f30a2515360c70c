"""Import activations that were computed elsewhere into a store, the same on disk as a harvest.

Rows keep their order. Each is a position; `context` positions in a row make a sequence, and a
document (or, where none are named, a sequence) is wholly trained on or wholly held out. Rows are
looked at once before anything is written, which gives the hash that the manifest names them by,
and once more, a window at a time, when they are written.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from activations.harvesting.plan import fitting_chunks
from activations.storage.arrays import Rows, as_rows
from activations.storage.files import holds_another
from activations.storage.layout import SPLITS
from activations.storage.reader import ActivationStore
from activations.storage.row_formats import SiteRows, StorageKind
from activations.storage.row_layout import RowLayout
from activations.storage.window_data import WindowData
from activations.storage.writer import HarvestWriter
from saescope.artefact import MANIFEST, remove_leftovers
from saescope.errors import InputError, check_range
from saescope.integers import as_index
from saescope.locks import locked
from saescope.paths import AnyPath, as_path, exists
from saescope.progress import Progress, say

NO_MODEL = "none"
"""the kind of a store's model where nobody knows it"""
_READ = 16384


def bring(
    path: str | Path | AnyPath,
    arrays: Mapping[str, Any],
    *,
    tokens: Any = None,
    documents: Any = None,
    keep: Any = None,
    model: str | None = None,
    context: int | None = None,
    held_out_fraction: float = 0.05,
    storage: StorageKind | None = None,
    chunk_rows: int = 16384,
    window_chunks: int = 8,
    seed: int = 0,
) -> ActivationStore:
    """See `ActivationStore.from_arrays`; arrays may be files' rows (`row_files`), too."""
    check_range("held_out_fraction", held_out_fraction, low=0, below=1)
    sites = _sites(arrays)
    rows = len(next(iter(sites.values())))
    layout = RowLayout(
        rows,
        tokens,
        documents,
        keep,
        context,
        fraction=held_out_fraction,
        seed=as_index(seed, where="seed", low=0),
    )
    if model is not None and not layout.has_sequences:
        raise InputError(
            "is of use only with its sequences: tokens [sequence, position]",
            where="model",
            given=model,
        )
    facts = _facts(
        sites,
        layout,
        model=model,
        storage=_storage(sites, storage),
        seed=seed,
        chunk_rows=as_index(chunk_rows, where="chunk_rows", low=1),
        window_chunks=as_index(window_chunks, where="window_chunks", low=1),
    )
    out = as_path(str(path) if isinstance(path, Path) else path)
    with locked(out, "harvest"):
        store = _existing(out, facts)
        if store is not None and store.complete:
            say(f"{out}: complete already, {store.n_rows():,} rows")
            return store
        if store is None:
            remove_leftovers(out)
            writer = HarvestWriter.create(out, facts)
        else:
            writer = HarvestWriter(store)
            writer.trim()
        return _written(sites, layout, writer)


def _sites(arrays: Mapping[str, Any]) -> dict[str, Rows]:
    """The rows of each site, checked but for their numbers."""
    if not isinstance(arrays, Mapping) or not arrays:
        raise InputError(
            "needs the rows of one site or more",
            where="arrays",
            given=type(arrays).__name__,
            allowed='{"blocks.9.hook_resid_post": array [rows, d_in]}',
        )
    found: dict[str, Rows] = {}
    for name, values in arrays.items():
        if not isinstance(name, str) or not name or name.strip() != name or "/" in name:
            raise InputError("is no name of a site", where="arrays", given=name)
        found[name] = values if isinstance(values, Rows) else as_rows(values, where=name)
        found[name].check()
    rows = {name: len(each) for name, each in found.items()}
    if len(set(rows.values())) > 1:
        raise InputError("sites have the same rows", where="arrays", given=rows)
    return found


def _storage(sites: Mapping[str, Rows], asked: StorageKind | None) -> StorageKind:
    """How rows are stored: so that every digit is kept, if nothing else is asked for."""
    if asked is not None and asked not in ("bfloat16", "float32", "int8"):
        raise InputError(
            "no storage of rows that are brought",
            where="storage",
            given=asked,
            allowed="bfloat16, float32, int8",
        )
    exact = all(each.dtype == "bfloat16" for each in sites.values())
    return asked or ("bfloat16" if exact else "float32")


def _facts(
    sites: Mapping[str, Rows],
    layout: RowLayout,
    *,
    model: str | None,
    storage: StorageKind,
    seed: int,
    chunk_rows: int,
    window_chunks: int,
) -> dict[str, Any]:
    """What the manifest says from the start; every number of every row is looked at here."""
    widths = {name: each.d_in for name, each in sites.items()}
    window_chunks = fitting_chunks(window_chunks, chunk_rows, widths, storage)
    sequences = window_chunks * chunk_rows // layout.context
    if sequences == 0:
        raise InputError(
            "a window holds less than one sequence",
            where="chunk_rows",
            given=chunk_rows,
            allowed=f"at least {-(-layout.context // window_chunks)}",
        )
    with Progress("reading the rows", len(sites), "site(s)") as progress:
        brought = {}
        for name, each in sites.items():
            brought[name] = {"from": each.where, **each.facts()}
            progress.advance(1)
    identity = {name: {**each, "from": None} for name, each in brought.items()}
    return {
        "config": {
            "context": layout.context,
            "storage": storage,
            "rows": "position",
            "corpus": None,
            "brought": {**identity, **layout.facts()},
            "held_out_fraction": layout.fraction,
            "chunk_rows": chunk_rows,
            "window_chunks": window_chunks,
            "seed": seed,
        },
        "model": {
            "name": model,
            "kind": NO_MODEL if model is None else "language",
            "spec": model,
            "revision": None,
            "weights_hash": None,
            "tokenizer_hash": None,
            "dtype": "float32",
            "d_vocab": layout.d_vocab,
        },
        "brought": {name: each["from"] for name, each in brought.items()},
        "sites": widths,
        "rows_per_sequence": layout.context,
        "chunk_rows": chunk_rows,
        "window_chunks": window_chunks,
        "sequences_per_window": sequences,
        "planned_sequences": {split: layout.sequences(split) for split in SPLITS},
    }


def _existing(out: AnyPath, facts: Mapping[str, Any]) -> ActivationStore | None:
    """The store that is there, if any; it must be of these rows, stored in this way."""
    if not exists(out / MANIFEST):
        if holds_another(out):
            raise InputError("exists and holds no harvest; choose another folder", where=str(out))
        return None
    store = ActivationStore.open(out)
    for name in ("config", "model", "sites"):
        if store.manifest[name] != facts[name]:
            raise InputError(
                f"holds a harvest of other rows or settings ({name} differs); choose another "
                "folder, or remove it",
                where=str(out),
            )
    return store


def _written(
    sites: Mapping[str, Rows], layout: RowLayout, writer: HarvestWriter
) -> ActivationStore:
    """Write the windows that are missing, and mark the store as complete."""
    store = writer.store
    done = sum(window.rows for window in store.windows)
    with Progress("storing rows", layout.rows, "rows", done=done) as progress:
        for split in SPLITS:
            start = store.manifest.get("places", {}).get(split, {}).get("row", 0)
            number = sum(window.split == split for window in store.windows)
            while len(rows := layout.following(split, start, _per_window(store))):
                start = int(rows[-1]) + 1
                writer.write(_window(sites, layout, writer.store, split, rows, number))
                number += 1
                progress.advance(len(rows))
    counts = {split: {"rows": writer.store.n_rows(split)} for split in SPLITS}
    writer.finish(counts)
    store = writer.store
    say(f"{store.path}: {store.n_rows():,} rows of {len(store.sites)} site(s)")
    return store


def _per_window(store: ActivationStore) -> int:
    return int(store.manifest["sequences_per_window"]) * store.context


def _window(
    sites: Mapping[str, Rows],
    layout: RowLayout,
    store: ActivationStore,
    split: str,
    rows: NDArray[np.int64],
    number: int,
) -> WindowData:
    """The window of these rows, the split's `number`-th."""
    shape = (-(-len(rows) // layout.context), layout.context)

    def spread(values: Any, fill: Any, dtype: Any) -> NDArray[Any]:
        whole = np.full(shape, fill, dtype)
        whole.reshape(-1)[: len(rows)] = values
        return whole

    kept = layout.kept(rows)
    keep = spread(kept, False, np.bool_)
    seed = (store.manifest["config"]["seed"], SPLITS.index(split), number)
    found = {name: _site_rows(name, each, rows[kept], store) for name, each in sites.items()}
    return WindowData(
        split=split,
        tokens=spread(0 if layout.tokens is None else layout.tokens[rows], 0, np.int32),
        document=spread(layout.document(rows), -1, np.int32),
        keep=keep,
        described=layout.described(rows),
        row_token=store.n_tokens + np.flatnonzero(keep),
        rows={name: values for each in found.values() for name, values in each.arrays.items()},
        order=np.random.default_rng(seed).permutation(int(kept.sum())),
        sums={name: each.sums() for name, each in found.items()} if split == SPLITS[0] else {},
        positions={"kept": int(kept.sum()), "left out": int((~kept).sum())},
        cursor={"row": int(rows[-1]) + 1},
    )


def _site_rows(
    name: str, source: Rows, rows: NDArray[np.int64], store: ActivationStore
) -> SiteRows:
    """A site's rows by their ascending numbers, read by parts."""
    found = SiteRows(name, len(rows), source.d_in, store.storage)
    while len(rows):
        first = int(rows[0])
        here = int(np.searchsorted(rows, first + _READ))
        part = source.read(first, int(rows[here - 1]) + 1)
        found.append(part[torch.from_numpy(rows[:here] - first)].cpu())
        rows = rows[here:]
    return found
