"""Checks of whole numbers that people give, of Python, NumPy or torch."""

import operator
from collections.abc import Iterable
from typing import Any

from saescope.errors import InputError


def as_index(
    value: Any,
    *,
    where: str,
    low: int | None = None,
    high: int | None = None,
    what: str = "out of range",
) -> int:
    """A whole number from low to high (both included), as Python's int.

    It may be an int, a NumPy integer, or an array or tensor of integers with no dimensions:
    whatever has `__index__`, but for truth values, which are no numbers here.

    Raises InputError for anything else (floats, strings and None included), or, with the words of
    `what`, for a number out of range.

    >>> import numpy as np
    >>> as_index(np.int64(3), where="feature", low=0, high=63)
    3
    >>> as_index(True, where="feature")
    Traceback (most recent call last):
    ...
    saescope.errors.InputError: feature: is not a whole number (given: True; allowed: whole numbers)
    """
    try:
        number = None if _is_truth_value(value) or _dimensions(value) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise InputError(
            "is not a whole number", where=where, given=value, allowed=_allowed(low, high)
        )
    if (low is not None and number < low) or (high is not None and number > high):
        raise InputError(what, where=where, given=number, allowed=_allowed(low, high))
    return number


def as_indices(
    values: Any,
    *,
    where: str,
    low: int | None = None,
    high: int | None = None,
    what: str = "out of range",
) -> list[int]:
    """Whole numbers from low to high: of a list, a range, a set, an array or a tensor [n].

    Raises InputError as `as_index` does, and for what is no collection of numbers.

    >>> import numpy as np
    >>> as_indices(np.array([5, 3]), where="positions", low=0)
    [5, 3]
    """
    if isinstance(values, str | bytes) or not isinstance(values, Iterable) or _is_scalar(values):
        raise InputError(
            "is not a list of whole numbers", where=where, given=values, allowed=_allowed(low, high)
        )
    return [as_index(value, where=where, low=low, high=high, what=what) for value in values]


def _is_truth_value(value: Any) -> bool:
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))


def _dimensions(value: Any) -> int:
    return getattr(value, "ndim", 0)


def _is_scalar(value: Any) -> bool:
    return getattr(value, "ndim", None) == 0


def _allowed(low: int | None, high: int | None) -> str:
    if low is None and high is None:
        return "whole numbers"
    if high is None:
        return f"whole numbers from {low}"
    return f"whole numbers up to {high}" if low is None else f"{low} to {high}"
