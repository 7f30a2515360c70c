"""How a metric ranks controls (`sae.evaluation.controls`) against a trained SAE."""

from collections.abc import Mapping
from typing import Any

from sae.evaluation.comparison import ROUNDING, compared
from saescope.metrics import Metric

CONTROLS = ("permuted", "random", "untrained", "pca")
ORACLE, TRAINED = "oracle", "trained"
DIFFERENCE = "difference"
"""ending of how far the trained SAE is above a control's figure, unit by unit"""


def ranking(row: Metric, values: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """How a metric ranks each control against the trained SAE, from what was measured of all.

    "right": the trained one is better, by more than the interval of the differences unit by unit
    allows where the control has them (`sae.evaluation.paired`), or else by more than the intervals
    of the two allow where there are intervals. "wrong": the control is. Else "cannot tell". Empty
    for a metric without a better way, without a figure of the trained one, or that no control was
    measured by.

    >>> from saescope.metrics import metric
    >>> ranking(metric("fvu"), {"trained": {"fvu": 0.2}, "random": {"fvu": 0.9}})
    {'random': 'right'}
    """
    if row.better == "neither" or values[TRAINED].get(row.name) is None:
        return {}
    trained, words = values[TRAINED], {"better": "right", "worse": "wrong"}
    found = {}
    alike = ROUNDING * abs(trained[row.name])
    paired, key = f"{row.name}_{DIFFERENCE}", f"{row.name}_interval"
    for name in (name for name in CONTROLS if row.name in values.get(name, {})):
        control = values[name]
        if control.get(paired) is not None:
            half = control[f"{paired}_interval"]
            told = None if half is None else max(half, alike)
            # no intervals are given, so that without `told` nothing is
            pair = ({row.name: 0.0}, {row.name: control[paired]})
        else:
            told = None if row.interval and key in trained and key in control else alike
            pair = (control, trained)
        verdict = compared(row, *pair, told).verdict
        found[name] = words.get(verdict, verdict)
    return found


def ranking_in_words(row: Metric, ranks: Mapping[str, str]) -> str:
    """What a ranking says of a metric, in a few words.

    >>> from saescope.metrics import metric
    >>> ranking_in_words(metric("fvu"), {"random": "right", "pca": "right"})
    'ranks all right'
    >>> ranking_in_words(metric("cknna"), {"random": "right", "permuted": "cannot tell"})
    'cannot tell permuted'
    """
    if row.better == "neither":
        return "no way is better"
    if not ranks:
        return row.undefined
    said = [
        f"{words} {', '.join(names)}"
        for word, words in (("cannot tell", "cannot tell"), ("wrong", "ranks wrong"))
        if (names := [name for name, rank in ranks.items() if rank == word])
    ]
    return "; ".join(said) or "ranks all right"
