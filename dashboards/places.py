"""Where the stores are: found without Streamlit, so that the command line answers at once."""

import os
from pathlib import Path

from saescope.errors import ArtefactError
from store.database import FILE_NAME

PLACE_VARIABLE = "SAESCOPE_STORE"


def find_stores(place: str | Path) -> dict[str, Path]:
    """Names and files of the stores at a place: a store's file or folder, or a folder of stores.

    Raises ArtefactError if there is none.
    """
    root = Path(place).expanduser().resolve()
    if root.is_file():
        return {root.parent.name if root.name == FILE_NAME else root.stem: root}
    if (root / FILE_NAME).is_file():
        return {root.name: root / FILE_NAME}
    found = {file.parent.name: file for file in sorted(root.glob(f"*/{FILE_NAME}"))}
    if not found:
        raise ArtefactError(
            "no feature store here; `saescope index RUN --out FOLDER` makes one", where=str(place)
        )
    return found


def stores() -> dict[str, Path]:
    """The stores this explorer was started on."""
    return find_stores(os.environ.get(PLACE_VARIABLE, "stores"))
