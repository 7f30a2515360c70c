"""Families of metrics: one file here is one family, found by its decorator.

A file puts `@metric_family` on what measures, with the rows that its metrics have in the table of
metrics (`saescope.metrics`). Nothing else has to be edited: `saescope eval` measures every family
that applies, and the report, the model card, the feature store and the explorer show what has a
row. A family in another package is known once its module is imported (`--plugin my.module`).

What needs activations alone is a subclass of `sae.evaluation.rows.RowSums`; what needs the model is
a function of a `sae.evaluation.in_model.InModel`; what has texts of its own, of a
`sae.evaluation.on_texts.OnTexts`, and it says in `OwnTexts` what its settings are, what the
protocol has of them and how its table is written.

A suite is a set of families with a name: `core` is measured unless others are chosen (`--suite`).
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, TypeVar, get_args

from saescope.errors import InputError
from saescope.metrics import Metric, declare
from saescope.paths import AnyPath
from saescope.plugins import registering

Needs = Literal["activations", "model", "texts"]
CORE = "core"
"""the suite that is measured if none is chosen"""
MeasureT = TypeVar("MeasureT", bound=Callable[..., Any])


class Settings(Protocol):
    """Settings of a family with texts of its own: a `saescope.config.Config`."""

    def quick(self) -> Self:
        """Those of a look in a few minutes."""
        ...


TableRows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class OwnTexts:
    """What a family with texts of its own says of itself."""

    settings: type[Settings]
    """their class, made without arguments. Where the configuration of `saescope eval` has a field
    of this class, that field is what users set"""
    facts: Callable[[Any, Mapping[str, Any], str], dict[str, Any]]
    """what the protocol says of it, under its name, from settings, the harvest's facts of its
    model, and the site: all that decides its values"""
    counted: tuple[str, str]
    """the value that says how much was measured, and of what in words; ("sets", "sets of texts")"""
    unit: str
    """what intervals are over, in words"""
    write: Callable[[AnyPath, TableRows, str], None] | None = None
    """writes its table, which it left in `OnTexts.tables`, beside the evaluation's file of this
    path, with this hash of the protocol"""
    lines: Callable[[TableRows], Iterable[str]] | None = None
    """the table as lines for people"""
    controls: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """for `--controls`, of a metric that it measures of a control as well: the name of each
    control (`sae.evaluation.ranks.CONTROLS`) and of the value that is the metric of it. Where both
    are of the same units, `sae.evaluation.paired` adds how far the SAE is above that value"""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Metrics that are measured together."""

    name: str
    """what it is chosen by"""
    needs: Needs
    """what it is measured on: held-out activations, the model with the SAE in it, or texts that it
    brings itself"""
    metrics: tuple[Metric, ...]
    """rows of the table"""
    section: str
    """the key of evaluation.json that its values are under"""
    measure: Any
    """a `RowSums` class, or a function from an `InModel` or `OnTexts` to values by name"""
    protocol: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able settings that decide its values, besides the data; under its name in the
    protocol, and so in the protocol's hash"""
    quick: Mapping[str, Any] = field(default_factory=dict)
    """those of them that are others where `Setting.quick` asks for a look in a few minutes"""
    suite: str = CORE
    """the suite that it is of"""
    texts: OwnTexts | None = None
    """what it says of itself if it needs texts"""

    def settings(self, *, quick: bool = False) -> dict[str, Any]:
        """What the protocol says of it, whole or quick."""
        return {**self.protocol, **(self.quick if quick else {})}


_REGISTRY: dict[str, Family] = {}
_ORDER = get_args(Needs)


def metric_family(
    name: str,
    *,
    needs: Needs,
    metrics: Sequence[Metric],
    section: str | None = None,
    protocol: Mapping[str, Any] | None = None,
    quick: Mapping[str, Any] | None = None,
    suite: str = CORE,
    texts: OwnTexts | None = None,
) -> Callable[[MeasureT], MeasureT]:
    """Add a family of metrics; its section is its name if none is given.

    TypeError for a family of this name, another metric of a row's name, what is not a class where
    activations alone are needed, `texts` that are not there where texts are needed, or are, or a
    quick setting that the protocol does not have.
    """
    if name in _REGISTRY:
        raise TypeError(f"family of metrics {name!r} is registered twice")
    if (texts is not None) != (needs == "texts"):
        raise TypeError(f"family of metrics {name!r}: texts= goes with needs='texts'")
    if strange := set(quick or {}) - set(protocol or {}):
        raise TypeError(f"family of metrics {name!r}: quick= has others than protocol=: {strange}")
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
            quick=dict(quick or {}),
            suite=suite,
            texts=texts,
        )
        return measure

    return add


def families() -> dict[str, Family]:
    """Every known family by name: first those that need activations alone.

    >>> {"density", "reconstruction"} <= set(families())
    True
    """
    for found in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{found.name}")
    known = sorted(_REGISTRY.values(), key=lambda each: (_ORDER.index(each.needs), each.name))
    return {each.name: each for each in known}


def suites() -> dict[str, list[str]]:
    """The families of each suite.

    >>> suites()["probing"]
    ['probing']
    """
    found: dict[str, list[str]] = {}
    for name, family in families().items():
        found.setdefault(family.suite, []).append(name)
    return found


def chosen(names: Sequence[str], of_suites: Sequence[str] = (CORE,)) -> list[Family]:
    """The families of these names, or of these suites if there are no names.

    Several suites may stand in one word, with commas between them. InputError for an unknown name
    lists those that there are.
    """
    known = families()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError("no such family of metrics", where="metrics", given=unknown, allowed=known)
    wanted = [name for word in of_suites for name in word.split(",") if name]
    strange = [name for name in wanted if name not in suites()]
    if strange or not wanted:
        given = strange or list(of_suites)
        raise InputError("no such suite", where="suite", given=given, allowed=suites())
    return [
        family
        for name, family in known.items()
        if (name in names if names else family.suite in wanted)
    ]
