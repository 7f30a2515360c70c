"""A report as one HTML page that needs nothing else: no script, no server, no other file."""

import html
from collections.abc import Iterable
from dataclasses import replace

from dashboards.reports import drawing
from dashboards.tokens import plain_visible
from saescope.pieces import Report, Section, Table

MARK = '<meta name="generator" content="saescope report">'
"""by which a page is known to be one of these"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;max-width:1180px;
margin:0 auto;padding:1.6rem 1.2rem 3rem;color:#1d2330;background:#fff}
h1{font-size:1.6rem;line-height:1.25;margin:.2rem 0 .6rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.2rem 0 .4rem;padding-top:.8rem;border-top:1px solid #8884}
h3{font-size:1rem;margin:1.2rem 0 .2rem;overflow-wrap:anywhere}
p{max-width:46rem;margin:.3rem 0;overflow-wrap:anywhere}
.quiet{opacity:.72;font-size:.86rem;margin:.1rem 0 .4rem}
.warning{border-left:4px solid #d98032;background:#d9803222;padding:.5rem .8rem;border-radius:3px}
.wide{overflow-x:auto;margin:.5rem 0}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.26rem .8rem .26rem 0;border-bottom:1px solid #8883;
vertical-align:top;white-space:nowrap}
th{font-weight:600;white-space:normal}th:first-child,td:first-child{text-align:left}
.words,.names{text-align:left}
.words{white-space:normal;overflow-wrap:anywhere;min-width:7rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr));
gap:1.4rem 2.2rem;margin:1rem 0}
.charts figure{max-width:34rem}
details{margin:.6rem 0}summary{cursor:pointer}
@media(prefers-color-scheme:dark){body{color:#e6e8ec;background:#12151b}}
@media print{details{display:none}}
"""


def page(report: Report) -> str:
    """The whole page."""
    title = html.escape(plain_visible(report.title))
    words = "".join(f"<p>{_text(each)}</p>" for each in report.words)
    warnings = "".join(f'<p class="warning">{_text(each)}</p>' for each in report.warnings)
    body = "".join(_section(each) for each in report.sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{MARK}'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}{drawing.STYLE}</style></head>"
        f"<body><h1>{title}</h1>{words}{warnings}{body}</body></html>\n"
    )


def _section(section: Section) -> str:
    charts = "".join(map(drawing.figure_html, section.charts))
    numbers = [replace(c.numbers(), title=f"{c.title}: numbers") for c in section.charts]
    details = [*section.details, *numbers]
    return (
        f"<section><h2>{_text(section.title)}</h2>"
        + "".join(f"<p>{_text(each)}</p>" for each in section.words)
        + "".join(map(table_html, section.tables))
        + (f'<div class="charts">{charts}</div>' if charts else "")
        + "".join(map(_folded, details))
        + "</section>"
    )


def _folded(table: Table) -> str:
    return (
        f"<details><summary>{_text(table.title)}</summary>"
        f"{table_html(Table(columns=table.columns, rows=table.rows))}</details>"
    )


def table_html(table: Table) -> str:
    """A table, with its title and what it is above it."""
    heading = f"<h3>{_text(table.title)}</h3>" if table.title else ""
    about = f'<p class="quiet">{_text(table.about)}</p>' if table.about else ""
    classes = [_class(table, n, number) for n, number in enumerate(table.of_numbers())]
    head = f"<tr>{_cells('th', table.columns, classes)}</tr>"
    rows = "".join(f"<tr>{_cells('td', row, classes)}</tr>" for row in table.rows)
    return f'{heading}{about}<div class="wide"><table>{head}{rows}</table></div>'


def _class(table: Table, n: int, number: bool) -> str:
    """How a column is set: as the first is, as numbers, as names, or as sentences."""
    if n == 0 or (number and table.rows):
        return ""
    return "words" if any(len(row[n]) > 40 for row in table.rows) else "names"


def _cells(tag: str, texts: Iterable[str], classes: Iterable[str]) -> str:
    return "".join(
        f'<{tag} class="{kind}">{_text(each)}</{tag}>' if kind else f"<{tag}>{_text(each)}</{tag}>"
        for each, kind in zip(texts, classes, strict=True)
    )


def _text(text: str) -> str:
    return html.escape(plain_visible(text), quote=True) if text else ""
