"""A foreign configuration, taken key by key: each value of the type it must be."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saescope.artefact import read_json
from saescope.errors import ArtefactError, InputError

LARGEST = 2**31 - 1
"""of a width, a number of features, k"""


class Given(Mapping[str, Any]):
    """A JSON object of someone else's, with checked access; a Mapping of what it has."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = dict(values)
        self.where = where

    @classmethod
    def read(cls, path: Path) -> "Given":
        """Read a file; ArtefactError if it is missing, damaged, or no JSON object."""
        found = read_json(path)
        if not isinstance(found, dict):
            raise ArtefactError(
                "is not an SAE's configuration",
                where=str(path),
                given=type(found).__name__,
                allowed="a JSON object",
            )
        return cls(found, str(path))

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            raise ArtefactError(f"{name!r} is missing", where=self.where)
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Any:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str, default: Any = None) -> Any:
        """As a dictionary's."""
        return self._values.get(key, default)

    def _wrong(self, name: str, allowed: str) -> ArtefactError:
        value = self._values[name]
        short = f"{str(value)[:60]} …" if len(str(value)) > 60 else value
        return ArtefactError(f"{name} is not {allowed}", where=self.where, given=short)

    def count(self, name: str, *, low: int = 1) -> int:
        """A whole number, as 16 or 16.0; ArtefactError for any other, or one beyond 2^31."""
        value = self[name]
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or not low <= value <= LARGEST:
            raise self._wrong(name, f"a whole number from {low} to {LARGEST}")
        return int(value)

    def number(self, name: str, *, low: float = -math.inf) -> float:
        """A finite number; ArtefactError for any other, or one below `low`."""
        value = self[name]
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not real or not abs(value) < 1e300 or value < low:
            raise self._wrong(name, f"a number of at least {low:g}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false, null as the default; ArtefactError for any other."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def text(self, name: str) -> str:
        """A text; ArtefactError for any other."""
        value = self[name]
        if not isinstance(value, str):
            raise self._wrong(name, "a text")
        return value

    def table(self, name: str) -> "Given":
        """An object inside, empty where it is missing or null; ArtefactError for any other."""
        value = self.get(name)
        if value is None:
            return Given({}, f"{self.where}: {name}")
        if not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return Given(value, f"{self.where}: {name}")

    def refuse_unknown(self, known: Any, allowed: Any) -> None:
        """InputError if there are keys that change the SAE in ways not known."""
        unknown = sorted(set(self._values) - set(known))
        if unknown:
            raise InputError(
                "keys that this reader does not know, so the SAE might be another",
                where=self.where,
                given=unknown,
                allowed=allowed,
            )
