"""Which SAE says activations most briefly: description lengths of several, at equal distortion.

SAEs of one width at several L0 give a curve of bits over FVU. At one FVU that all widths reach,
each width's bits are read off its curve (linearly between two SAEs), and the widths compared
(Ayonrinde et al. 2024, section 4). Bits at different FVU say nothing about each other.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from saescope.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Described:
    """An SAE, and what describing a row with it takes."""

    d_sae: int
    l0: float
    fvu: float
    """distortion: FVU of what is received ("fvu_quantised")"""
    bits: float
    """bits a row ("description_bits")"""


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """Bits of each width at one FVU, and the width that takes fewest."""

    fvu: float
    bits: dict[int, float]
    """by width; widths without SAEs on both sides of the FVU are left out"""
    l0: dict[int, float]
    """L0 that each has there"""
    d_sae: int
    """the width that takes fewest"""


def at_equal_distortion(saes: Iterable[Described], fvu: float | None = None) -> Optimum:
    """Compare SAEs of several widths and L0 at one FVU.

    fvu: the distortion; if not given, the smallest that all widths reach.

    Raises InputError if no width has SAEs on both sides of it.

    >>> saes = [
    ...     Described(d_sae=64, l0=2, fvu=0.4, bits=20),
    ...     Described(d_sae=64, l0=8, fvu=0.2, bits=60),
    ...     Described(d_sae=256, l0=2, fvu=0.3, bits=30),
    ...     Described(d_sae=256, l0=4, fvu=0.1, bits=50),
    ... ]
    >>> found = at_equal_distortion(saes)
    >>> found.fvu, {width: float(bits) for width, bits in found.bits.items()}, found.d_sae
    (0.2, {64: 60.0, 256: 40.0}, 256)
    """
    curves: dict[int, list[Described]] = {}
    for each in sorted(saes, key=lambda each: (each.d_sae, each.fvu)):
        curves.setdefault(each.d_sae, []).append(each)
    if not curves:
        raise InputError("there are no SAEs to compare", where="at_equal_distortion", given=0)
    wanted = max(curve[0].fvu for curve in curves.values()) if fvu is None else fvu
    found = {width: at for width, curve in curves.items() if (at := _at(curve, wanted)) is not None}
    if not found:
        reached = {width: (curve[0].fvu, curve[-1].fvu) for width, curve in curves.items()}
        raise InputError(
            "no width has SAEs on both sides of it", where="fvu", given=wanted, allowed=str(reached)
        )
    return Optimum(
        fvu=wanted,
        bits={width: bits for width, (bits, _) in found.items()},
        l0={width: l0 for width, (_, l0) in found.items()},
        d_sae=min(found, key=lambda width: found[width][0]),
    )


def _at(curve: list[Described], fvu: float) -> tuple[float, float] | None:
    """Bits and L0 of a width at an FVU, of its SAEs in the order of their FVU."""
    for each in curve:
        if each.fvu == fvu:
            return each.bits, each.l0
    for before, after in pairwise(curve):
        if before.fvu < fvu < after.fvu:
            part = (fvu - before.fvu) / (after.fvu - before.fvu)
            bits = before.bits + part * (after.bits - before.bits)
            return bits, before.l0 + part * (after.l0 - before.l0)
    return None
