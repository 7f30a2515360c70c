"""Edits of features as the Steer page has them, and their text in its address."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from saescope.errors import InputError

KINDS = {
    "add": "add to the activation",
    "clamp": "hold its activation at",
    "scale": "multiply its activation by",
    "at_least": "raise its activation to at least",
    "at_most": "lower its activation to at most",
    "ablate": "switch off",
    "project": "multiply the part along it by",
    "cap": "cap the part along it at",
}
WHERE = {"kept": "all tokens", "prompt": "the prompt", "generated": "what is generated"}
IN_CHATS = {"system": "the system's", "user": "the user's", "assistant": "the assistant's"}
"""of a chat besides: what is said in a role; the answer is the assistant's"""
_MOST = 20


@dataclass(frozen=True)
class Edit:
    """What to do to one feature; `amount` is in the model's units, 0 for "ablate"."""

    kind: str
    feature: int
    amount: float = 0.0

    @property
    def text(self) -> str:
        """Its text in an address.

        >>> Edit("add", 5, 8.0).text, Edit("ablate", 7).text
        ('add:5:8', 'ablate:7')
        """
        if self.kind == "ablate":
            return f"ablate:{self.feature}"
        return f"{self.kind}:{self.feature}:{str(float(self.amount)).removesuffix('.0')}"


def edits_of(text: str, d_sae: int) -> list[Edit]:
    """Edits from their text in an address.

    Raises InputError for what is none, for a feature that does not exist, and for more than 20.

    >>> edits_of("add:5:8,ablate:7", 64)
    [Edit(kind='add', feature=5, amount=8.0), Edit(kind='ablate', feature=7, amount=0.0)]
    """
    words = [word for word in text.split(",") if word]
    if len(words) > _MOST:
        raise InputError("too many", where="edits", given=len(words), allowed=f"up to {_MOST}")
    return [_edit(word, d_sae) for word in words]


def _edit(word: str, d_sae: int) -> Edit:
    kind, _, rest = word.partition(":")
    feature, _, amount = rest.partition(":")
    try:
        # the length is bounded first: turning a very long text into a number is slow
        number, value = int(feature[:12]), float(amount[:30] or 0)
    except ValueError:
        number, value = -1, math.nan
    fits = kind in KINDS and bool(amount) != (kind == "ablate")
    if not (fits and 0 <= number < d_sae and math.isfinite(value)):
        raise InputError(
            "not an edit",
            where="edits",
            given=word[:40],
            allowed=f"add:FEATURE:NUMBER, clamp:…, scale:…, ablate:FEATURE, FEATURE < {d_sae}",
        )
    return Edit(kind, number, value)


def steer_arguments(edits: Sequence[Edit]) -> dict[str, Any]:
    """The arguments of `sae.steer`; InputError if a feature is edited twice.

    >>> steer_arguments([Edit("add", 5, 8.0), Edit("ablate", 7)])
    {'add': {5: 8.0}, 'ablate': [7]}
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for edit in edits:
        if edit.feature in seen:
            raise InputError("is edited twice", where="steer", given=f"feature {edit.feature}")
        seen.add(edit.feature)
        if edit.kind == "ablate":
            found.setdefault("ablate", []).append(edit.feature)
        else:
            found.setdefault(edit.kind, {})[edit.feature] = edit.amount
    return found
