"""Families of metrics: one file here is one family, found by its decorator.

A file puts `@metric_family` on what measures, with the rows that its metrics have in the table of
metrics (`saescope.metrics`). Nothing else has to be edited: `saescope eval` measures every family
that applies, and the report, the model card, the feature store and the explorer show what has a
row. A family in another package is known once its module is imported (`--plugin my.module`).

What needs activations alone is a subclass of `sae.evaluation.rows.RowSums`; what needs the model is
a function of a `sae.evaluation.in_model.InModel`.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from saescope.errors import InputError
from saescope.metrics import Metric, declare
from saescope.plugins import registering

Needs = Literal["activations", "model"]
MeasureT = TypeVar("MeasureT", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Family:
    """Metrics that are measured together."""

    name: str
    """what it is chosen by"""
    needs: Needs
    """what it is measured on: held-out activations, or the model with the SAE in it"""
    metrics: tuple[Metric, ...]
    """rows of the table"""
    section: str
    """the key of evaluation.json that its values are under"""
    measure: Any
    """a `RowSums` class, or a function from an `InModel` to values by name"""
    protocol: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able settings that decide its values, besides the data; under its name in the
    protocol, and so in the protocol's hash"""


_REGISTRY: dict[str, Family] = {}


def metric_family(
    name: str,
    *,
    needs: Needs,
    metrics: Sequence[Metric],
    section: str | None = None,
    protocol: Mapping[str, Any] | None = None,
) -> Callable[[MeasureT], MeasureT]:
    """Add a family of metrics; its section is its name if none is given.

    TypeError for a family of this name, another metric of a row's name, or what is not a class
    where activations alone are needed.
    """
    if name in _REGISTRY:
        raise TypeError(f"family of metrics {name!r} is registered twice")
    declare(*metrics)

    def add(measure: MeasureT) -> MeasureT:
        if isinstance(measure, type) != (needs == "activations"):
            raise TypeError(
                f"family of metrics {name!r}: {needs} need a RowSums class or a function"
            )
        registering.add(measure.__module__)
        _REGISTRY[name] = Family(
            name=name,
            needs=needs,
            metrics=tuple(metrics),
            section=name if section is None else section,
            measure=measure,
            protocol=dict(protocol or {}),
        )
        return measure

    return add


def families() -> dict[str, Family]:
    """Every known family by name: first those that need activations alone.

    >>> list(families())[:2]
    ['density', 'reconstruction']
    """
    for found in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{found.name}")
    known = sorted(_REGISTRY.values(), key=lambda each: (each.needs == "model", each.name))
    return {each.name: each for each in known}


def chosen(names: Sequence[str]) -> list[Family]:
    """The families of these names, or all if there are none; InputError lists those allowed."""
    known = families()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError("no such family of metrics", where="metrics", given=unknown, allowed=known)
    return [family for name, family in known.items() if not names or name in names]
