"""The page docs/reports/recipe.md, made of the rows of recipe.csv and recipe_model.csv."""

from collections.abc import Sequence
from math import sqrt
from statistics import mean, stdev

from sae.evaluation.intervals import t_quantile

Row = dict[str, str]
SHOWN = ("f1", "mcc", "precision", "recall", "uniqueness", "explained_variance")
_HEAD = (
    "# A searched recipe\n\n"
    "A language model was set to search for better SAEs on SynthSAEBench-16k ("
    "[claude-auto-research-synthsaebench]"
    "(https://github.com/chanind/claude-auto-research-synthsaebench)), and reports F1 0.97 there, "
    "where published SAEs have 0.88 (200 million rows, L0 25). Its parts are options here: k "
    "falling to its value over the whole run (`sae.k_start`), one LISTA step (`sae.lista_eta`), "
    "prefixes of the features that fire most often (`sae.sort_by_frequency`), whose losses teach "
    "only the features that they add (`sae.detach_prefixes`), and a tilted loss "
    "(`trainer.loss.tilt`)."
)
_SIZES = (
    "The search's own sizes are scaled to this world: k from 2.4 times the L0, prefixes of 1/32, "
    "1/8 and 1/2 of the latents and all, a step of 0.3. Its tilt of 0.002 of a row's share of the "
    "mean loss is 0.01 here, which moves a row's weight by a few thousandths: that this part does "
    "nothing of note follows from its size."
)
_NOT_REACHED = (
    "Not reached: the 16k world, and runs as long as the published ones, which have 200 million "
    "rows. In a run as short as these no SAE is done learning, so they do not tell whether the "
    "options find more, or the same sooner."
)


def page(rows: Sequence[Row], model: Sequence[Row]) -> str:
    """The whole page in Markdown."""
    first = rows[0]
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        _HEAD,
        "",
        "## On the small synthetic world",
        "",
        "Written by `python -m benchmarks.recipe` from `benchmarks/results/recipe.csv`: "
        f"{len(seeds)} seeds (other weights, other rows, the same world), "
        f"{int(first['samples']):,} rows each, 512 latents, L0 8, a learning rate of "
        f"{float(first['lr_multiplier']):g} times the rule's, falling over the last third. Figures "
        "are means; beside them is the difference to the same architecture without options on the "
        "same seeds, with its 95% interval (Student's t, paired).",
        "",
        _SIZES,
        "",
        *table(rows),
        "",
        verdict(rows),
    ]  # fmt: skip
    if model:
        lines += ["", *_on_a_model(model)]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of the table of scores."""
    lines = [
        "| architecture | options | F1 | MCC | precision | recall | unique | variance explained "
        "| CPU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, options in dict.fromkeys((row["architecture"], row["options"]) for row in rows):
        own = of(rows, kind, options)
        cells = [kind, options]
        for name in SHOWN:
            cell = f"{mean(own[name].values()):.3f}"
            if name in SHOWN[:2] and options != "none":
                cell += f" ({_change(rows, kind, options, name)})"
            cells.append(cell)
        lines.append(f"| {' | '.join(cells)} | {mean(own['cpu_s'].values()):.0f} s |")
    return lines


def of(rows: Sequence[Row], kind: str, options: str) -> dict[str, dict[str, float]]:
    """The figures of an architecture with options, by name and seed."""
    own = [r for r in rows if (r["architecture"], r["options"]) == (kind, options)]
    return {name: {r["seed"]: float(r[name]) for r in own} for name in (*SHOWN, "cpu_s")}


def difference(
    rows: Sequence[Row], kind: str, options: str, name: str, base: tuple[str, str] | None = None
) -> tuple[float, float]:
    """The mean difference to the base on the same seeds, and the half width of its interval."""
    own, other = of(rows, kind, options)[name], of(rows, *(base or (kind, "none")))[name]
    found = [own[seed] - other[seed] for seed in own if seed in other]
    if len(found) < 2:
        return mean(found), float("nan")
    return mean(found), t_quantile(len(found) - 1) * stdev(found) / sqrt(len(found))


def _change(rows: Sequence[Row], kind: str, options: str, name: str) -> str:
    middle, half = difference(rows, kind, options, name)
    return f"{middle:+.3f} ± {half:.3f}"


def verdict(rows: Sequence[Row]) -> str:
    """Which way it falls, in words."""
    everything = max((row["options"] for row in rows), key=len)
    words = []
    for name in SHOWN[:2]:
        for base in ("batchtopk", "matryoshka"):
            middle, half = difference(rows, "matryoshka", everything, name, (base, "none"))
            change = f"{middle:+.3f} ± {half:.3f}, {_said(middle, half)}"
            words.append(f"{name.upper()} against {base}: {change}")
    together = f"**All together** (matryoshka, {everything}): {'; '.join(words)}."
    alone = dict.fromkeys(
        (row["architecture"], row["options"])
        for row in rows
        if " " not in row["options"] and row["options"] != "none"
    )
    said = [f"{o} ({k}) {_said(*difference(rows, k, o, 'f1'))}" for k, o in alone]
    return f"{together} Alone, by F1: {', '.join(said)}.\n\n{_NOT_REACHED}"


def _said(middle: float, half: float) -> str:
    if not abs(middle) > half:
        return "cannot tell"
    return "better" if middle > 0 else "worse"


def _on_a_model(rows: Sequence[Row]) -> list[str]:
    """The section on a language model."""
    names = ("l0", "fvu", "delta_ce", "delta_ce_interval")
    lines = [
        "## On a language model",
        "",
        "Written by `python -m benchmarks.recipe_model` from "
        "`benchmarks/results/recipe_model.csv`: the quick harvest of SmolLM2-135M "
        f"(`configs/harvest/smollm2-135m-quick.toml`), {float(rows[0]['passes']):g} passes, one "
        "seed, so that no interval over seeds is known; that of delta CE is over documents.",
        "",
        "| architecture | options | L0 | FVU | delta CE | CPU |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        l0, fvu, ce, half = (float(row[name]) for name in names)
        cells = [row["architecture"], row["options"], f"{l0:.1f}", f"{fvu:.4f}"]
        cells += [f"{ce:.4f} ± {half:.4f}", f"{float(row['cpu_s']):.0f} s"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *_in_words(rows)]


def _in_words(rows: Sequence[Row]) -> list[str]:
    """All together against each architecture without options, on a model."""
    *plain, together = sorted(rows, key=lambda row: len(row["options"]))
    said = [
        f"against {row['architecture']} FVU {float(together['fvu']) / float(row['fvu']) - 1:+.0%}, "
        f"delta CE {float(together['delta_ce']) / float(row['delta_ce']) - 1:+.0%}"
        for row in plain
    ]
    return [f"All together, at equal L0: {'; '.join(said)}."] if said else []
