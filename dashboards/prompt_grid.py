"""Tokens by features, as a picture that answers the pointer: hover either way, click to lock.

What is drawn is chosen here; prompt_grid.js draws it. It gets texts and numbers alone, and makes
text nodes of them, so no token can become markup.
"""

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st
from streamlit.components.v2 import component

from dashboards.amounts import amount
from dashboards.tokens import plain_visible

if TYPE_CHECKING:
    import numpy as np

    from sae import TextFeatures

_HERE = Path(__file__).parent
MEASURES = ("share", "activation", "effect")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What of a text's features is drawn."""

    by: str = "share"
    """order: "share" of the feature's strongest activation in the store, "activation", or "effect"
    on the loss of the next token, whichever its sign"""
    densest: float = 1.0
    """features that fire at a greater share of all positions are left out"""
    per_token: int = 5
    """how many features of each token are drawn"""
    most: int = 40
    """features drawn in all"""
    special: bool = False
    """whether special tokens are drawn"""


@dataclass(frozen=True)
class Cell:
    """A feature at a token: its activation, and that over its strongest in the store."""

    position: int
    feature: int
    activation: float
    share: float
    effect: float | None = None
    """how much the loss of the next token would rise without it, to first order, in nats"""

    def measure(self, by: str) -> float:
        """How strong it is, as one of MEASURES counts."""
        if by == "effect":
            return abs(self.effect or 0.0)
        return self.share if by == "share" else self.activation

    def words(self) -> str:
        """What is said of it."""
        said = f"{amount(self.activation, 3)} · {100 * self.share:.3g} % of its strongest"
        if self.effect is None:
            return said
        return f"{said} · loss {amount(self.effect, 3, signed=True)} without it"


def cells_of(
    result: "TextFeatures",
    strongest: Mapping[int, float],
    density: Mapping[int, float],
    choice: Choice,
    effects: "np.ndarray | None" = None,
) -> list[Cell]:
    """The entries of the features that are dense enough, in the order of positions.

    A feature that the store has never seen firing is as strong as can be: its share is 1.

    Args: effects [entries] are those on the loss, NaN where there is none.
    """
    found = []
    known = [None] * len(result.feature) if effects is None else effects.tolist()
    entries = zip(result.position, result.feature, result.activation, known, strict=True)
    for position, feature, activation, effect in entries:
        number, value = int(feature), float(activation)
        if density.get(number, 0.0) > choice.densest:
            continue
        top = strongest.get(number, 0.0)
        effect = None if effect is None or effect != effect else effect
        share = value / top if top > 0 else 1.0
        found.append(Cell(int(position), number, value, share, effect))
    return found


def drawn_features(cells: list[Cell], choice: Choice, locked: int | None = None) -> list[int]:
    """The first features of each token, `per_token` of it and `most` in all; best first.

    If there are too many, every token has its first before any has its second. Those of a locked
    token are there in any case.
    """
    measure = operator.methodcaller("measure", choice.by)
    by_token: dict[int, list[Cell]] = {}
    for cell in cells:
        by_token.setdefault(cell.position, []).append(cell)
    ranks: dict[int, int] = {}
    best: dict[int, float] = {}
    for position, mine in by_token.items():
        ordered = sorted(mine, key=lambda cell: (-measure(cell), cell.feature))
        for rank, cell in enumerate(ordered[: choice.per_token]):
            known = ranks.get(cell.feature, choice.per_token)
            ranks[cell.feature] = -1 if position == locked else min(rank, known)
            best[cell.feature] = max(best.get(cell.feature, 0.0), measure(cell))
    first = sorted(best, key=lambda feature: (ranks[feature], -best[feature], feature))
    return sorted(first[: choice.most], key=lambda feature: (-best[feature], feature))


def picture(
    result: "TextFeatures",
    cells: list[Cell],
    features: list[int],
    names: Mapping[int, str],
    choice: Choice,
) -> dict[str, Any]:
    """What prompt_grid.js draws: tokens, features and cells, with the texts of their tooltips."""
    shown = [n for n, keep in enumerate(result.keep) if keep or choice.special or n == 0]
    column = {position: index for index, position in enumerate(shown)}
    row = {feature: index for index, feature in enumerate(features)}
    kept = [cell for cell in cells if cell.feature in row and cell.position in column]
    largest = max((cell.measure(choice.by) for cell in kept), default=0.0) or 1.0
    scale = 1.0 if choice.by == "share" else largest
    return {
        "tokens": [
            {
                "position": n,
                "text": plain_visible(result.tokens[n]) or "·",
                "read": bool(result.keep[n]),
                "tip": _state(result, n),
            }
            for n in shown
        ],
        "features": [{"feature": f, "name": names.get(f, "")} for f in features],
        "cells": [
            {
                **asdict(cell),
                "column": column[cell.position],
                "row": row[cell.feature],
                "strength": min(cell.measure(choice.by) / scale, 1.0),
                "tip": f"activation {cell.words()}",
            }
            for cell in kept
        ],
    }


def _state(result: "TextFeatures", position: int) -> str:
    if result.keep[position]:
        return f"position {position}"
    if position == 0:
        return "position 0, which SAEs never read"
    return f"position {position}, a special token, which SAEs never read"


@functools.cache
def _component() -> Callable[..., Any]:
    return component(
        "saescope_prompt_grid",
        html='<div class="grid"></div>',
        css=(_HERE / "prompt_grid.css").read_text("utf-8"),
        js=(_HERE / "prompt_grid.js").read_text("utf-8"),
    )


def draw(data: Mapping[str, Any], locked: Mapping[str, int | None], key: str, state: str) -> None:
    """Draw the picture, with a token and a feature locked: {"token": position, "feature": number}.

    Args: state is where in the session a reader's choice is kept, from the next run on.
    """

    def keep() -> None:
        st.session_state[state] = dict(st.session_state[key].get("locked") or {})

    _component()(data={**data, "locked": dict(locked)}, key=key, on_locked_change=keep)


def unread(keep: list[bool]) -> str:
    """Why an SAE has nothing to read in a text; "" if it has."""
    if any(keep):
        return ""
    if len(keep) == 1:
        return "This text is one token, and SAEs never read position 0. Type more."
    return (
        "After its first token, which SAEs never read, this text has no more than special tokens, "
        "which they never read either. Type more."
    )
