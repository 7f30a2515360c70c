"""Checking parameters of the address: wrong ones are reported, and brought into range."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Checked(Generic[T]):
    """A usable value, and what was wrong with the given one ("" if nothing)."""

    value: T
    problem: str = ""


def shown(raw: str) -> str:
    """A parameter's text, cut to a readable length, for a message."""
    return repr(raw if len(raw) <= 40 else f"{raw[:39]}…")


def choose_sae(raw: str | None, names: Collection[str], fallback: str) -> Checked[str]:
    """One of the names; the fallback if none is given or it is unknown.

    >>> choose_sae("x", ["a"], "a").problem
    "There is no SAE named 'x' here; this is 'a'."
    """
    if raw is None or raw in names:
        return Checked(fallback if raw is None else raw)
    return Checked(fallback, f"There is no SAE named {shown(raw)} here; this is {shown(fallback)}.")


def choose_feature(raw: str | None, d_sae: int, fallback: int) -> Checked[int]:
    """A feature's number within range.

    >>> choose_feature("99", 8, 0)
    Checked(value=7, problem='Features go from 0 to 7; this is 7, not 99.')
    """
    if raw is None:
        return Checked(fallback)
    try:
        # the length is bounded first: turning a very long text into a number is slow
        number = int(raw[:30])
    except ValueError:
        return Checked(
            fallback, f"{shown(raw)} is not the number of a feature; this is {fallback}."
        )
    inside = min(max(number, 0), d_sae - 1)
    if inside == number:
        return Checked(inside)
    return Checked(inside, f"Features go from 0 to {d_sae - 1:,}; this is {inside}, not {number}.")
