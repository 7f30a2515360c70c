"""A report as Markdown: every chart is a table of its numbers."""

import re
from collections.abc import Iterator

from dashboards.tokens import plain_visible
from saescope.pieces import Report, Section, Table

MARK = "<!-- saescope report -->"
"""by which a file is known to be one of these"""
_SIGNS = re.compile(r"([\\`*_{}\[\]<>#|~])")


def text(report: Report) -> str:
    """The whole file."""
    lines = [MARK, "", f"# {_escaped(report.title)}", ""]
    for words in report.words:
        lines += [_escaped(words), ""]
    for warning in report.warnings:
        lines += [f"> **{_escaped(warning)}**", ""]
    for section in report.sections:
        lines += _section(section)
    return "\n".join(lines).rstrip("\n") + "\n"


def _section(section: Section) -> Iterator[str]:
    yield from (f"## {_escaped(section.title)}", "")
    for words in section.words:
        yield from (_escaped(words), "")
    for each in (*section.tables, *(each.numbers() for each in section.charts), *section.details):
        yield from table(each)


def table(table: Table, *, escape: bool = True) -> Iterator[str]:
    """The lines of a table; its cells are Markdown already unless they are to be escaped."""
    if table.title:
        yield from (f"### {_escaped(table.title)}", "")
    if table.about:
        yield from (_escaped(table.about), "")
    aligned = ["---", *("---:" if number else "---" for number in table.of_numbers()[1:])]
    yield _row(table.columns)
    yield _row(aligned, escape=False)
    yield from (_row(each, escape) for each in table.rows)
    yield ""


def _row(cells: tuple[str, ...] | list[str], escape: bool = True) -> str:
    return f"| {' | '.join(_escaped(each) if escape else each for each in cells)} |"


def _escaped(words: str) -> str:
    return _SIGNS.sub(r"\\\1", plain_visible(words)) if words else ""
