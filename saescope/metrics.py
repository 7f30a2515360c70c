"""The table of metrics: what each is called, in which unit, how it is written, which way is better.

Whatever shows a metric reads its row here: the printed report, the model card, the feature store,
the explorer, the tables of comparisons and the certificate. Nothing heavy is imported. The rows
below are those of this package; a family of metrics in another file or package declares its own
(`sae.evaluation.metric_family`), and what it measured carries those rows with it (`described`), so
that a file or a store can be read where that family is not known.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from saescope.errors import ArtefactError

_FORM = re.compile(r"\+?\.\d[f%]")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_LONGEST = 1000
"""characters of a text of a row that a file carries"""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A row of the table.

    >>> metric("fvu").shown(0.15730877)
    '0.1573'
    """

    name: str
    """its key in evaluation.json and in a store"""
    label: str
    """what it is called, in a few words"""
    unit: str = ""
    """what a value counts or is a part of; "" for a number without one"""
    form: str = ".4f"
    """how a value is written: decimals, or a percentage, of Python's format language"""
    better: Literal["lower", "higher", "neither"]
    """which values are better"""
    help: str
    """what it is, in a sentence or two"""
    source: str = ""
    """paper and section that define it"""
    interval: bool = False
    """whether half of its 95% interval stands beside it, as `name`_interval"""
    undefined: str = "not measured"
    """what it means that there is no value"""
    minor: bool = False
    """needed to understand other metrics: printed by the report, left out of cards and pages"""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise TypeError(f"a metric's name has lower-case letters, digits and _: {self.name!r}")
        if not _FORM.fullmatch(self.form):
            raise TypeError(f"metric {self.name}: format {self.form!r} is not like .4f or .1%")

    @property
    def title(self) -> str:
        """The label with the unit.

        >>> metric("delta_ce").title, metric("fvu").title
        ('delta CE (nats)', 'FVU')
        """
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def about(self) -> str:
        """The help, which way is better, and where it is defined.

        >>> "Lower is better." in metric("kl").about
        True
        """
        better = "" if self.better == "neither" else f" {self.better.capitalize()} is better."
        return self.help + better + (f" {self.source}." if self.source else "")

    def shown(self, value: float | None) -> str:
        """A value for people; a huge one with three figures.

        >>> metric("dead_fraction").shown(0.0737), metric("fvu").shown(2e7), metric("kl").shown(0)
        ('7.4%', '2e+07', '0.0000')
        """
        if value is None:
            return f"undefined: {self.undefined}"
        return f"{value:{self.form}}" if abs(value) < _HUGE else f"{value:.3g}"

    def text(self, value: float | None) -> str:
        """Label and value, for use in a sentence.

        >>> metric("l0").text(32.0)
        'L0 32.00'
        """
        return f"{self.label} {self.shown(value)}"


_HUGE = 1e6
_TABLE: dict[str, Metric] = {}


def declare(*rows: Metric) -> None:
    """Add rows to the table; TypeError for a name that is another metric's."""
    for row in rows:
        if _TABLE.setdefault(row.name, row) != row:
            raise TypeError(f"metric {row.name!r} is declared twice, and not alike")


def metric(name: str) -> Metric:
    """The row of this name; KeyError if there is none."""
    return _TABLE[name]


def common_rows() -> list[Metric]:
    """The rows declared in this file: the same whatever families have been imported."""
    return [row for name, row in _TABLE.items() if name in _OWN]


def texts(names: Iterable[str], values: Mapping[str, float]) -> str:
    """Metrics with their values, for use in a sentence.

    >>> texts(("l0", "fvu"), {"fvu": 0.25, "l0": 32})
    'L0 32.00, FVU 0.2500'
    """
    return ", ".join(metric(name).text(values[name]) for name in names)


def shown_with_interval(row: Metric, values: Mapping[str, Any], *, unit: bool = False) -> str:
    """A metric's value among `values`, with half of its 95% interval where it has one.

    >>> shown_with_interval(metric("kl"), {"kl": 0.25, "kl_interval": 0.01}, unit=True)
    '0.2500 ± 0.0100 nats'
    >>> shown_with_interval(metric("fvu"), {"fvu": 0.25, "fvu_interval": None})
    '0.2500 ± unknown: too few documents'
    >>> shown_with_interval(metric("fvu"), {"fvu": None, "fvu_interval": None})
    'undefined: not measured'
    """
    text, key = row.shown(values[row.name]), f"{row.name}_interval"
    after = f" {row.unit}" if unit and row.unit and values[row.name] is not None else ""
    if not row.interval or key not in values or values[row.name] is None:
        return text + after
    half = values[key]
    if half is None:
        return f"{text}{after} ± unknown: too few documents"
    return f"{text} ± {half:{row.form.removeprefix('+')}}{after}"


def measured_rows(values: Mapping[str, Any], rows: Mapping[str, Metric]) -> list[Metric]:
    """The rows of the metrics that are among `values`: those of this file in its order, then the
    others in that of `values`, whichever family was imported first."""
    own = [row for name, row in rows.items() if name in _OWN and name in values]
    return own + [rows[name] for name in values if name in rows and name not in _OWN]


# ---- rows that a file carries -------------------------------------------------------------------


def described(names: Iterable[str]) -> list[dict[str, Any]]:
    """JSON-able rows, in the order of `names`, of those of these metrics that are declared
    elsewhere than in this file."""
    wanted = [name for name in dict.fromkeys(names) if name in _TABLE and name not in _OWN]
    return [asdict(_TABLE[name]) for name in wanted]


def metric_table(further: Any = None, *, where: str = "metrics") -> dict[str, Metric]:
    """All rows by name: those declared, and those that a file carries (see `described`).

    A file cannot rename a metric that is declared. Raises ArtefactError for what is no list of
    rows.
    """
    carried: dict[str, Metric] = {}
    for each in [] if further is None else _list(further, where):
        row = _row(each, where)
        carried[row.name] = row
    return {**_TABLE, **{name: row for name, row in carried.items() if name not in _TABLE}}


def _list(found: Any, where: str) -> list[Any]:
    if not isinstance(found, list) or len(found) > _LONGEST:
        raise ArtefactError("damaged: not a list of metrics", where=where)
    return found


def _row(found: Any, where: str) -> Metric:
    kinds = {field.name: field.type for field in fields(Metric)}
    if not isinstance(found, dict) or found.keys() != kinds.keys():
        raise ArtefactError("damaged: not a row of the table of metrics", where=where)
    for key, value in found.items():
        wanted = bool if kinds[key] is bool else str
        if not isinstance(value, wanted) or (isinstance(value, str) and not _harmless(value)):
            raise ArtefactError(f"damaged: a metric's {key} cannot be right", where=where)
    if found["better"] not in ("lower", "higher", "neither"):
        raise ArtefactError("damaged: a metric's better cannot be right", where=where)
    try:
        return Metric(**found)
    except TypeError as error:
        raise ArtefactError(f"damaged: {error}", where=where) from error


def _harmless(text: str) -> bool:
    return len(text) <= _LONGEST and (text.isprintable() or not text)


# ---- this package's rows ------------------------------------------------------------------------

declare(
    Metric(
        name="l0",
        label="L0",
        unit="features a row",
        form=".2f",
        better="neither",
        help="Mean number of features active on a row, the activation at one position.",
        interval=True,
    ),
    Metric(
        name="fvu",
        label="FVU",
        better="lower",
        help="Fraction of variance unexplained: squared error of the reconstruction over the "
        "variance of the activations. 0 is perfect; always predicting the mean gives 1.",
        source="The normalised MSE of Gao et al. 2024, section 2.1",
        interval=True,
    ),
    Metric(
        name="cosine",
        label="cosine",
        better="higher",
        help="Mean cosine between an activation and its reconstruction.",
        interval=True,
    ),
    Metric(
        name="norm_ratio",
        label="norm ratio",
        better="neither",
        help="Length of the reconstructions over length of the activations; below 1 is shrinkage.",
        interval=True,
    ),
    Metric(
        name="dead_fraction",
        label="never fired",
        unit="of features",
        form=".1%",
        better="lower",
        help="Share of the features that fire nowhere on the held-out activations.",
    ),
    Metric(
        name="ce_clean",
        label="CE clean",
        unit="nats",
        better="neither",
        help="Cross-entropy of the untouched model, in nats a token.",
        minor=True,
        interval=True,
    ),
    Metric(
        name="ce",
        label="CE with the SAE",
        unit="nats",
        better="lower",
        help="Cross-entropy with the reconstruction in the activation's place, in nats a token.",
        minor=True,
        interval=True,
    ),
    Metric(
        name="ce_mean",
        label="CE mean-ablated",
        unit="nats",
        better="neither",
        help="Cross-entropy with the mean activation in place, in nats a token.",
        minor=True,
        interval=True,
    ),
    Metric(
        name="ce_zero",
        label="CE zero-ablated",
        unit="nats",
        better="neither",
        help="Cross-entropy with zeros in place, in nats a token.",
        minor=True,
        interval=True,
    ),
    Metric(
        name="delta_ce",
        label="delta CE",
        unit="nats",
        better="lower",
        help="How much the model's cross-entropy rises, in nats a token, when the reconstruction "
        "takes the activation's place. 0 is perfect.",
        source="Downstream loss of Gao et al. 2024, section 4.1",
        interval=True,
    ),
    Metric(
        name="kl",
        label="KL",
        unit="nats",
        better="lower",
        help="Divergence of the next-token distribution with the reconstruction in place from the "
        "model's own, in nats a token. 0 is perfect.",
        source="Braun et al. 2024, section 2",
        interval=True,
    ),
    Metric(
        name="recovered_mean",
        label="CE recovered (mean)",
        form=".2%",
        better="higher",
        help="How much of the damage done by replacing the activation with its mean is undone by "
        "using the reconstruction instead.",
        undefined="ablation does no harm",
        interval=True,
    ),
    Metric(
        name="recovered_zero",
        label="CE recovered (zero)",
        form=".2%",
        better="higher",
        help="How much of the damage done by setting the activation to zero is undone by using "
        "the reconstruction instead. Near 100% for almost any SAE of the residual stream: read "
        "delta CE.",
        source="Loss recovered of Rajamanoharan et al. 2024 (Gated SAEs), section 2",
        undefined="ablation does no harm",
        interval=True,
    ),
)
_OWN = frozenset(_TABLE)
