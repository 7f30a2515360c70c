"""Absorption where the truth is known: planted parents, whose children fire only with them.

A parent that is absorbed is missed by its main latents just where a child fires, whose latent then
writes the parent's direction too. That is seen in two ways: by the published definitions with the
parent's true direction in the probe's place, and, without any direction, by how often main latents
fire on the parent's rows with a child and on those without.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from sae.probing.absorption import SILENT, absorption, main_latents
from sae.probing.logistic import Labels, Matrix
from saescope.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ParentAbsorption:
    """What became of one true feature that has children."""

    parent: int
    """number of the true feature"""
    main: tuple[int, ...]
    """its main latents; several where it is split"""
    f1: float
    """how well these tell when it fires, on training rows left out"""
    fraction: float
    """mean absorption fraction over test rows on which it fires"""
    full: float
    """share of these rows that are fully absorbed"""
    recall_with_child: float | None
    """how often a main latent fires on test rows with the parent and a child; None of none"""
    recall_alone: float | None
    """how often on test rows with the parent and none of its children; None of none"""


def planted_absorption(
    x: Matrix,
    codes: sparse.csr_array,
    decoder: Matrix,
    true: sparse.csr_array,
    directions: Matrix,
    parent: NDArray[np.int64],
    *,
    seed: int = 0,
) -> list[ParentAbsorption]:
    """The absorption of every true feature with children, by rising number.

    Args:
        x: rows [rows, d_in] without the constant that all share; the first half is for training.
        codes: the SAE's codes of them [rows, d_sae].
        decoder: what latents write [d_sae, d_in].
        true: amounts of the true features [rows, features].
        directions: what these write [features, d_in].
        parent: the parent of each true feature [features], -1 for none.

    Parents that fire on fewer than two rows of a half, or are silent on fewer, are left out.
    Raises InputError if none is left.
    """
    half = len(x) // 2
    fires = sparse.csc_array(true)
    found = []
    for number in sorted(set(parent[parent >= 0].tolist())):
        there = _fires(fires, [number])
        if min(_rarer(there[:half]), _rarer(there[half:])) < 2:
            continue
        main = main_latents(codes[:half], there[:half], seed=seed)
        rows = half + np.flatnonzero(there[half:])
        of = absorption(x[rows], codes[rows], decoder, directions[number], main.latents)
        child = _fires(fires, np.flatnonzero(parent == number).tolist())[rows]
        noticed = _fires(sparse.csc_array(codes[rows]), main.latents.tolist())
        found.append(
            ParentAbsorption(
                parent=number,
                main=tuple(main.latents.tolist()),
                f1=main.f1,
                fraction=float(of.fraction.mean()),
                full=float(of.full.mean()),
                recall_with_child=_mean(noticed[child]),
                recall_alone=_mean(noticed[~child]),
            )
        )
    if not found:
        raise InputError("no parent fires often enough", where="planted_absorption")
    return found


def _fires(columns: sparse.csc_array, chosen: list[int]) -> Labels:
    """Whether one of some columns is not 0, bool [rows]."""
    return np.asarray((abs(columns[:, chosen]) >= SILENT).sum(1)).reshape(-1) > 0


def _rarer(y: Labels) -> int:
    return min(int(y.sum()), int((~y).sum()))


def _mean(y: Labels) -> float | None:
    return float(y.mean()) if len(y) else None
