"""Rows of results, and what they say: on which side of the best peer's front ours is."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from benchmarks.peers.fronts import Point, error_at, front, hull, side
from saescope.artefact import write_bytes

OWN, OUR_LR = "own settings", "our learning rate"
COLUMNS: tuple[str, ...] = (
    "date", "library", "version", "architecture", "variant", "control", "value", "data", "d_in",
    "d_sae", "tokens", "batch", "lr", "normaliser", "warmup_steps", "decay_steps",
    "dead_after_tokens", "seed", "settings", "held_out_rows", "l0", "fvu", "fvu_interval", "cosine",
    "dead_fraction", "ce_tokens", "delta_ce", "delta_ce_interval",
    "training_seconds_not_a_speed_benchmark", "torch", "cpu", "commit", "run",
)  # fmt: skip
MEASURES = (("fvu", "FVU", 4), ("delta_ce", "delta CE (nats)", 3))
SIDES = ("inside", "on", "outside", "not reached")
Row = Mapping[str, Any]


def read_rows(path: Path) -> dict[str, dict[str, str]]:
    """The rows of a results file, by run; none if there is no file."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as stream:
        return {row["run"]: row for row in csv.DictReader(stream)}


def append_row(path: Path, row: Row) -> dict[str, str]:
    """Add a row to a results file; the row as it stands there."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows([*read_rows(path).values(), row])
    write_bytes(path, text.getvalue().encode())
    return read_rows(path)[row["run"]]


def report(rows: Sequence[Row], ours: Sequence[Row]) -> str:
    """In Markdown: for each architecture and measure, every row beside the best and beside ours.

    Args:
        rows: of the peers.
        ours: means over seeds: architecture, l0, fvu, delta_ce.
    """
    parts = [
        "# Peers beside ours\n\n"
        "Made by `python -m benchmarks.peers.architectures`; how, and what the columns mean: "
        "[benchmarks/peers](../peers/README.md). Ours: [pareto.csv](pareto.csv), means over seeds, "
        "straight lines in log L0 between its points.\n"
    ]
    for architecture in dict.fromkeys(row["architecture"] for row in rows):
        theirs = [row for row in rows if row["architecture"] == architecture]
        mine = [row for row in ours if row["architecture"] == architecture]
        for measure, label, digits in MEASURES:
            lines = list(_table(theirs, mine, measure, digits))
            parts.append(
                f"## {architecture}, {label}\n\n{_summary(theirs, mine, measure)}\n\n"
                f"| library | settings | control | L0 | {label} | best peer there | ours there "
                "| ours is |\n|---|---|---|---|---|---|---|---|\n" + "\n".join(lines) + "\n"
            )
    return "\n".join(parts)


def judged(
    theirs: Sequence[Row], mine: Sequence[Row], measure: str
) -> Iterator[tuple[Row, float, float | None, str]]:
    """Each peer's row, with the best peer's error and ours at its L0, and ours' side of the two."""
    finite = [row for row in theirs if isfinite(float(row[measure]))]
    best = hull(_points(finite, measure))
    our_front = front(_points(mine, measure))
    for row in sorted(finite, key=_l0):
        l0 = _l0(row)
        there = error_at(best, l0)
        assert there is not None  # the front begins at the smallest L0 of its rows
        our_error = error_at(our_front, l0)
        yield row, there, our_error, side(our_error, there, float(row[f"{measure}_interval"]))


def summary(rows: Sequence[Row], ours: Sequence[Row]) -> Iterator[str]:
    """A line for each architecture and measure."""
    for architecture in dict.fromkeys(row["architecture"] for row in rows):
        theirs = [row for row in rows if row["architecture"] == architecture]
        mine = [row for row in ours if row["architecture"] == architecture]
        for measure, label, _ in MEASURES:
            yield f"{architecture}, {label}: {_summary(theirs, mine, measure)}"


def _summary(theirs: Sequence[Row], mine: Sequence[Row], measure: str) -> str:
    if not mine:
        return "no rows of ours to compare with."
    sides = [each[-1] for each in judged(theirs, mine, measure)]
    counts = ", ".join(f"{name} at {sides.count(name)}" for name in SIDES if name in sides)
    return f"Of the L0s of {len(theirs)} rows, ours is: {counts}."


def _table(theirs: Sequence[Row], mine: Sequence[Row], measure: str, digits: int) -> Iterator[str]:
    for row, best, our_error, verdict in judged(theirs, mine, measure):
        cells = [
            f"{row['library']} {row['version']}",
            f"{row['variant']} (lr {row['lr']})",
            f"{row['control']} {row['value']}",
            f"{float(row['l0']):.2f}",
            f"{float(row[measure]):.{digits}f} ± {float(row[f'{measure}_interval']):.{digits}f}",
            f"{best:.{digits}f}",
            "" if our_error is None else f"{our_error:.{digits}f}",
            verdict,
        ]
        yield f"| {' | '.join(cells)} |"


def _points(rows: Iterable[Row], measure: str) -> list[Point]:
    return [Point(_l0(row), float(row[measure])) for row in rows]


def _l0(row: Row) -> float:
    return max(float(row["l0"]), 1e-3)  # its logarithm is taken
