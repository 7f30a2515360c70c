"""Rows of results, and the table made of them."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from saescope.artefact import write_bytes

OWN, TUNED = "own settings", "tuned learning rate"
COLUMNS: tuple[str, ...] = (
    "date", "library", "version", "variant", "data", "d_in", "d_sae", "k", "tokens", "batch", "lr",
    "normaliser", "warmup_steps", "decay_steps", "dead_after_tokens", "seed", "held_out_rows",
    "l0", "fvu", "fvu_interval", "cosine", "dead_fraction",
    "training_seconds_not_a_speed_benchmark", "torch", "cpu", "commit",
)  # fmt: skip
KEY = (*COLUMNS[1 : COLUMNS.index("seed") + 1],)
"""equal in rows of the same training"""


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV file, unless it has one of the same training."""
    known = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as stream:
            known = list(csv.DictReader(stream))
    if any(all(other[name] == str(row[name]) for name in KEY) for other in known):
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows([*known, row])
    write_bytes(path, text.getvalue().encode())


def report(rows: list[dict[str, Any]], libraries: Iterable[str]) -> list[str]:
    """A Markdown table: each library's own settings, and its best learning rate."""
    lines = [
        "| library | settings | lr | L0 | FVU | cosine | dead |",
        "|---|---|---|---|---|---|---|",
    ]
    for library in libraries:
        mine = [row for row in rows if row["library"] == library]
        best = min(mine, key=lambda row: float(row["fvu"]))
        own = next(row for row in mine if row["variant"] == OWN)
        for row, label in ((own, "own"), (best, "best of all tried")):
            lines.append(
                f"| {library} {row['version']} | {label} | {row['lr']} | {row['l0']} "
                f"| {row['fvu']} ± {row['fvu_interval']} | {row['cosine']} "
                f"| {row['dead_fraction']} |"
            )
    return lines
