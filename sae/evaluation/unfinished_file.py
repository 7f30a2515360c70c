"""NAME.unfinished: what of an evaluation is measured already, for the case of an interruption.

Families are measured in parts: those that need activations alone share one pass, each other one is
a part. The file is written anew after each part and removed with the last; the same command takes
from it what is there and measures the rest. JSON keeps every digit of a number, so that what comes
out has the bytes that it would have had.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from sae.evaluation.written import is_of_kind, read_of_kind
from sae.probing.family_file import beside
from saescope.artefact import sha256_json, write_report
from saescope.errors import ArtefactError
from saescope.paths import AnyPath, exists, remove
from saescope.progress import say
from saescope.replacing import Kind, check_replaceable
from saescope.seals import sealed

SCHEMA = 1
KIND = "unfinished evaluation"
UNFINISHED_KIND = Kind("an unfinished evaluation", partial(is_of_kind, kind=KIND))


def unfinished_file(evaluation: AnyPath) -> AnyPath:
    """Where it is, beside an evaluation's file.

    >>> from pathlib import Path
    >>> unfinished_file(Path("runs/x/evaluation.json")).name
    'evaluation.unfinished'
    """
    return beside(evaluation, "unfinished")


def read_unfinished(path: AnyPath) -> dict[str, Any]:
    """Its parts by key; ArtefactError if the file is missing, damaged, newer or another one."""
    found = read_of_kind(path, KIND, schema=SCHEMA, wrong="is no unfinished evaluation")
    return found["parts"]


class Unfinished:
    """The parts of an evaluation that are measured already.

    Args: evaluation is the file that it will be written to.

    Raises InputError if something else is where the parts are to be kept.
    """

    def __init__(self, evaluation: AnyPath) -> None:
        self.path = unfinished_file(evaluation)
        check_replaceable(self.path, UNFINISHED_KIND, replace=True)
        self._parts: dict[str, Any] | None = None
        self._writable = True

    def part(
        self, about: Mapping[str, Any], name: str, measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """What was kept of a part, or what is measured now, and kept.

        Args:
            about: JSON-able, all that decides what is measured.
            name: of the part, in words.
            measure: gives a JSON-able dictionary.

        Where the file cannot be written that is said, and measuring goes on.
        """
        if self._parts is None:
            self._parts = self._read()
        key = sha256_json(dict(about))
        if key in self._parts:
            say(f"{name}: measured before the interruption")
            return self._parts[key]
        found = measure()
        self._parts[key] = found
        if self._writable:
            self._write()
        return found

    def _write(self) -> None:
        content = {"schema": SCHEMA, "kind": KIND, "parts": self._parts}
        try:
            write_report(self.path, sealed(content), UNFINISHED_KIND, replace=True)
        except ArtefactError as error:  # figures are told, wherever they cannot be written
            say(f"{error}; nothing is kept for an interruption")
            self._writable = False

    def forget(self) -> None:
        """Remove the file, once what it has is written elsewhere."""
        if UNFINISHED_KIND.holds(self.path):
            remove(self.path)

    def _read(self) -> dict[str, Any]:
        if not exists(self.path):
            return {}
        try:
            return read_unfinished(self.path)
        except ArtefactError as error:
            say(f"{error}; it is measured again from the start")
            return {}
