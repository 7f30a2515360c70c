"""Which features a command is about: numbers and ranges, a list of people's, or all live ones."""

from saescope.errors import InputError
from store.annotations import Annotations
from store.feature_store import FeatureStore

_GIVEN = "numbers and ranges, as 3,17,100-120"


def parse_features(text: str, d_sae: int) -> list[int]:
    """Numbers and ranges with both ends, in the order given, each once.

    Raises InputError for anything else, or a number that is not below d_sae.

    >>> parse_features("7, 2-4,3", 64)
    [7, 2, 3, 4]
    """
    found: dict[int, None] = {}
    for word in text.split(","):
        first, dash, last = (each.strip() for each in word.partition("-"))
        ends = [first, last] if dash else [first, first]
        if not all(end.isascii() and end.isdecimal() and len(end) < 10 for end in ends):
            raise InputError(
                "is no choice of features", where="features", given=text, allowed=_GIVEN
            )
        low, high = map(int, ends)
        if not low <= high < d_sae:
            raise InputError(
                "no such features",
                where="features",
                given=word.strip(),
                allowed=f"0 to {d_sae - 1}",
            )
        found.update(dict.fromkeys(range(low, high + 1)))
    return list(found)


def choose_features(
    store: FeatureStore, notes: Annotations, features: str | None, list_name: str | None
) -> list[int]:
    """The features named by their numbers or by a list; all live ones if neither is given.

    Raises InputError if both are given, or there is no such list or feature.
    """
    if features is not None and list_name is not None:
        raise InputError("give --features or --list, not both", where="features", given=features)
    if features is not None:
        return parse_features(features, store.d_sae)
    if list_name is None:
        return store.live_features()
    members = [number for number in notes.members(list_name) if number < store.d_sae]
    if not members:
        raise InputError(
            "no such list, or nothing on it", where="list", given=list_name, allowed=notes.lists()
        )
    return members
