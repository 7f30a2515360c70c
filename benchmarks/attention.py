"""Which families of features share the heads of a layer, and how induction acts there: a report.

    saescope attention RUN
    python -m benchmarks.attention RUN/attention.json --page docs/reports/attention.md

Adds what `saescope attention` measured to a table, a row a figure, each with its 95% interval over
texts and its null: of a family's share in a head, that of random directions read at the same
places; of the effective number of families, that of as many features of all heads; on repeats of
random tokens, repeats that are shuffled. `--page` writes the tables of the page again from the last
rows of each SAE.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.running import run
from sae.analysis.attention.results_file import read_attention
from sae.bench import rows as results
from saescope.artefact import write_bytes
from saescope.config import Config
from saescope.progress import say

COLUMNS = (
    "date",
    "site",
    "sae_hash",
    "kind",
    "of",
    "what",
    "value",
    "low",
    "high",
    "null",
    "null_to",
    "features",
    "texts",
    "tokens",
    "seed",
    "processor",
    "threads",
    "torch",
    "python",
    "saescope",
    "commit",
)
FAMILY, EFFECTIVE, HEAD, FEATURE = "family", "effective", "head_on_repeats", "feature_on_repeats"
_START, _END = "<!-- table: benchmarks.attention -->", "<!-- end of table -->"


@dataclass(frozen=True, kw_only=True)
class AttentionBenchmark(Config):
    """Keep what `saescope attention` measured, and write the report's tables."""

    measured: str
    """attention.json of a run."""
    results: str = "benchmarks/results/attention.csv"
    """File that rows are added to."""
    page: str | None = None
    """Page whose tables are written again from the results."""


def rows(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row a figure."""
    for row in found["heads"]:
        counted = {"of": f"{found['layer']}.{row['head']}", "features": row["features"]}
        for name, share in row["shares"].items():
            low, high = row["intervals"][name]
            yield {
                **counted, "kind": FAMILY, "what": name, "value": figure(share),
                "low": figure(low), "high": figure(high),
                "null": figure(row["random"].get(name, 0.0)),
            }  # fmt: skip
        if row["effective"] is not None:
            (low, high), (null, null_to) = row["effective_interval"], row["others"]
            yield {
                **counted, "kind": EFFECTIVE, "what": "families", "value": figure(row["effective"]),
                "low": figure(low), "high": figure(high), "null": figure(null),
                "null_to": figure(null_to),
            }  # fmt: skip
    for each in found["prefix_heads"]:
        yield from _curve(each, HEAD, f"{found['layer']}.{each['head']}")
    for each in found["prefix"]:
        name = f"{each['feature']} ({each['chosen']}) before {each['text']!r}"
        yield from _curve(each["activation"], FEATURE, name)


def _curve(curve: Mapping[str, Any], kind: str, of: str) -> Iterator[dict[str, Any]]:
    for number, length in enumerate(curve["lengths"]):
        value, null = curve["repeated"][number], curve["shuffled"][number]
        half = curve["half_width"][number]
        yield {
            "kind": kind, "of": of, "what": str(length), "value": figure(value),
            "low": figure(value - half), "high": figure(value + half), "null": figure(null),
        }  # fmt: skip


def figure(value: float) -> str:
    """A figure as it is written into the table."""
    return f"{value:.4g}"


def main(config: AttentionBenchmark) -> None:
    """Add the rows, and write the page's tables if that is asked for."""
    found = read_attention(Path(config.measured))
    protocol = found["protocol"]
    facts = {k: v for k, v in results.facts("cpu").items() if k in COLUMNS}
    about = {name: found[name] for name in ("site", "sae_hash")}
    about |= {name: protocol[name] for name in ("texts", "tokens", "seed")}
    made = [{**row, **about, **facts} for row in rows(found)]
    path = Path(config.results)
    results.append(path, made, COLUMNS)
    say(f"{path}: {len(made)} rows")
    if config.page is not None:
        page = Path(config.page)
        before, _, rest = page.read_text(encoding="utf-8").partition(_START)
        table = "\n".join(page_lines(results.read(path, COLUMNS)))
        write_bytes(page, f"{before}{_START}\n\n{table}\n{_END}{rest.partition(_END)[2]}".encode())


def page_lines(table: Sequence[Mapping[str, str]]) -> list[str]:
    """The page's tables: families by head, heads and features on repeats, of each SAE's last rows.

    Shares are in percent. After a mean on repeats is half of the interval of its difference to the
    null.
    """
    last = {(row["sae_hash"], row["kind"], row["of"], row["what"]): row for row in table}
    lines = []
    for site, sae_hash in dict.fromkeys((row["site"], row["sae_hash"]) for row in last.values()):
        mine = [row for row in last.values() if row["sae_hash"] == sae_hash]
        one = mine[0]
        lines += [
            f"`{site}`: {one['texts']} texts, {int(one['tokens']):,} tokens, seed {one['seed']}; "
            f"{one['date'][:10]}, {one['threads']} thread(s).",
            "",
            *_families(mine),
            "",
            *_repeats(mine, HEAD, "head"),
            "",
            *_repeats(mine, FEATURE, "feature"),
            "",
        ]
    return lines


def _families(mine: Sequence[Mapping[str, str]]) -> list[str]:
    names = list(dict.fromkeys(row["what"] for row in mine if row["kind"] == FAMILY))
    lines = [
        "| head | features | " + " | ".join(names) + " | effective families |",
        "|---" * (len(names) + 3) + "|",
    ]
    for head in dict.fromkeys(row["of"] for row in mine if row["kind"] == FAMILY):
        own = {(row["kind"], row["what"]): row for row in mine if row["of"] == head}
        cells = [_share(own[FAMILY, name]) for name in names]
        number = own[EFFECTIVE, "families"]
        cells.append(
            f"{number['value']} [{number['low']}, {number['high']}], "
            f"null {number['null']} to {number['null_to']}"
        )
        lines.append(f"| {head} | {number['features']} | " + " | ".join(cells) + " |")
    return lines


def _share(row: Mapping[str, str]) -> str:
    value, low, high, null = (100 * float(row[name]) for name in ("value", "low", "high", "null"))
    return f"{value:.0f} [{low:.0f}, {high:.0f}], null {null:.0f}"


def _repeats(mine: Sequence[Mapping[str, str]], kind: str, what: str) -> list[str]:
    own = [row for row in mine if row["kind"] == kind]
    lengths = list(dict.fromkeys(row["what"] for row in own))
    lines = [
        f"| {what} | " + " | ".join(f"{n} repeated" for n in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for each in dict.fromkeys(row["of"] for row in own):
        cells = {row["what"]: row for row in own if row["of"] == each}
        lines.append(f"| {each} | " + " | ".join(_with_null(cells[n]) for n in lengths) + " |")
    return lines


def _with_null(row: Mapping[str, str]) -> str:
    value, high, null = (float(row[name]) for name in ("value", "high", "null"))
    return f"{value:.3g} ± {high - value:.1g} (null {null:.2g})"


if __name__ == "__main__":
    run(AttentionBenchmark, main, positional="measured")
