"""Finding the stores to explore, and deciding which models and SAEs may be loaded for them.

Needs neither Streamlit nor torch, so that the command line answers at once.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from saescope.artefact import MANIFEST
from saescope.errors import ArtefactError
from saescope.paths import AnyPath, as_path, subfolders
from store.database import STORE_FILE
from store.parquet.layout import is_parquet_store

if TYPE_CHECKING:
    from upath import UPath

STORES_VARIABLE = "SAESCOPE_STORE"
PLACE_VARIABLE = STORES_VARIABLE  # as it was called until 0.1
NAMED_VARIABLE = "SAESCOPE_NAMED"
_OPTIONS = {"model": "--model", "sae": "--sae"}


def find_stores(path: str | AnyPath) -> Mapping[str, AnyPath]:
    """Stores by name, at a store's file, in its folder, or in a folder of stores.

    A store in Parquet is a folder, or a URL, and its file is the manifest there.
    Raises ArtefactError if there is none.
    """
    given = as_path(path)
    if not isinstance(given, Path):
        return _remote_stores(given)
    root = given.resolve()
    if root.is_file():
        return {root.parent.name if root.name in (STORE_FILE, MANIFEST) else root.stem: root}
    if (file := _file_in(root)) is not None:
        return {root.name: file}
    folders = sorted(root.iterdir()) if root.is_dir() else []
    found = {folder.name: file for folder in folders if (file := _file_in(folder)) is not None}
    if not found:
        raise ArtefactError(
            "no feature store here; `saescope index RUN --out FOLDER` makes one", where=str(path)
        )
    return found


def _file_in(folder: Path) -> Path | None:
    """The file of the store that a folder is, or has in it; None if it is none."""
    if (folder / STORE_FILE).is_file():
        return folder / STORE_FILE
    return folder / MANIFEST if is_parquet_store(folder) else None


def _remote_stores(root: "UPath") -> Mapping[str, AnyPath]:
    if root.name == MANIFEST:
        return {root.parent.name: root}
    if is_parquet_store(root):
        return {root.name: root / MANIFEST}
    found = {
        folder.name: folder / MANIFEST for folder in subfolders(root) if is_parquet_store(folder)
    }
    if not found:
        raise ArtefactError(
            "no feature store here; `saescope export STORE --format parquet-store` makes one",
            where=str(root),
        )
    return found


def stores() -> Mapping[str, AnyPath]:
    """The stores this explorer was started on."""
    return find_stores(os.environ.get(STORES_VARIABLE, "stores"))


def beside_stores() -> Path:
    """The folder that the one of the stores is in; runs and models are expected there.

    Of an explorer on one store, PROJECT/stores/NAME or a file in it, it is PROJECT too. Of stores
    in an object store it is the root, beside which nothing is taken to be.
    """
    given = as_path(os.environ.get(STORES_VARIABLE, "stores"))
    if not isinstance(given, Path):
        return Path("/")
    path = given.resolve()
    if path.is_file() and path.name in (STORE_FILE, MANIFEST):
        path = path.parent
    one = path.is_file() or _file_in(path) is not None
    # never everything there is, as for a store right below the root
    return path.parent.parent if one and _is_no_root(path.parent.parent) else path.parent


def absolute(name: str) -> str:
    """The absolute path of a folder that exists; other names, as of a hub, unchanged."""
    try:
        path = Path(name).expanduser()
        return str(path.resolve()) if path.exists() else name
    except (OSError, RuntimeError, ValueError):
        return name


def environment(path: str, *, model: tuple[str, ...], sae: tuple[str, ...]) -> dict[str, str]:
    """Environment variables that tell the explorer's process its stores, models and SAEs."""
    named = {"model": [absolute(m) for m in model], "sae": [absolute(s) for s in sae]}
    given = as_path(path)
    return {
        STORES_VARIABLE: str(given.resolve() if isinstance(given, Path) else given),
        NAMED_VARIABLE: json.dumps(named),
    }


def source_to_load(kind: str, own: str, store: str) -> str:
    """Where to load the "model" or the "sae" (`kind`) of a store from; the store says `own`.

    A store may come from a stranger, so the explorer loads `own` only if it is beside the stores,
    is one of saescope's packaged models, or was named by the person who started the explorer
    (--model, --sae). If it is none of these and one was named, that one is loaded instead; if none
    was, one that stands beside the stores as `own` stood where the store was made (`moved`).
    Outside of an explorer `own` is loaded.

    Raises ArtefactError, with the option that would allow it, for anything else.
    """
    named = json.loads(os.environ.get(NAMED_VARIABLE, "{}")).get(kind, [])
    if STORES_VARIABLE not in os.environ or absolute(own) in named or _is_beside(own):
        return own
    if kind == "model" and _is_packaged(own):
        return own
    if len(named) == 1:
        return named[0]
    if (now := moved(own)) is not None:
        return str(now)
    what = {"model": "model", "sae": "SAE"}[kind]
    raise ArtefactError(
        f"the {what} it names is not beside the stores, and nobody has named it: if it is to be "
        f"loaded, start the explorer with {_OPTIONS[kind]}",
        where=store,
        given=own[:200],
    )


def moved(own: str) -> Path | None:
    """Where a folder is now if it was moved, or copied, together with the stores; else None.

    It is looked for below the folder that the stores' folder is in, as PROJECT/runs/NAME for
    elsewhere/runs/NAME. Whether it is the same is for others to check, by its hash.
    """
    parts = Path(own).parts[1:]
    if not Path(own).is_absolute() or ".." in parts:
        return None
    for first in range(len(parts)):
        path = beside_stores().joinpath(*parts[first:])
        if path.exists() and _is_beside(str(path)):
            return path.resolve()
    return None


def _is_beside(own: str) -> bool:
    """Whether a folder is, at any depth, in the folder that the one of the stores is in."""
    path, folder = Path(absolute(own)), beside_stores()
    return path.is_absolute() and path.is_relative_to(folder) and _is_no_root(folder)


def _is_no_root(folder: Path) -> bool:
    return folder != folder.parent


def _is_packaged(own: str) -> bool:
    from activations.models.packaged import PACKAGED_MODELS

    return own in PACKAGED_MODELS
