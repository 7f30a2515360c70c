"""What `saescope eval --controls` measured, as a section of a report."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dashboards.reports.measured import Evaluation
from sae.evaluation.ranks import ranking_in_words
from saescope.metrics import Metric, shown_with_interval
from saescope.pieces import Section, Table

_WORDS = (
    "What a metric has to rank below the trained SAE: its features with each other's directions "
    "(permuted), random directions, an untrained SAE, principal components. Of suites of texts of "
    "their own, random is as many of the SAE's features drawn by chance. From a metric that cannot "
    "tell one of these, or ranks it above, nobody can tell that the SAE is good."
)


def controls_section(evaluations: Sequence[Evaluation]) -> Iterator[Section]:
    """A section with a table for each SAE that has controls; none if there are no such SAEs."""
    tables = [_table(each) for each in evaluations if each.controls is not None]
    if tables:
        yield Section(title="Controls", words=(_WORDS,), tables=(*tables,))


def _table(each: Evaluation) -> Table:
    assert each.controls is not None
    values, ranks = each.controls["values"], each.controls["ranks"]
    rows = [row for row in each.table.values() if ranks.get(row.name)]
    return Table(
        title=f"{each.name}: which controls its metrics tell",
        columns=("metric", *values, "better", "the metric"),
        rows=tuple(
            (
                row.title,
                *(_cell(row, own) for own in values.values()),
                row.better,
                ranking_in_words(row, ranks[row.name]),
            )
            for row in rows
        ),
    )


def _cell(row: Metric, values: Mapping[str, Any]) -> str:
    return "–" if values.get(row.name) is None else shown_with_interval(row, values)
