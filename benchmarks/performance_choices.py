"""What docs/reports/performance.md says of the backend that a run chooses for each operation."""

from collections.abc import Iterator, Mapping, Sequence

Row = Mapping[str, str]
AUTO = "auto"
_MACHINE = ("processor", "instructions", "threads", "torch")
_WHAT = ("name", "batch", "d_in", "d_sae", "k")


def section(operations: Sequence[Row]) -> Iterator[str]:
    """Paragraphs: each operation by each backend and as a run does it, on all machines with both.

    Of one thread seconds of processor, since other work may have run beside it.
    """
    machines: dict[tuple[str, ...], list[Row]] = {}
    for row in operations:
        machines.setdefault(tuple(row[name] for name in _MACHINE), []).append(row)
    tables = [rows for rows in machines.values() if any(row["setting"] == AUTO for row in rows)]
    if not tables:
        return
    yield "## The backend of each operation"
    yield (
        "Milliseconds of each operation by torch's operators, by C++, and as a run does it (auto): "
        "a run measures once a machine which is faster, and its manifest says what was chosen. On "
        "both kinds of processor C++ was, at all of them. Median; with one thread of processor "
        "time, since other work ran on the machine."
    )
    for rows in tables:
        last = rows[-1]
        yield (
            f"{last['processor']} ({last['instructions']}), {last['threads']} thread(s), "
            f"{last['date']}, saescope at {last['commit'][:12]}:"
        )
        yield "\n".join(_table(rows))


def slower(operations: Sequence[Row], *, by: float) -> list[str]:
    """Operations that took a run more than `by` times what another backend took."""
    return [
        " ".join(key)
        for key, times in _times(operations).items()
        if AUTO in times and times[AUTO] > by * min(times.values())
    ]


def _table(rows: Sequence[Row]) -> Iterator[str]:
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    yield f"| operation | shape | {' | '.join(settings)} |"
    yield "|---|---|" + "---|" * len(settings)
    for (name, *shape), times in _times(rows).items():
        cells = (f"{1000 * times[each]:.1f}" if each in times else "" for each in settings)
        yield f"| {name} | {'x'.join(shape)} | {' | '.join(cells)} |"


def _times(rows: Sequence[Row]) -> dict[tuple[str, ...], dict[str, float]]:
    """Seconds by operation and sizes, and by setting; a later row replaces an earlier one."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        seconds = float(row["cpu_s"] if row["threads"] == "1" else row["median_s"])
        found.setdefault(tuple(row[name] for name in _WHAT), {})[row["setting"]] = seconds
    return found
