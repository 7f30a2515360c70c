"""A paper's page in Markdown: its claim, what was run, the result beside its null, a verdict."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dashboards.reports import drawing, markdown
from sae.reproduction.claims import Claim
from sae.reproduction.paper import Findings, Paper, Picture
from saescope.pieces import Chart, Table
from saescope.progress import duration

_INK = "svg{color:#1d2330;background:#fff;font-family:system-ui,sans-serif}"
_FACTS = (("processor", "processor"), ("threads", "threads"), ("torch", "PyTorch"))


def page(
    name: str,
    paper: Paper,
    trials: Sequence[Mapping[str, Any]],
    findings: Findings,
    *,
    quick: bool,
    results: str,
) -> str:
    """The whole page. Charts are files `NAME-KEY.svg` beside it (see `pictures`)."""
    flag = " --quick" if quick else ""
    lines = [
        f"# {paper.title}",
        "",
        f"{paper.citation}.",
        "",
        f"**{findings.verdict.capitalize()}.** {findings.why}",
        "",
        "## What the paper claims",
        "",
        paper.claim,
        "",
        "## What was run",
        "",
        *(line for words in paper.run for line in (words, "")),
        f"{_machine(trials)} `saescope reproduce {name}{flag}` runs it; every trial is in "
        f"`{results}`.",
        "",
        "## What came out",
        "",
    ]
    lines += markdown.table(_claims(findings.claims))
    for table in findings.tables:
        lines += markdown.table(table)
    for chart in findings.charts:
        lines += [f"### {chart.title}", "", f"![{chart.title}]({picture_name(name, chart)})", ""]
        lines += [chart.about, ""] if chart.about else []
    for picture in findings.pictures:
        file = picture_name(name, picture)
        lines += [f"### {picture.title}", "", f"![{picture.title}]({file})", "", picture.about, ""]
    lines += ["## Is this the paper's claim, or an easier one?", "", paper.easier, ""]
    if paper.scale:
        lines += ["## At the paper's scale", "", paper.scale, ""]
        lines += [f"- `configs/papers/{each}`" for each in paper.configs]
    return "\n".join(lines).rstrip("\n") + "\n"


def picture_name(name: str, shown: Chart | Picture) -> str:
    """The file of a chart or picture, beside the page."""
    return f"{name}-{shown.key}.{'svg' if isinstance(shown, Chart) else 'png'}"


def pictures(name: str, findings: Findings) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files that the page shows."""
    for chart in findings.charts:
        yield picture_name(name, chart), drawing.alone(chart, _INK).encode()
    for picture in findings.pictures:
        yield picture_name(name, picture), base64.b64decode(picture.png)


def _claims(claims: Sequence[Claim]) -> Table:
    return Table(
        about="Beyond the null is how much further the result goes than what it stands beside, in "
        "the direction of the claim; ± is half of a 95% interval (Student's t over pairs). A claim "
        "holds if the whole interval is above 0.",
        columns=("claim", "result", "null", "beyond the null", "pairs", "holds"),
        rows=tuple(
            (
                each.says,
                f"{each.ours:{each.form}}",
                f"{each.null:{each.form}}",
                f"{each.gain:{each.form}}"
                + (f" ± {each.half:{each.form}}" if each.half is not None else ""),
                f"{each.pairs} {each.over}",
                "yes" if each.holds else "no",
            )
            for each in claims
        ),
    )


def _machine(trials: Sequence[Mapping[str, Any]]) -> str:
    seconds = sum(each["seconds"] for each in trials)
    seeds = {each["settings"].get("seed") for each in trials}
    known = [
        f"{label} {', '.join(sorted({str(each['facts'][key]) for each in trials}))}"
        for key, label in _FACTS
    ]
    several = "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    return f"{len(trials):,} trials, {several}, {duration(seconds)} in all ({'; '.join(known)})."


def verdicts(found: Mapping[str, tuple[Paper, Findings]]) -> str:
    """The table of all verdicts, in Markdown."""
    rows = tuple(
        (
            f"[{name}]({name}.md)",
            paper.title,
            findings.verdict,
            f"{sum(each.holds for each in findings.claims)} of {len(findings.claims)}",
            findings.why,
        )
        for name, (paper, findings) in sorted(found.items())
    )
    columns = ("name", "paper", "verdict", "claims that hold", "why")
    lines = ["# Papers, reproduced", ""]
    lines += [
        "Each page is written by `saescope reproduce NAME`, from trials that are kept beside it: "
        "the paper's claim, what was run, the result beside its null, and a verdict by the "
        "intervals. A result that contradicts its paper stays as it is.",
        "",
    ]
    lines += markdown.table(Table(columns=columns, rows=rows), escape=False)
    return "\n".join(lines).rstrip("\n") + "\n"
