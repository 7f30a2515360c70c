"""Charts of evaluations: densities, groups of rows, probes, letters, and quality against L0."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from dashboards.reports.measured import Evaluation
from saescope.metrics import metric
from saescope.pieces import Chart, Series, by_name

ValueT = TypeVar("ValueT")
AGAINST_L0 = ("fvu", "delta_ce")
MOST_LINES = 6
"""SAEs that a chart has lines of; the tables have all"""
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _first(found: Mapping[str, ValueT]) -> tuple[dict[str, ValueT], str]:
    """Those that there is room for in a chart, and what is to be said of the others."""
    some = dict(list(found.items())[:MOST_LINES])
    left = len(found) - len(some)
    return some, f" Drawn are the first {MOST_LINES} of {len(found)}." if left else ""


def densities(evaluations: Sequence[Evaluation]) -> Iterator[Chart]:
    """How many features fire how often."""
    found = {}
    for each in evaluations:
        histogram = each.sections.get("reconstruction", {}).get("density_histogram")
        if histogram:
            found[each.name] = (histogram["log10_edges"], histogram["features"])
    found, more = _first(found)
    filled = [n for _, counts in found.values() for n, count in enumerate(counts) if count]
    if not filled:
        return
    first, last = min(filled), max(filled)
    yield Chart(
        key="densities",
        title="How often features fire",
        about="Features by the share of the rows that they fire on, four bins a decade. Features "
        f"that never fire are in none.{more}",
        x="share of the rows",
        y="features",
        kind="steps",
        series=tuple(
            Series(
                name=name,
                x=tuple(10.0**edge for edge in edges[first : last + 2]),
                y=tuple(counts[first : last + 1]),
            )
            for name, (edges, counts) in found.items()
        ),
        log_x=True,
        form=",.0f",
    )


def row_groups(evaluations: Sequence[Evaluation]) -> Iterator[Chart]:
    """FVU by position in the sequence, and by how common the token is."""
    for key, title, x, name in (
        ("by_position", "FVU by position", "position in the sequence", _positions),
        ("by_token_share", "FVU by how common the token is", "share of all tokens", _shares),
    ):
        tables = {
            each.name: each.sections.get("row_groups", {}).get(key) or () for each in evaluations
        }
        tables, more = _first({name: rows for name, rows in tables.items() if rows})
        groups = sorted({(row["from"], row["below"]) for rows in tables.values() for row in rows})
        if not groups:
            continue
        number = {group: float(index) for index, group in enumerate(groups)}
        yield Chart(
            key=key,
            title=title,
            about="Squared error over squared deviation from the mean of all rows, with 95% "
            f"intervals over documents.{more}",
            x=x,
            y="FVU",
            series=(
                *by_name(
                    {
                        run: {
                            number[row["from"], row["below"]]: (row["fvu"], row["fvu_interval"])
                            for row in rows
                        }
                        for run, rows in tables.items()
                    }
                ),
            ),
            ticks=tuple(name(low, high) for low, high in groups),
        )


def _positions(low: float, below: float) -> str:
    return f"{low:.0f}" if low == below - 1 else f"{low:.0f}–{below - 1:.0f}"


def _shares(low: float, below: float) -> str:
    return f"< {_power(below)}" if not low else f"≥ {_power(low)}"


def _power(share: float) -> str:
    """A power of ten.

    >>> _power(1e-6), _power(1.0)
    ('10⁻⁶', '1')
    """
    exponent = round(math.log10(share))
    return f"10{str(exponent).translate(_RAISED)}" if exponent else "1"


def probes(evaluations: Sequence[Evaluation]) -> Iterator[Chart]:
    """Mean AUC of probes by the number of features: of one SAE beside baselines, or of several."""
    tables = {
        each.name: [
            row for row in each.families["probing"]["over_sets"] if row["setting"] == "normal"
        ]
        for each in evaluations
        if "probing" in each.families
    }
    if not tables:
        return
    single = len(tables) == 1
    tables, more = _first(tables)
    lines: dict[str, dict[float, tuple[float | None, float | None]]] = {}
    for name, rows in tables.items():
        ks = {row["k"] for row in rows if row["method"] != "raw"}
        for row in rows:
            if not single and row["method"] != "sae":
                continue
            line = lines.setdefault(row["method"] if single else name, {})
            # all coordinates: a level, whatever k is
            for k in ks if row["method"] == "raw" else {row["k"]}:
                line[float(k)] = (row["auc"], row["auc_interval"])
    yield Chart(
        key="probing",
        title="Probes by the number of features",
        about="Mean AUC over sets of labelled texts, in the normal setting, with 95% intervals "
        f"over sets.{more}",
        x="features (k)",
        y="AUC",
        series=(*by_name(lines),),
        log_x=True,
    )


def letters(evaluations: Sequence[Evaluation]) -> Iterator[Chart]:
    """Absorption letter by letter."""
    tables: dict[str, Mapping[str, Any]] = {}
    for each in evaluations:
        rows = each.families.get("absorption", {}).get("by_letter", ())
        for method in dict.fromkeys(row["method"] for row in rows):
            if method == "sae" or len(evaluations) == 1:
                name = each.name if method == "sae" else f"{each.name}, {method}"
                tables[name] = {row["letter"]: row for row in rows if row["method"] == method}
    tables, more = _first(tables)
    names = sorted({letter for rows in tables.values() for letter in rows})
    if not names:
        return
    yield Chart(
        key="letters",
        title="Absorption by first letter",
        about="How far other latents stand in for the letter's own: mean absorption fraction over "
        f"words that the probe gets right.{more}",
        x="letter",
        y="absorption fraction",
        kind="bars",
        series=(
            *by_name(
                {
                    name: {
                        float(names.index(key)): (row["fraction"], None)
                        for key, row in rows.items()
                    }
                    for name, rows in tables.items()
                }
            ),
        ),
        ticks=(*names,),
        form=".3f",
    )


def against_l0(evaluations: Sequence[Evaluation]) -> Iterator[Chart]:
    """Quality against L0, a colour for each protocol; of two SAEs or more."""
    for name in AGAINST_L0:
        groups: dict[str, list[Evaluation]] = {}
        for each in evaluations:
            if each.value("l0") is not None and each.value(name) is not None:
                groups.setdefault(each.protocol_hash, []).append(each)
        if sum(map(len, groups.values())) < 2:
            continue
        yield Chart(
            key=f"{name}_against_l0",
            title=f"{metric(name).label} against L0",
            about="Lower, and further to the left, is better. SAEs of one colour were measured "
            "alike.",
            x=metric("l0").label,
            y=metric(name).title,
            kind="points",
            series=tuple(
                Series(
                    name=f"protocol {protocol[:12]}",
                    x=tuple(each.value("l0") or 0.0 for each in group),
                    y=tuple(each.value(name) for each in group),
                    half=tuple(each.half(name) for each in group),
                    labels=tuple(each.name for each in group),
                )
                for protocol, group in groups.items()
            ),
        )


def bits_against_fvu(evaluations: Sequence[Evaluation]) -> Iterator[Chart]:
    """Description length against distortion, a line for each width."""
    widths: dict[tuple[int, str], list[Evaluation]] = {}
    for each in evaluations:
        if each.value("description_bits") is not None and each.about.get("d_sae"):
            widths.setdefault((each.about["d_sae"], each.protocol_hash), []).append(each)
    if sum(map(len, widths.values())) < 2:
        return
    lines = {}
    alike = len({protocol for _, protocol in widths}) == 1
    for (width, protocol), group in sorted(widths.items()):
        lines[f"d_sae {width:,}" + ("" if alike else f", protocol {protocol[:12]}")] = {
            each.value("fvu_quantised") or 0.0: (
                each.value("description_bits"),
                each.half("description_bits"),
            )
            for each in group
        }
    yield Chart(
        key="bits",
        title="Description length against distortion",
        about="Bits mean something at equal distortion only: compare widths at one FVU.",
        x="FVU of what is received",
        y="bits a row",
        series=(*by_name(lines),),
        form=".1f",
    )
