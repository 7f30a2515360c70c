"""What a report of evaluations says: tables, charts, and what must be known to compare figures."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dashboards.reports import charts
from dashboards.reports.control_table import controls_section
from dashboards.reports.family_tables import family_tables
from dashboards.reports.measured import Evaluation
from dashboards.reports.protocols import protocol_warnings, protocols
from dashboards.reports.verdicts import beside_first
from sae.analysis.description_length import Described, Optimum, at_equal_distortion
from sae.evaluation.written import measured_on
from saescope.errors import InputError
from saescope.metrics import Metric, measured_rows
from saescope.pieces import Report, Section, Table

MOST_COLUMNS = 4
"""SAEs that stand side by side; more of them are rows"""
_TITLES = {
    "reconstruction": "Reconstruction and sparsity",
    "downstream": "The model's loss",
    "row_groups": "Some rows alone",
    "description_length": "Description length",
    "ravel": "RAVEL: attributes of entities",
    "scr": "SCR: spurious correlation removal",
    "tpp": "TPP: targeted probe perturbation",
    "unlearning": "Unlearning by clamps",
    "carried": "As it was when its store was made",
}
_CHARTS = {
    "reconstruction": charts.densities,
    "row_groups": charts.row_groups,
    "probing": charts.probes,
    "absorption": charts.letters,
    "description_length": charts.bits_against_fvu,
}


def report_of(evaluations: Sequence[Evaluation]) -> Report:
    """The report of one evaluation, or of several side by side; their names have to differ."""
    first = evaluations[0].name
    several = len(evaluations) > 1
    kinds = list(dict.fromkeys(name for each in evaluations for name in each.sections))
    quality = tuple(charts.against_l0(evaluations)) if several else ()
    beside = beside_first(evaluations) if several else None
    sections = [_section(kind, evaluations) for kind in kinds]
    return Report(
        title=f"Evaluation of {len(evaluations)} SAEs" if several else f"Evaluation of {first}",
        words=(
            "Measured on text that the SAE was not trained on. ± is half of a 95% interval.",
            *(problem for each in evaluations for problem in each.problems),
        ),
        warnings=protocol_warnings(evaluations),
        sections=(
            _saes(evaluations),
            *((Section(title="Quality against sparsity", charts=quality),) if quality else ()),
            *((beside,) if beside is not None else ()),
            *sections,
            *controls_section(evaluations),
            protocols(evaluations),
        ),
    )


def metric_table(section: str, evaluations: Sequence[Evaluation]) -> Table:
    """The metrics of a section with their intervals: of up to four SAEs a column each, of more a
    row each."""
    table = {name: row for each in evaluations for name, row in each.table.items()}
    names = {name: None for each in evaluations for name in each.sections.get(section, {})}
    rows = measured_rows(names, table)
    if len(evaluations) > MOST_COLUMNS:
        rows = [row for row in rows if not row.minor]
        return Table(
            columns=("SAE", *(row.title for row in rows)),
            rows=tuple(
                (each.name, *(_cell(each, section, row) for row in rows))
                for each in evaluations
                if section in each.sections
            ),
        )
    return Table(
        columns=("metric", *(names_of(evaluations)), "better"),
        rows=tuple(
            (
                row.title,
                *(_cell(each, section, row) for each in evaluations),
                "" if row.better == "neither" else row.better,
            )
            for row in rows
        ),
    )


def names_of(evaluations: Sequence[Evaluation]) -> list[str]:
    """What columns of values are called."""
    return ["value"] if len(evaluations) == 1 else [each.name for each in evaluations]


def _cell(each: Evaluation, section: str, row: Metric) -> str:
    return each.shown(section, row) or "–"


def _saes(evaluations: Sequence[Evaluation]) -> Section:
    return Section(
        title="SAEs",
        tables=(
            Table(
                columns=("SAE", "architecture", "inputs", "features", "protocol", "weights"),
                rows=tuple(
                    (
                        each.name,
                        str(each.about.get("architecture", "–")),
                        _count(each.about.get("d_in")),
                        _count(each.about.get("d_sae")),
                        each.protocol_hash[:12],
                        str(each.about.get("sae_hash", "–"))[:12],
                    )
                    for each in evaluations
                ),
            ),
        ),
    )


def _count(number: Any) -> str:
    return f"{number:,}" if isinstance(number, int) else "–"


def section_title(kind: str) -> str:
    """What a section of evaluation.json is called.

    >>> section_title("geometry"), section_title("row_groups")
    ('Geometry', 'Some rows alone')
    """
    return _TITLES.get(kind, kind.replace("_", " ").capitalize())


def _section(kind: str, evaluations: Sequence[Evaluation]) -> Section:
    there = [each for each in evaluations if kind in each.sections]
    on = dict.fromkeys(measured_on(kind, each.sections[kind]) for each in there)
    about = "; ".join(each for each in on if each != kind)
    table = metric_table(kind, evaluations)
    draw = _CHARTS.get(kind)
    return Section(
        title=section_title(kind),
        words=(
            *([f"{about[0].upper()}{about[1:]}."] if about else []),
            *(equal_distortion(there) if kind == "description_length" else ()),
        ),
        tables=(table, *_further(kind, there), *family_tables(kind, there)),
        charts=tuple(draw(there)) if draw else (),
        details=(*_meanings(kind, there), *_probing_settings(kind, there)),
    )


def _further(kind: str, evaluations: Sequence[Evaluation]) -> Iterator[Table]:
    if kind == "row_groups":
        yield from _documents(evaluations)
    if kind == "probing" and len(evaluations) <= MOST_COLUMNS:
        yield from _probing(evaluations, "normal")
    yield from _by_site(kind, evaluations)


def _documents(evaluations: Sequence[Evaluation]) -> Iterator[Table]:
    rows = []
    shares: Sequence[float] = ()
    for each in evaluations:
        spread = each.sections["row_groups"].get("by_document")
        if spread:
            shares = spread["quantiles"]
            rows.append(
                (
                    each.name,
                    *(each.table["fvu"].shown(value) for value in spread["fvu"]),
                    *(each.table["l0"].shown(value) for value in spread["l0"]),
                )
            )
    if rows:
        columns = [f"{name}, {share:.0%}" for name in ("FVU", "L0") for share in shares]
        yield Table(
            title="Over documents",
            about="The values that this share of the documents are not above.",
            columns=("SAE", *columns),
            rows=(*rows,),
        )


def _probing(evaluations: Sequence[Evaluation], setting: str) -> Iterator[Table]:
    for each in evaluations:
        if "probing" not in each.families:
            continue
        rows = [row for row in each.families["probing"]["over_sets"] if row["setting"] == setting]
        if not rows:
            continue
        ks = sorted({row["k"] for row in rows if row["method"] != "raw"})
        about = each.families["probing"].get("methods", {})
        yield Table(
            title=f"{each.name}: mean AUC, {setting.replace('_', ' ')} setting",
            about=f"Over {rows[0]['sets']} sets of labelled texts; of raw, all coordinates.",
            columns=("method", *(f"k = {k}" for k in ks), "all", "what it is"),
            rows=tuple(
                _method_row(method, ks, rows, about)
                for method in dict.fromkeys(row["method"] for row in rows)
            ),
        )


def _method_row(
    method: str, ks: Sequence[int], rows: Sequence[Mapping[str, Any]], about: Mapping[str, str]
) -> tuple[str, ...]:
    cells = {
        row["k"]: f"{row['auc']:.4f}"
        + ("" if row["auc_interval"] is None else f" ± {row['auc_interval']:.4f}")
        for row in rows
        if row["method"] == method
    }
    if method == "raw":
        return (method, *("" for _ in ks), *cells.values(), about.get(method, ""))
    return (method, *(cells.get(k, "") for k in ks), "", about.get(method, ""))


def _probing_settings(kind: str, evaluations: Sequence[Evaluation]) -> Iterator[Table]:
    if kind != "probing":
        return
    settings = dict.fromkeys(
        row["setting"]
        for each in evaluations
        for row in each.families.get("probing", {}).get("over_sets", ())
    )
    for setting in settings:
        if setting != "normal" or len(evaluations) > MOST_COLUMNS:
            yield from _probing(evaluations, setting)


def _by_site(kind: str, evaluations: Sequence[Evaluation]) -> Iterator[Table]:
    """Of SAEs of several layers, metrics at each of them."""
    for each in evaluations:
        values = each.sections[kind]
        rows = [
            row for row in measured_rows(values, each.table) if values.get(f"{row.name}_by_site")
        ]
        if rows:
            sites = dict.fromkeys(site for row in rows for site in values[f"{row.name}_by_site"])
            yield Table(
                title=f"{each.name}, site by site",
                columns=("site", *(row.title for row in rows)),
                rows=tuple(
                    (site, *(_at(row, values[f"{row.name}_by_site"], site) for row in rows))
                    for site in sites
                ),
            )


def _at(row: Metric, values: Mapping[str, Any], site: str) -> str:
    return row.shown(values[site]) if site in values else "–"


def _meanings(kind: str, evaluations: Sequence[Evaluation]) -> Iterator[Table]:
    rows = {
        row.name: (row.label, row.about)
        for each in evaluations
        for row in measured_rows(each.sections[kind], each.table)
    }
    if rows:
        yield Table(
            title="What these are", columns=("metric", "meaning"), rows=tuple(rows.values())
        )


def equal_distortion(evaluations: Sequence[Evaluation]) -> list[str]:
    """Which width takes fewest bits at one FVU, of SAEs of several widths that were measured alike.

    Nothing of fewer than two widths. L0 is told where it was measured too.
    """
    said = []
    for protocol in dict.fromkeys(each.protocol_hash for each in evaluations):
        there = [
            each
            for each in evaluations
            if each.protocol_hash == protocol and "description_length" in each.sections
        ]
        saes = list(filter(None, map(_described, there)))
        if len({each.d_sae for each in saes}) < 2:
            continue
        without = len(there) - len(saes)
        missing = f" Left out: {without} whose width or bits are unknown." if without else ""
        try:
            said.append(_optimum(at_equal_distortion(saes), saes) + missing)
        except InputError as error:
            said.append(f"Widths cannot be compared at one FVU: {error}.{missing}")
    return said


def _described(each: Evaluation) -> Described | None:
    """An SAE as `at_equal_distortion` takes it; None if its width or bits are unknown."""
    width, bits = each.about.get("d_sae"), each.value("description_bits")
    fvu, l0 = each.value("fvu_quantised"), each.value("l0")
    if not width or bits is None or fvu is None:
        return None
    return Described(d_sae=width, l0=math.nan if l0 is None else l0, fvu=fvu, bits=bits)


def _optimum(found: Optimum, saes: Sequence[Described]) -> str:
    """An optimum in a sentence."""
    each_width = ", ".join(
        f"d_sae {width:,}: {bits:.1f} bits a row"
        + ("" if math.isnan(found.l0[width]) else f" at L0 {found.l0[width]:.1f}")
        for width, bits in sorted(found.bits.items())
    )
    beyond = sorted({each.d_sae for each in saes} - found.bits.keys())
    also = f" (none on both sides of it: d_sae {', '.join(f'{n:,}' for n in beyond)})"
    best = f"fewest: d_sae {found.d_sae:,}" if len(found.bits) > 1 else "nothing to compare"
    return (
        f"At equal distortion, FVU {found.fvu:.4f}: {each_width}{also if beyond else ''}; {best}."
    )
