"""The page docs/reports/recovery.md, made of the rows of planted.csv."""

from statistics import mean, stdev

from saescope.metrics import metric

Row = dict[str, str]
_L0, _FVU, _DEAD = metric("l0"), metric("fvu"), metric("dead_fraction")

_TITLES = {
    "zipf": "Independent features",
    "correlated": "Correlated features",
    "hierarchical": "Parents and children",
}


def page(rows: list[Row]) -> str:
    """The whole page in Markdown."""
    first = rows[0]
    seeds = len({row["seed"] for row in rows})
    lines = [
        "# Planted dictionaries",
        "",
        "Data made of known directions, so that what an SAE finds can be counted. Written by "
        "`python -m benchmarks.planted` from `benchmarks/results/planted.csv`; figures are means "
        f"over {seeds} seeds (each another dictionary and other initial weights), ± their standard "
        "deviation. Whether training with hidden coordinates finds planted atoms better is on a "
        "page of its own: [Hiding data helps](../papers/hiding-data.md).",
        "",
        f"{first['true']} true unit directions in {first['d_in']} dimensions, {first['active']} "
        "active a row on average with Zipf frequencies and strengths uniform on [1, 2], a "
        f"constant, no noise; dictionaries of {first['d_sae']}, {first['steps']} steps of "
        f"{first['batch']} rows, target L0 {first['target_l0']}. Each architecture has its "
        "default settings but for that. A transcoder writes targets of the same features in other "
        "directions; a crosscoder sees the data as two sites.",
        "",
        "*Recovery* is the mean over true directions of the largest |cos| with a decoder row; "
        "*found* the part of them above 0.9; *matched* the mean |cos| when no row may serve two; "
        "*rarest* the recovery of the tenth that fires least. The control is the best of four: "
        "the SAE before its first step, random rows, principal directions, and a non-negative "
        "factorisation with as many parts. " + _verdict(rows),
        "",
        "Read with care: the targets of transcoders are largely linear in the input here, so the "
        "linear part of a skip transcoder leaves its features little to say; L1 penalties shrink "
        "activations at so low an L0, which their FVU shows and recovery does not; recovery falls "
        "short of 1 where one row stands for features that fire together.",
    ]
    for data in dict.fromkeys(row["data"] for row in rows):
        lines += ["", f"## {_TITLES[data]}", ""]
        lines += _table([row for row in rows if row["data"] == data])
    if "hierarchical" in {row["data"] for row in rows}:
        lines += ["", "## Absorption", "", _ABSORPTION, ""]
        lines += _absorption([row for row in rows if row["data"] == "hierarchical"])
    return "\n".join(lines) + "\n"


_ABSORPTION = (
    "On rows where a child is on, and its parent with it. The parent's latent is the one whose "
    "decoder row has the largest |cos| with the parent. *Absorbed*: it does not fire, and another "
    "latent with a |cos| of at least 0.1 with the parent carries at least 0.4 of the parent's true "
    "amount; *fraction*: the mean part of the parent's amount that the three strongest other "
    "latents carry, as SAEBench defines it; *missed*: it does not fire; *missed alone*: the same "
    "on rows where no child is on; *parents found*: |cos| of its row with the parent above 0.9."
)


def _control(row: Row) -> float:
    return max(float(row[name]) for name in ("untrained", "pca", "nmf"))


def _verdict(rows: list[Row]) -> str:
    margins = [(float(row["recovery"]) - _control(row), row["kind"], row["data"]) for row in rows]
    below = dict.fromkeys(f"{kind} ({data})" for more, kind, data in margins if more <= 0)
    if below:
        return f"Not above it in some training: {', '.join(below)}."
    least, kind, data = min(margins)
    return f"Every training is above it, by {least:.2f} at least ({kind}, {data})."


def _table(rows: list[Row]) -> list[str]:
    lines = [
        f"| architecture | recovery | control | found | matched | rarest | {_L0.label} | "
        f"{_FVU.label} | {_DEAD.label} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        control = mean(max(float(row[name]) for name in ("untrained", "pca", "nmf")) for row in own)
        cells = [
            kind,
            _spread(own, "recovery"),
            f"{control:.2f}",
            *(_mean(own, name, 2) for name in ("recovered_share", "matched", "rarest")),
            _L0.shown(_mean_of(own, "l0")),
            _FVU.shown(_mean_of(own, "fvu")),
            _DEAD.shown(_mean_of(own, "dead")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _absorption(rows: list[Row]) -> list[str]:
    lines = [
        "| architecture | absorbed | fraction | missed | missed alone | parents found | "
        f"{_L0.label} |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        others = ("absorption_fraction", "parent_missed", "parent_missed_alone", "parents_found")
        cells = [
            kind,
            _spread(own, "absorption"),
            *(_mean(own, name, 2) for name in others),
            _L0.shown(_mean_of(own, "l0")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _mean(rows: list[Row], name: str, digits: int) -> str:
    return f"{_mean_of(rows, name):.{digits}f}"


def _mean_of(rows: list[Row], name: str) -> float:
    return mean(float(row[name]) for row in rows)


def _spread(rows: list[Row], name: str, digits: int = 3) -> str:
    values = [float(row[name]) for row in rows]
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"
