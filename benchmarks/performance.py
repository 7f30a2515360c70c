"""The page docs/reports/performance.md and its charts, from the rows of the results' files.

python -m benchmarks.performance
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import harvest, loader, performance_choices, performance_data
from benchmarks.charts import write_bars
from benchmarks.running import run
from benchmarks.steps import (
    ADAM,
    DENSE_TORCH,
    DICTIONARY,
    EXACT,
    LARGE,
    MID,
    ONEDNN,
    PRODUCTS,
    SAELENS,
    SCREENED,
    SIGNUM,
    SMALL,
    SPARSE,
    TORCH,
    Who,
)
from sae.bench import rows
from sae.bench.inputs import Shape
from saescope.artefact import write_bytes
from saescope.config import Config
from saescope.errors import InputError
from saescope.metrics import metric
from saescope.progress import say

Row = Mapping[str, str]
OTHERS = (SAELENS, SPARSE, DICTIONARY)
SPARSIFY = (SIGNUM, ADAM)
TOPK, PENALISED = ("topk",), ("jumprelu", "batchtopk", "relu")
_ONE_THREAD = (
    "Other work ran on the machine, so steps of one thread are compared by their seconds of "
    "processor, which is what they take on a core of their own. Where no other library is in a "
    "table, `saescope bench --what steps` made it, on planted weights."
)
NOTES = Path(__file__).parent / "performance_notes.md"


@dataclass(frozen=True, kw_only=True)
class PerformanceConfig(Config):
    """Write the page from the rows."""

    steps: str = "benchmarks/results/steps.csv"
    """Rows of `python -m benchmarks.steps`."""
    operations: str = "benchmarks/results/bench.csv"
    """Rows of `make bench`."""
    harvest: str = "benchmarks/results/harvest.csv"
    """Rows of `python -m benchmarks.harvest`."""
    loader: str = "benchmarks/results/loader.csv"
    """Rows of `python -m benchmarks.loader`."""
    docs: str = "docs/reports"
    """Folder of performance.md and images/performance_*.png."""


@dataclass(frozen=True)
class Target:
    """What a step of ours is to be: so many times faster than the fastest of others."""

    what: str
    over: str
    factor: float
    ours: tuple[Who, ...]
    theirs: tuple[Who, ...]
    kinds: tuple[str, ...] = TOPK
    shapes: tuple[Shape, ...] = (SMALL, MID, LARGE)


RESULTS = (EXACT, *SCREENED[:2])
"""Settings whose results are those of float32: every product in it, or those that may matter."""
FASTER = "the faster of SAELens and dictionary_learning"
TARGETS = (
    *(
        Target(f"TopK {shape}, exact", over, factor, RESULTS, theirs, shapes=(shape,))
        for shape in (SMALL, MID)
        for over, factor, theirs in ((FASTER, 10, OTHERS), ("sparsify", 3, SPARSIFY))
    ),
    *(
        Target(f"TopK {LARGE}, exact", over, factor, RESULTS, theirs, shapes=(LARGE,))
        for over, factor, theirs in (
            (FASTER, 12, OTHERS), ("sparsify", 3, SPARSIFY), ("dense oneDNN", 8, (ONEDNN,)),
        )
    ),
    Target("TopK at all three shapes, screened", "every product in fp32", 1.4, SCREENED, (EXACT,)),
    *(
        Target(f"{kind}, L0 32 to 64, exact", FASTER, 4, RESULTS, OTHERS, kinds=(kind,))
        for kind in PENALISED
    ),
    Target("TopK, the torch backend (no compiler)", FASTER, 5, (TORCH,), OTHERS),
)  # fmt: skip

NARROW_TARGETS = tuple(
    Target(what, over, factor, RESULTS, theirs, kinds=kinds, shapes=shapes)
    for what, kinds, shapes, compared in (
        *(
            (
                f"TopK {shape}, exact",
                TOPK,
                (shape,),
                (
                    (FASTER, 4, OTHERS),
                    ("sparsify", 2, SPARSIFY),
                    ("the torch backend", 1.25, (TORCH,)),
                    ("dense torch", 6, (DENSE_TORCH,)),
                    ("1.15 encoder products", 1 / 1.15, PRODUCTS),
                ),
            )
            for shape in (SMALL, MID)
        ),
        *((f"{kind}, exact", (kind,), (SMALL, MID), ((FASTER, 3, OTHERS),)) for kind in PENALISED),
    )
    for over, factor, theirs in compared
)
"""on processors without AVX-512"""


def seconds_of(row: Row) -> float:
    """Seconds of a step: of processor where it had one thread, which is what a free core takes."""
    return float(row["cpu_s"] if row["threads"] == "1" else row["median_s"])


def is_narrow(row: Row) -> bool:
    """Whether a row was measured without AVX-512: where there is none, or it was not used."""
    return "avx512f" not in row["instructions"].partition(";")[0]


def latest(found: Sequence[Row]) -> list[Row]:
    """The last row of each comparison, library and setting."""
    names = ("kind", "name", "batch", "d_in", "d_sae", "k", "data", "library", "setting")
    return list({(*(row[n] for n in names), row["dead"] != "0"): row for row in found}.values())


def of_last_machine(found: Sequence[Row]) -> list[Row]:
    """The rows measured where, and with as many threads as, the last one was."""
    return [row for row in found if _same_machine(row, found[-1])]


def _same_machine(row: Row, other: Row) -> bool:
    names = ("processor", "instructions", "threads", "torch")
    return all(row[name] == other[name] for name in names)


def shape_of(row: Row) -> Shape:
    """The shape that a row is of."""
    return Shape(*(int(row[name]) for name in ("batch", "d_in", "d_sae", "k")))


def comparisons(found: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by what was stepped: one architecture, shape, data and state of dead features."""
    groups: dict[str, list[Row]] = {}
    for row in latest(found):
        dead = "no dead features" if row["dead"] == "0" else f"{row['dead']} dead features"
        title = f"{row['name']}, {shape_of(row)}, {row['data']}, {dead}"
        groups.setdefault(title, []).append(row)
    return groups


def ratios(target: Target, groups: Mapping[str, Sequence[Row]]) -> dict[str, float]:
    """In each comparison that the target is about, how many times faster ours was."""
    found = {}
    for title, group in groups.items():
        row, shape = group[0], shape_of(group[0])
        sizes = {(s.batch, s.d_in, s.d_sae) for s in target.shapes}
        if row["name"] not in target.kinds or (shape.batch, shape.d_in, shape.d_sae) not in sizes:
            continue
        ours, theirs = _fastest(group, target.ours), _fastest(group, target.theirs)
        if ours is not None and theirs is not None:
            found[title] = theirs / ours
    return found


def ceilings(target: Target, groups: Mapping[str, Sequence[Row]]) -> dict[str, float]:
    """The ratio that a step would have which took no longer than the encoder's product alone."""
    return ratios(replace(target, ours=PRODUCTS), groups)


def _fastest(group: Sequence[Row], who: Sequence[Who]) -> float | None:
    times = [seconds_of(r) for r in group if (r["library"], r["setting"]) in who]
    return min(times, default=None)


def verdicts(
    groups: Mapping[str, Sequence[Row]], targets: Sequence[Target] = TARGETS
) -> Iterator[tuple[Target, dict[str, float], str]]:
    """Each target, what was measured for it, and whether it holds in all of that."""
    for target in targets:
        found = ratios(target, groups)
        holds = "not measured"
        if found:
            holds = "yes" if min(found.values()) >= target.factor else "**no**"
        yield target, found, holds


def page(
    steps: Sequence[Row],
    operations: Sequence[Row],
    harvested: Sequence[Row] = (),
    read: Sequence[Row] = (),
    narrow: Sequence[Row] = (),
) -> str:
    """The whole page in Markdown; parts without rows are left out.

    Args: narrow: steps on a processor without AVX-512.
    """
    groups = comparisons(steps)
    parts = [
        "# How long a training step takes",
        _machine(steps[-1]),
        "![Seconds of a TopK step](images/performance_topk.png)",
        "## Targets",
        "Times faster, over all comparisons below that a target is about: the least and the most. "
        "A target holds if the least reaches it. Exact is the faster of two settings with the same "
        "results: every product in float32, and the screen in 8 bits that is the default where it "
        "pays; the last column has the first of them alone.",
        "\n".join(_targets(groups)),
        _short(groups),
        "## Other architectures",
        "![Seconds of a step of other architectures](images/performance_others.png)",
        NOTES.read_text(encoding="utf-8").strip(),
        "## Every comparison",
        *(f"**{title}**\n\n" + "\n".join(_table(group)) for title, group in groups.items()),
    ]
    if of_machine := [row for row in operations if _same_machine(row, steps[-1])]:
        parts += ["## Operations", "\n".join(_operations(of_machine))]
    parts += performance_choices.section(operations)
    if narrow:
        parts += _narrow(narrow)
    parts += performance_data.section(harvested, read, most_consumed(steps))
    return "\n\n".join(parts) + "\n"


def _narrow(steps: Sequence[Row]) -> Iterator[str]:
    """Paragraphs on a processor without AVX-512."""
    groups = comparisons(steps)
    yield "## Processors without AVX-512"
    yield f"{_machine(steps[-1])} {_ONE_THREAD if steps[-1]['threads'] == '1' else ''}".strip()
    yield "\n".join(_targets(groups, NARROW_TARGETS))
    yield _short(groups, NARROW_TARGETS)
    for title, group in groups.items():
        yield f"**{title}**\n\n" + "\n".join(_table(group))


def most_consumed(steps: Sequence[Row], width: int = 768) -> float | None:
    """Tokens a second of the fastest training step of ours on rows of this width."""
    rates = [
        int(row["batch"]) / float(row["median_s"])
        for row in latest(steps)
        if row["library"] == "saescope" and int(row["d_in"]) == width
    ]
    return max(rates, default=None)


def _machine(row: Row) -> str:
    return (
        f"Measured on {row['date']}: {row['processor']} ({row['instructions']}), "
        f"{row['threads']} threads, torch {row['torch']}, Python {row['python']}, "
        f"saescope {row['saescope']} at {row['commit'][:12]}. Written by "
        "`python -m benchmarks.performance` from [steps.csv](../../benchmarks/results/steps.csv) "
        "and [bench.csv](../../benchmarks/results/bench.csv), which `make bench-peers` and "
        "`make bench` add to. Ratios are of this machine; the shapes are batch x d_in x d_sae x k."
    )


def _targets(
    groups: Mapping[str, Sequence[Row]], targets: Sequence[Target] = TARGETS
) -> Iterator[str]:
    yield "| step | over | target | measured | holds | every product in fp32 |"
    yield "|---|---|---|---|---|---|"
    for target, found, holds in verdicts(groups, targets):
        plain = ratios(replace(target, ours=(EXACT,)), groups) if target.ours == RESULTS else {}
        yield (
            f"| {target.what} | {target.over} | {target.factor:.3g}x | {_span(found)} | {holds} | "
            f"{_span(plain)} |"
        )


def _span(found: Mapping[str, float]) -> str:
    ends = sorted({min(found.values()), max(found.values())}) if found else []
    return " to ".join(f"{value:.2f}" for value in ends)


def _short(groups: Mapping[str, Sequence[Row]], targets: Sequence[Target] = TARGETS) -> str:
    lines = []
    for target, found, holds in verdicts(groups, targets):
        if holds == "not measured":
            lines.append(f"- {target.what} over {target.over}: not measured.")
        most = {} if target.ours == SCREENED else ceilings(target, groups)
        for title, value in found.items():
            if value >= target.factor:
                continue
            bound = f"; the encoder's product alone: {most[title]:.2f}x" if title in most else ""
            lines.append(
                f"- {target.what} over {target.over}: {value:.2f}x instead of "
                f"{target.factor:.3g}x ({title}{bound})."
            )
    if not lines:
        return "Every target holds in every comparison."
    return (
        "What falls short, with what a step would reach that took no longer than the encoder's own "
        "dense float32 product, which every step without a screen contains:\n\n" + "\n".join(lines)
    )


def _table(group: Sequence[Row]) -> Iterator[str]:
    exact = _fastest(group, (EXACT,))
    l0 = metric("l0")
    yield (
        "| library | setting | seconds | least | of processor | over our exact | "
        f"{l0.label} | rounds |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for row in sorted(group, key=seconds_of):
        seconds = seconds_of(row)
        over = "" if exact is None else f"{seconds / exact:.2f}"
        options = f" ({row['options']})" if row["options"] else ""
        yield (
            f"| {row['library']} {row['version']} | {row['setting']}{options} | "
            f"{float(row['median_s']):.3f} | "
            f"{float(row['least_s']):.3f} | {float(row['cpu_s']):.2f} | {over} | "
            f"{l0.shown(float(row['l0']))} | {row['rounds']} |"
        )


def _operations(found: Sequence[Row]) -> Iterator[str]:
    chosen = [row for row in latest(found) if row["kind"] == "operation"]
    settings = list(dict.fromkeys(row["setting"] for row in chosen))
    yield "Milliseconds of one operation on the codes of TopK (median), synthetic rows."
    yield ""
    yield f"| operation | shape | {' | '.join(settings)} |"
    yield "|---|---|" + "---|" * len(settings)
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in chosen:
        key = (row["name"], str(shape_of(row)))
        cells.setdefault(key, {})[row["setting"]] = f"{1000 * float(row['median_s']):.1f}"
    for (name, shape), times in cells.items():
        yield f"| {name} | {shape} | {' | '.join(times.get(s, '') for s in settings)} |"


def panels(found: Sequence[Row], kinds: Sequence[str]) -> dict[str, dict[str, float]]:
    """Bars of a chart: seconds by library and setting, where no feature is dead."""
    return {
        title: {f"{r['library']} {r['setting']}": seconds_of(r) for r in group}
        for title, group in comparisons(found).items()
        if group[0]["name"] in kinds and group[0]["dead"] == "0"
    }


def write(config: PerformanceConfig) -> None:
    """The page and its charts; InputError if there are no rows."""
    steps, docs = rows.read(Path(config.steps)), Path(config.docs)
    if not steps:
        raise InputError("no rows; run python -m benchmarks.steps", where=config.steps)
    operations = rows.read(Path(config.operations))
    narrow = of_last_machine([row for row in steps if is_narrow(row)])
    steps = of_last_machine([row for row in steps if not is_narrow(row)])
    for name, kinds in (("topk", TOPK), ("others", PENALISED)):
        bars = panels(steps, kinds)
        if bars:
            write_bars(docs / "images" / f"performance_{name}.png", bars, x="seconds of a step")
    text = page(
        steps, operations,
        rows.read(Path(config.harvest), harvest.COLUMNS),
        rows.read(Path(config.loader), loader.COLUMNS), narrow,
    )  # fmt: skip
    write_bytes(docs / "performance.md", text.encode())
    say(f"{docs / 'performance.md'}: {len(steps)} rows")


if __name__ == "__main__":
    run(PerformanceConfig, write)
