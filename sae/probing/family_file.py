"""What a family writes beside an evaluation: NAME.FAMILY.json, sealed, with the protocol's hash."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saescope.artefact import read_json, write_report
from saescope.paths import AnyPath
from saescope.replacing import Kind
from saescope.seals import sealed


def beside(evaluation: AnyPath, ending: str) -> AnyPath:
    """A file beside an evaluation's, of its name and another ending.

    >>> from pathlib import Path
    >>> beside(Path("runs/x/evaluation.json"), "scr.json").name
    'evaluation.scr.json'
    """
    return evaluation.with_name(f"{evaluation.name.removesuffix('.json')}.{ending}")


@dataclass(frozen=True)
class FamilyFile:
    """The JSON file of a family's results."""

    family: str
    what: str
    """in words, as `a table of attributes`"""
    key: str
    """under which its rows are; a file without it is another's"""

    def path(self, evaluation: AnyPath) -> AnyPath:
        """Where it is, for an evaluation's file."""
        return beside(evaluation, f"{self.family}.json")

    def write(self, evaluation: AnyPath, protocol_hash: str, content: Mapping[str, Any]) -> None:
        """Write it beside an evaluation's file, in the place of an earlier one.

        Raises InputError if something else is there, ArtefactError if it cannot be written.
        """
        whole = {"schema": 1, "protocol_hash": protocol_hash, **content}
        kind = Kind(self.what, self._is_one)
        write_report(self.path(evaluation), sealed(whole), kind, replace=True)

    def _is_one(self, path: AnyPath) -> bool:
        found = read_json(path)
        return isinstance(found, dict) and "protocol_hash" in found and self.key in found
