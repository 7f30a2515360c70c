"""Attributes of Wikipedia leads, made so that two of them can be crossed.

    person   of English and French leads about people or places: those about people
    woman    of English leads about people that say "she" or "he" and not both: those that say "she"
    artist   of English leads about people whose short description names a profession of one of two
             lists and none of the other: those of the arts, against public life, science and sport

`ovos/person` crosses with `ovos/language=fr`, `ovos/woman` with `ovos/artist`: in each of the four
combinations there are texts enough (48 women who are no artists are the fewest).
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

Lead = Mapping[str, str]
"""extract (the text), topic, and description (a few words)"""

_SUBJECTS = {"en-us": ("Geography", "People"), "fr-fr": ("Géographie", "Personnalités")}
_HE, _SHE = re.compile(r"\b(he|him|his)\b", re.I), re.compile(r"\b(she|her|hers)\b", re.I)
_ARTS = re.compile(
    r"actor|actress|singer|musician|writer|author|poet|novelist|painter|artist|composer|director"
    r"|dancer|comedian|filmmaker|model",
    re.I,
)
_OTHERS = re.compile(
    r"politician|president|prime minister|monarch|king|queen|emperor|empress|statesman|activist"
    r"|ruler|chancellor|general|leader|scientist|physicist|mathematician|philosopher|chemist"
    r"|athlete|player",
    re.I,
)


class Attribute(NamedTuple):
    """What is said of leads."""

    languages: tuple[str, ...]
    says: Callable[[str, Lead], bool | None]
    """whether a lead of a language has it; None for one that is left out"""


def _person(language: str, lead: Lead) -> bool | None:
    place, person = _SUBJECTS[language]
    return {place: False, person: True}.get(lead["topic"])


def _woman(language: str, lead: Lead) -> bool | None:
    he, she = (bool(each.search(lead["extract"])) for each in (_HE, _SHE))
    return she if _person(language, lead) and he != she else None


def _artist(language: str, lead: Lead) -> bool | None:
    arts, others = (bool(each.search(lead["description"] or "")) for each in (_ARTS, _OTHERS))
    return arts if _person(language, lead) and arts != others else None


ATTRIBUTES = {
    "person": Attribute(tuple(_SUBJECTS), _person),
    "woman": Attribute(("en-us",), _woman),
    "artist": Attribute(("en-us",), _artist),
}
