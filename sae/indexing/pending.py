"""What `saescope index` has encoded so far: files beside the store, until the store is there.

The folder `.features.duckdb.pending` has a file a piece of the harvest, which appears whole or not
at all, and `plan.json`, which says what the pieces follow from. A build that was killed goes on
from them; those of another SAE or harvest are refused, or dropped, but never mixed with others.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saescope.artefact import atomic_path, read_json, write_json
from saescope.errors import ArtefactError, InputError
from saescope.leftovers import remove_leftover
from saescope.progress import say
from saescope.system import system_errors

Arrays = dict[str, NDArray[Any]]
_PLAN = "plan.json"
_PIECE = re.compile(r"[a-z]+-\d{6,}\.npz")
_WORDS = {
    "SAE": ("sae_hash", "architecture", "sae_config"),
    "site": ("site", "sites"),
    "model": ("model_hash",),
    "harvest": ("harvest",),
}
"""what of a store's meta values an activation follows from, and what to call it"""


def decisive(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What of a store's meta values its activations follow from, as JSON has it."""
    names = [name for several in _WORDS.values() for name in several]
    return json.loads(json.dumps({name: meta.get(name) for name in names}))


def other_words(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Words for what differs between two of `decisive`.

    >>> other_words({"sae_hash": "a", "site": "x"}, {"sae_hash": "b", "site": "x"})
    ['SAE']
    """
    return [
        word
        for word, names in _WORDS.items()
        if any(one.get(name) != other.get(name) for name in names)
    ]


def pending_folder(store: Path) -> Path:
    """The folder of a store's pieces."""
    return store.with_name(f".{store.name}.pending")


class Pending:
    """The pieces of an unfinished store.

    Args:
        store: the file that is to be written.
        plan: what the pieces follow from, JSON-able: `decisive` meta values and more.
    """

    def __init__(self, store: Path, plan: Mapping[str, Any]) -> None:
        self._store = store
        self.folder = pending_folder(store)
        self._plan = json.loads(json.dumps(plan))

    def is_open(self) -> bool:
        """Whether pieces of this very plan may be there, and more may be added."""
        return self.begun() == self._plan

    def begun(self) -> Any:
        """The plan that was begun there, this one or another; None if there is none."""
        try:
            return read_json(self.folder / _PLAN)
        except ArtefactError:  # none, or one that was being removed
            return None

    def open(self, *, replace: bool) -> None:
        """Begin, or go on.

        Raises InputError if another plan was begun, which only `replace` drops.
        """
        with system_errors(str(self._store)):
            found = self.begun()
            if found != self._plan:
                if found is not None:
                    self._drop(found, replace=replace)
                self.remove()
                self.folder.mkdir(parents=True)
                write_json(self.folder / _PLAN, self._plan)

    def _drop(self, found: Mapping[str, Any], *, replace: bool) -> None:
        words = other_words(found, self._plan)
        what = f"of another {' and '.join(words)}" if words else "in another way"
        if not replace:
            raise InputError(
                f"an index {what} was begun here and is not finished: run its command again, or "
                "choose another out, or drop what was encoded with --replace",
                where=str(self._store.parent),
            )
        say(f"{self._store}: what was encoded {what} is dropped")

    def path(self, name: str, number: int) -> Path:
        """The file of a piece."""
        return self.folder / f"{name}-{number:06d}.npz"

    def has(self, name: str, number: int) -> bool:
        """Whether a piece is there, whole."""
        return self.path(name, number).exists()

    def put(self, name: str, number: int, arrays: Arrays) -> None:
        """Commit a piece: flushed to the disk, and then renamed to where it belongs."""
        with system_errors(str(self._store)), atomic_path(self.path(name, number)) as temporary:
            np.savez(temporary, **arrays)  # type: ignore[arg-type]

    def get(self, name: str, number: int) -> Arrays | None:
        """The arrays of a piece; None if it is missing or damaged: each has its checksum."""
        try:
            with self.path(name, number).open("rb") as stream, np.load(stream) as found:
                return dict(found)
        except Exception:  # zip files can be damaged in many ways
            return None

    def remove(self) -> None:
        """Remove all pieces; the plan goes first, so that what a kill leaves is none's."""
        with system_errors(str(self._store)):
            (self.folder / _PLAN).unlink(missing_ok=True)
            for path in sorted(self.folder.glob("*")):
                if _PIECE.fullmatch(path.name):
                    path.unlink(missing_ok=True)
                else:
                    remove_leftover(path)
            if self.folder.exists():
                self.folder.rmdir()
