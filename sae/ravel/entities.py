"""The facts that a model is asked for: entities.toml, of the same folder.

A kind of entities (cities) has attributes (country, continent, language), a value of each for every
entity, and sentences that ask for one attribute and end where its value follows.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from saescope.artefact import sha256_json
from saescope.errors import InputError

_FACTS = Path(__file__).with_name("entities.toml")
SLOT = "{entity}"


@dataclass(frozen=True, kw_only=True)
class EntityKind:
    """Entities with the same attributes."""

    name: str
    values: Mapping[str, Mapping[str, str]]
    """entity to attribute to value"""
    sentences: Mapping[str, tuple[str, ...]]
    """attribute to the sentences that ask for it, each with `SLOT` where the entity stands"""

    @property
    def hash(self) -> str:
        """sha256 of everything above."""
        return sha256_json([self.name, self.values, self.sentences])


@cache
def entity_kinds() -> dict[str, EntityKind]:
    """Every kind that is shipped, by name.

    >>> entity_kinds()["city"].values["Lyon"]["language"]
    'French'
    """
    found = {}
    for name, given in tomllib.loads(_FACTS.read_text(encoding="utf-8")).items():
        attributes = given["attributes"]
        values = {
            entity: dict(zip(attributes, row, strict=True)) for entity, *row in given["entities"]
        }
        sentences = {each: tuple(given["sentences"][each]) for each in attributes}
        found[name] = EntityKind(name=name, values=values, sentences=sentences)
    return found


def chosen_kinds(names: Sequence[str]) -> list[EntityKind]:
    """The kinds of these names; InputError for one that there is not, or if there are no names."""
    known = entity_kinds()
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise InputError(
            "no such kind of entities", where="ravel.kinds", given=list(names), allowed=known
        )
    return [known[name] for name in names]
