"""Tables of families that lie beside an evaluation: attributes, and removal of concepts."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dashboards.reports.measured import Evaluation
from saescope.pieces import Table

_REMOVAL = {
    "scr": ("scr", "Share of a spurious correlation that is removed with n latents."),
    "tpp": (
        "tpp",
        "How much more the probe that is meant suffers than others, with n latents.",
    ),
}


def family_tables(kind: str, evaluations: Sequence[Evaluation]) -> Iterator[Table]:
    """The tables of a section, of each SAE that has one."""
    for each in evaluations:
        found = each.families.get(kind)
        if found is None:
            continue
        if kind == "ravel":
            yield _attributes(each.name, found["by_attribute"])
        elif kind in _REMOVAL:
            yield _removal(each.name, kind, found)
        elif kind == "unlearning":
            yield _clamps(each.name, found["results"])


def _attributes(name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    return Table(
        title=f"{name}: attribute by attribute",
        about="random: as many of the SAE's features that fire, drawn by chance; untrained: of an "
        "SAE of this shape that was never trained; all: all features; activation: the whole "
        "activation. A swap of nothing has cause 0% and isolation 100%: disentangle is half of "
        "their sum.",
        columns=("attribute", "method", "features", "cause", "isolation", "disentangle"),
        rows=tuple(
            (
                f"{row['kind']}'s {row['attribute']}",
                str(row["method"]),
                "" if row["k"] is None else f"{row['k']}",
                f"{row['cause']:.1%}",
                f"{row['isolation']:.1%}",
                f"{row['disentangle']:.3f}",
            )
            for row in rows
        ),
    )


def _removal(name: str, kind: str, found: Mapping[str, Any]) -> Table:
    """The means over all texts, a method a row and a number of latents a column."""
    value, about = _REMOVAL[kind]
    means = [row for row in found["scores"] if row.get("pair", row.get("group")) is None]
    ns = sorted({row["n"] for row in means})
    scores = {(row["method"], row["n"]): row for row in means}
    methods = found.get("methods", {})
    return Table(
        title=f"{name}: {kind.upper()}",
        about=about,
        columns=("method", *(f"n = {n}" for n in ns), "what it is"),
        rows=tuple(
            (
                method,
                *(_score(scores.get((method, n)), value) for n in ns),
                str(methods.get(method, "")),
            )
            for method in dict.fromkeys(row["method"] for row in means)
        ),
    )


def _clamps(name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Each clamp on the texts that it was chosen by, and the chosen one on those of the test."""
    return Table(
        title=f"{name}: clamp by clamp",
        about="How much cross-entropy rises on texts of the subject and on others, nats a token.",
        columns=("method", "texts", "features", "clamp", "forgotten", "side effect"),
        rows=tuple(
            (
                str(row["method"]),
                str(row["texts"]),
                f"{row['n']:,}",
                f"{row['strength']:g}",
                f"{row['forget_rise']:+.4f}",
                f"{row['retain_rise']:+.4f}",
            )
            for row in rows
        ),
    )


def _score(row: Mapping[str, Any] | None, value: str) -> str:
    if row is None or row[value] is None:
        return "–"
    half = row.get(f"{value}_interval")
    rounded = round(row[value], 3) + 0.0  # no -0.000
    return f"{rounded:+.3f}" + ("" if half is None else f" ± {half:.3f}")
