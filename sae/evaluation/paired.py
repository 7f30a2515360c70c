"""A metric of an SAE less that of a control, unit by unit.

A suite of texts measures both on the same sets, letters, attributes, divisions or texts. Some of
these are harder than others, which the interval of each figure has in it; in the differences unit
by unit it cancels, so that they tell what two overlapping intervals do not.

Among a family's values `VALUE_difference` and `VALUE_difference_interval` stand beside the VALUE
that `OwnTexts.controls` names, and `sae.evaluation.ranks` decides by them.
"""

from collections.abc import Hashable, Mapping
from typing import TypeVar

from sae.evaluation.ranks import DIFFERENCE
from sae.probing.scores import mean_and_interval

UnitT = TypeVar("UnitT", bound=Hashable)


def named(value: str, difference: float | None, half: float | None) -> dict[str, float | None]:
    """A difference and half of its 95% interval, by the names that they have beside a value."""
    name = f"{value}_{DIFFERENCE}"
    return {name: difference, f"{name}_interval": half}


def unit_by_unit(
    value: str, sae: Mapping[UnitT, float], control: Mapping[UnitT, float]
) -> dict[str, float | None]:
    """The mean of an SAE's figures less a control's over the units that both have, and half of its
    95% interval by Student's t; nothing if they share none.

    >>> found = unit_by_unit("v_random", {"a": 0.75, "b": 0.5}, {"a": 0.25, "b": 0.0, "c": 9.0})
    >>> found == {"v_random_difference": 0.5, "v_random_difference_interval": 0.0}
    True
    """
    both = [figure - control[unit] for unit, figure in sae.items() if unit in control]
    return named(value, *mean_and_interval(both)) if both else {}
