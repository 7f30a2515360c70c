"""Where the stores are, and what may be loaded for them: found without Streamlit or torch, so that
the command line answers at once."""

import json
import os
from pathlib import Path

from saescope.errors import ArtefactError
from store.database import STORE_FILE

PLACE_VARIABLE = "SAESCOPE_STORE"
NAMED_VARIABLE = "SAESCOPE_NAMED"
_OPTIONS = {"model": "--model", "sae": "--sae"}


def find_stores(place: str | Path) -> dict[str, Path]:
    """Names and files of the stores at a place: a store's file or folder, or a folder of stores.

    Raises ArtefactError if there is none.
    """
    root = Path(place).expanduser().resolve()
    if root.is_file():
        return {root.parent.name if root.name == STORE_FILE else root.stem: root}
    if (root / STORE_FILE).is_file():
        return {root.name: root / STORE_FILE}
    found = {file.parent.name: file for file in sorted(root.glob(f"*/{STORE_FILE}"))}
    if not found:
        raise ArtefactError(
            "no feature store here; `saescope index RUN --out FOLDER` makes one", where=str(place)
        )
    return found


def stores() -> dict[str, Path]:
    """The stores this explorer was started on."""
    return find_stores(os.environ.get(PLACE_VARIABLE, "stores"))


def absolute(name: str) -> str:
    """The absolute path of a folder that is there; any other name (of a hub, say) as it is."""
    try:
        path = Path(name).expanduser()
        return str(path.resolve()) if path.exists() else name
    except (OSError, RuntimeError, ValueError):
        return name


def environment(place: str, *, model: tuple[str, ...], sae: tuple[str, ...]) -> dict[str, str]:
    """What tells the explorer's process where the stores are, and what was named for them."""
    named = {"model": [absolute(m) for m in model], "sae": [absolute(s) for s in sae]}
    return {
        PLACE_VARIABLE: str(Path(place).expanduser().resolve()),
        NAMED_VARIABLE: json.dumps(named),
    }


def to_load(kind: str, own: str, store: str) -> str:
    """What to load as the "model" or the "sae" of a store that says that `own` is its one.

    In an explorer: what lies beside its stores, a model of saescope's own, what the person who
    started it named; the only one named, instead of any other. Elsewhere a program asks, and may
    load what it likes.

    Raises ArtefactError, with the option that would allow it, for anything else.
    """
    place = os.environ.get(PLACE_VARIABLE)
    named = json.loads(os.environ.get(NAMED_VARIABLE, "{}")).get(kind, [])
    if place is None or absolute(own) in named or _is_beside(own, Path(place)):
        return own
    if kind == "model" and _is_packaged(own):
        return own
    if len(named) == 1:
        return named[0]
    what = {"model": "model", "sae": "SAE"}[kind]
    raise ArtefactError(
        f"the {what} it names is not beside the stores, and nobody has named it: if it is to be "
        f"loaded, start the explorer with {_OPTIONS[kind]}",
        where=store,
        given=own[:200],
    )


def _is_beside(own: str, place: Path) -> bool:
    """Whether a folder is in the folder in which the stores' own folder is."""
    path, folder = Path(absolute(own)), place.resolve().parent
    return path.is_absolute() and path.is_relative_to(folder) and folder != folder.parent


def _is_packaged(own: str) -> bool:
    from activations.models.packaged import PACKAGED_MODELS

    return own in PACKAGED_MODELS
