"""Join harvests of the same text through several models into one store of all their sites.

The same text is tokens, kept positions and order of rows that are equal to the byte, which the
checksums in the harvests' ledgers tell at once. The files of the joined store are hard links to
theirs (copies, on another file system), so that it takes no disk, and either may be removed.
"""

import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from activations.storage.chunk_files import chunk_path
from activations.storage.files import lengths
from activations.storage.layout import (
    DOCUMENTS,
    GROUP,
    METADATA,
    ROW_TOKEN,
    SEQUENCE_ARRAYS,
    create_arrays,
    described_arrays,
    documents_part,
    with_length,
)
from activations.storage.ledger import LEDGER, Checksums, Ledger, window_line
from activations.storage.reader import KIND, SCHEMA, ActivationStore
from saescope.artefact import atomic_path, write_json, write_manifest
from saescope.errors import InputError
from saescope.paths import local
from saescope.progress import say
from saescope.replacing import check_apart, check_replaceable
from saescope.system import system_errors

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_OF_ONE = ("kind", "schema", "created", "versions", "commit", "parent", "sha256", "ledger")
"""what each manifest says of itself alone"""
_WHAT_DIFFERS = {
    "tokens": "their tokens differ: harvest the same corpus with the same tokenizer, as much "
    "of it, and in the same sequences",
    "document": "their documents differ",
    "keep": "they keep other positions: harvest with the same row selection (outliers, special "
    "tokens)",
    "split": "other documents are held out: harvest with the same held_out_fraction",
    ROW_TOKEN: "their rows are in another order: harvest with the same seed, chunk_rows and "
    "window_chunks",
}


def join(out: str | Path, harvests: Mapping[str, str | Path]) -> ActivationStore:
    """Join finished harvests, by the names that their sites are to begin with.

    Site S of the harvest named N is N:S in the joined store, which crosscoders read.

    Raises InputError if a harvest is not finished, stores no rows or is not on this machine, if
    tokens, kept positions or the order of rows differ, or if something else is at `out`;
    ArtefactError if one is damaged or the disk is full.
    """
    folder = local(str(out))
    stores = {name: ActivationStore.open(local(str(path))) for name, path in harvests.items()}
    check_names(list(stores))
    check_replaceable(folder, None, replace=False)
    for store in stores.values():
        _check_usable(store)
        check_apart(folder, Path(str(store.path)))
    first, *others = stores.values()
    for other in others:
        _check_alike(first, other)
    facts = _facts(stores)
    with system_errors(str(folder)), atomic_path(folder) as temporary:
        temporary.mkdir()
        create_arrays(temporary / GROUP, facts)
        facts["arrays"] = described_arrays(temporary / GROUP, facts)
        _link_all(temporary, stores)
        for name, length in _lengths(stores).items():
            described = with_length(facts["arrays"][name], length)
            write_json(temporary / GROUP / name / METADATA, described)
        write_manifest(
            temporary,
            kind=KIND,
            schema=SCHEMA,
            parent=None,
            sealed=True,
            ledger=_ledger(temporary, stores).committed,
            **facts,
        )
    joined = ActivationStore.open(folder)
    say(f"{folder}: {joined.n_rows():,} rows at {', '.join(joined.sites)}")
    return joined


def check_names(names: list[str]) -> None:
    """Raise InputError unless there are two names or more, each once, of letters and digits."""
    fine = all(_NAME.fullmatch(name) for name in names)
    if len(names) < 2 or not fine or len(set(names)) < len(names):
        raise InputError(
            "needs a name for each of two harvests or more, no two alike",
            where="names",
            given=names,
            allowed="letters, digits and . _ -",
        )


def _check_usable(store: ActivationStore) -> None:
    where = str(store.path)
    if not isinstance(store.path, Path):
        raise InputError("is joined on the machine that it is on; bring it here", where=where)
    if not store.complete:
        raise InputError("this harvest is not finished; run `saescope harvest` again", where=where)
    if store.storage == "none":
        raise InputError("stores no rows to join", where=where, given="storage none")
    if not store.ledger.knows_checksums:
        raise InputError(
            "is of an older version, without the checksums that say whether two harvests are of "
            "the same text; `saescope doctor --repair` adds them",
            where=where,
        )


def _check_alike(one: ActivationStore, other: ActivationStore) -> None:
    """Raise InputError, which says what differs, unless two harvests' rows are of the same tokens
    in the same order."""
    where = str(other.path)
    hashes = [store.manifest["model"].get("tokenizer_hash") for store in (one, other)]
    if all(hashes) and hashes[0] != hashes[1]:
        raise InputError(
            f"its tokenizer is not that of {one.path}", where=where, given=str(hashes[1])[:12]
        )
    for name, given in (
        ("context", [store.context for store in (one, other)]),
        ("storage", [store.storage for store in (one, other)]),
        ("rows", [store.manifest["config"].get("rows") for store in (one, other)]),
        ("chunk_rows", [store.manifest["chunk_rows"] for store in (one, other)]),
    ):
        if given[0] != given[1]:
            what = f"cannot be joined with {one.path}: {name} differs"
            raise InputError(what, where=where, given=given[1], allowed=str(given[0]))
    differing = _differing(one, other)
    if differing is not None:
        raise InputError(
            f"cannot be joined with {one.path}: {_WHAT_DIFFERS[differing]}", where=where
        )


def _differing(one: ActivationStore, other: ActivationStore) -> str | None:
    """The first array in which two stores differ, by their checksums; None if none does."""
    per_window = int(one.manifest["sequences_per_window"])
    if per_window != int(other.manifest["sequences_per_window"]):
        return ROW_TOKEN
    if [w.sequences for w in one.windows] != [w.sequences for w in other.windows]:
        return "tokens"
    for number, window in enumerate(one.windows):
        for array in ("tokens", "document", "split", "keep"):
            for piece in window.pieces(per_window):
                found = (s.ledger.sequences_crc(array, number, piece) for s in (one, other))
                if len(set(found)) > 1:
                    return array
        for chunk in window.chunks(int(one.manifest["chunk_rows"])):
            found = (store.ledger.rows_crc(ROW_TOKEN, chunk.index) for store in (one, other))
            if len(set(found)) > 1:
                return ROW_TOKEN
    return None


def _facts(stores: Mapping[str, ActivationStore]) -> dict[str, Any]:
    """What the joined manifest says: of the text what the first does, of the sites what each."""
    first = next(iter(stores.values())).manifest
    kept = {key: value for key, value in first.items() if key not in _OF_ONE}
    sites = {f"{n}:{site}": w for n, s in stores.items() for site, w in s.manifest["sites"].items()}
    sums = {f"{n}:{site}": w for n, s in stores.items() for site, w in s.manifest["sums"].items()}
    hashes = {name: store.hash for name, store in stores.items()}
    config = {**first["config"], "sites": list(sites), "brought": {"joined": hashes}}
    return {
        **kept,
        "config": config,
        "sites": sites,
        "sums": sums,
        "brought": {name: str(store.path) for name, store in stores.items()},
        "joined": {
            name: {"harvest_hash": store.hash, "model": store.manifest["model"]}
            for name, store in stores.items()
        },
    }


def _arrays(stores: Mapping[str, ActivationStore]) -> dict[str, tuple[ActivationStore, str, int]]:
    """Of each array of rows: the store that it is from, its name there, and its dimensions."""
    first = next(iter(stores.values()))
    found = {ROW_TOKEN: (first, ROW_TOKEN, 1)}
    for name, store in stores.items():
        for site in store.sites:
            for array, described in store.arrays_of(site).items():
                found[f"{name}:{array}"] = (store, array, 1 + len(described.tail))
    return found


def _lengths(stores: Mapping[str, ActivationStore]) -> dict[str, int]:
    first = lengths(next(iter(stores.values())))
    rows = dict.fromkeys(_arrays(stores), first[ROW_TOKEN])
    return {**rows, **{name: first[name] for name in SEQUENCE_ARRAYS}}


def _link_all(folder: Path, stores: Mapping[str, ActivationStore]) -> None:
    """Put every chunk and list of documents into the folder of the joined store."""
    first = next(iter(stores.values()))
    count = lengths(first)[ROW_TOKEN] // int(first.manifest["chunk_rows"])
    for name, (store, array, ndim) in _arrays(stores).items():
        for chunk in range(count):
            source = chunk_path(store.path / GROUP, array, chunk, ndim)
            _link(source, chunk_path(folder / GROUP, name, chunk, ndim))
    for name in SEQUENCE_ARRAYS:
        ndim = 1 if name == "split" else 2
        for chunk in range(-(-first.n_sequences // int(first.manifest["sequences_per_window"]))):
            source = first.sequence_chunk_path(name, chunk)
            _link(source, chunk_path(folder / GROUP, name, chunk, ndim))
    for number in range(len(first.windows)):
        part = documents_part(number)
        _link(first.path / DOCUMENTS / part, folder / DOCUMENTS / part)


def _link(source: Any, target: Any) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):  # another file system, or one without links
        os.link(source, target)
        return
    shutil.copyfile(source, target)


def _ledger(folder: Path, stores: Mapping[str, ActivationStore]) -> Ledger:
    first = next(iter(stores.values()))
    per_window, ledger = int(first.manifest["sequences_per_window"]), Ledger()
    (folder / LEDGER).touch()
    for number, window in enumerate(first.windows):
        chunks = window.chunks(int(first.manifest["chunk_rows"]))
        rows = {
            name: [_known(store.ledger.rows_crc(array, chunk.index)) for chunk in chunks]
            for name, (store, array, _) in _arrays(stores).items()
        }
        sequences = {
            array: [
                _known(first.ledger.sequences_crc(array, number, piece))
                for piece in window.pieces(per_window)
            ]
            for array in SEQUENCE_ARRAYS
        }
        documents = _known(first.ledger.documents_crc(number))
        ledger.append(folder, window_line(window, Checksums(rows, sequences, documents)))
    return ledger


def _known(crc: int | None) -> int:
    assert crc is not None, "checked by _check_usable"
    return crc
