"""The errors a user can meet: each says what is wrong, where, what was given, what is allowed."""

from collections.abc import Collection, Iterable

_UNSET = object()
_LONGEST = 2000
"""characters of a message"""


def _short(text: str, longest: int = 500) -> str:
    """A text, its middle left out where it is too long to read."""
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} … {text[-half:]}"


class SaescopeError(Exception):
    """Base of every error that saescope raises on purpose.

    >>> print(InputError("k is too large", where="sae.k", given=99, allowed="1 to 64"))
    sae.k: k is too large (given: 99; allowed: 1 to 64)
    """

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        given: object = _UNSET,
        allowed: str | Iterable[object] | None = None,
    ) -> None:
        details = []
        if given is not _UNSET:
            details.append(f"given: {_short(repr(given))}")
        if allowed is not None:
            listed = allowed if isinstance(allowed, str) else ", ".join(map(str, allowed))
            details.append(f"allowed: {listed}")
        message = f"{where}: {what}" if where else what
        if details:
            message += f" ({'; '.join(details)})"
        super().__init__(_short(message, _LONGEST))


class InputError(SaescopeError, ValueError):
    """Something the user gave (a value, a name, a file's content) cannot be used."""


class ArtefactError(SaescopeError):
    """A file or folder that saescope needs is missing, damaged, or of a newer version."""


def check_range(
    where: str,
    value: float,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Raise InputError unless value is a number, low <= value <= high and above < value < below.

    >>> check_range("train.lr", 1e-3, above=0)
    """
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        raise InputError("is not a number", where=where, given=value)
    checks = (
        (low, "at least", low is not None and value >= low),
        (high, "at most", high is not None and value <= high),
        (above, "above", above is not None and value > above),
        (below, "below", below is not None and value < below),
    )
    bounds = [(bound, word, holds) for bound, word, holds in checks if bound is not None]
    if not all(holds for _, _, holds in bounds):
        allowed = " and ".join(f"{word} {bound}" for bound, word, _ in bounds)
        raise InputError("out of range", where=where, given=value, allowed=allowed)


def check_choice(what: str, where: str, value: object, allowed: Collection[object]) -> None:
    """Raise InputError, which says `what`, unless value is one of those allowed.

    >>> check_choice("no such activation", "sae.activation", "relu", ("relu", "topk"))
    """
    if value not in allowed:
        raise InputError(what, where=where, given=value, allowed=allowed)
