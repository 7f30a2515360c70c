r"""How many induction features pass the prefix-length test, beside other features.

    saescope attention RUN
    python -m benchmarks.prefix_lengths --run RUN --page docs/reports/attention.md

Of the features that `saescope attention` counts to the family of induction some are drawn, and
fewer of all others; each is put to the test before the token that its heads read where it fires. A
row a feature: whether and from which length on a repeat raises it, and the same of the other drawn
induction features in the same texts, before whose tokens these are not. That is one null; the
features of other families are the other. An interrupted run goes on.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.attention import figure
from benchmarks.running import run
from benchmarks.steering_page import wilson
from sae.analysis.attention.prefix import PrefixTest, prefix_tests
from sae.analysis.attention.results_file import read_attention
from sae.bench import rows as results
from sae.commands.attention import attention_file
from sae.data.harvests import load_harvested_model, open_harvest
from sae.data.provenance import weights_hash
from sae.formats.load import load
from saescope.artefact import write_bytes
from saescope.config import Config
from saescope.errors import ArtefactError, check_range
from saescope.progress import Progress, say

COLUMNS = (
    "date",
    "site",
    "sae_hash",
    "chosen",
    "feature",
    "next_token",
    "text",
    "firings",
    "induction_share",
    "verdict",
    "half_length",
    "effect",
    "effect_half_width",
    "others",
    "others_raised",
    "texts",
    "lengths",
    "seed",
    "threads",
    "processor",
    "torch",
    "saescope",
    "commit",
)
LENGTHS = (1, 2, 3, 4, 6, 8)
VERDICTS = ("short-prefix", "long-prefix", "none")
_START, _END = "<!-- table: benchmarks.prefix_lengths -->", "<!-- end of table of lengths -->"


@dataclass(frozen=True, kw_only=True)
class PrefixLengthsConfig(Config):
    """Put random induction features, and others beside them, to the prefix-length test."""

    run: str
    """Folder of the run of an SAE at attention's outputs."""
    measured: str | None = None
    """Its attention.json, if that is not in the run's folder."""
    harvest: str | None = None
    """Harvest that it was trained on, if that has moved."""
    features: int = 40
    """Induction features, drawn at random."""
    others: int = 20
    """Features of no such family, drawn at random."""
    texts: int = 12
    """Texts of random tokens for each length."""
    seed: int = 0
    """Seed of all random choices."""
    results: str = "benchmarks/results/prefix_lengths.csv"
    """File that rows are added to."""
    page: str | None = None
    """Page whose table is written again from the results."""

    def __post_init__(self) -> None:
        check_range("features", self.features, low=1)
        check_range("others", self.others, low=0)


@dataclass(frozen=True)
class Drawn:
    """A feature to test, as `saescope attention` measured it."""

    chosen: str
    feature: int
    token: int
    firings: int
    share: float


def draw(
    found: Mapping[str, Any], config: PrefixLengthsConfig, special: Collection[int]
) -> list[Drawn]:
    """Induction features and others, each of a token, not special, that its heads read."""
    columns = found["features"]
    family, token = np.array(columns["family"]), np.array(columns["read_token"])
    able = ~np.isin(token, [-1, *special])
    rng, drawn = np.random.default_rng(config.seed), []
    for chosen, mine, count in (
        ("induction", family == "induction", config.features),
        ("other", family != "induction", config.others),
    ):
        for at in rng.permutation(np.flatnonzero(mine & able))[:count].tolist():
            number, read, firings = (
                int(columns[name][at]) for name in ("feature", "read_token", "firings")
            )
            share = float(columns["shares"]["induction"][at])
            drawn.append(Drawn(chosen, number, read, firings, share))
    return drawn


def rows_of(
    drawn: Sequence[Drawn], token: int, tests: Sequence[PrefixTest]
) -> list[dict[str, Any]]:
    """A row for each drawn feature of a token, from the tests of all of them in its texts."""
    by_feature = {test.feature: test.activation for test in tests}
    strangers = [each for each in drawn if each.chosen == "induction" and each.token != token]
    raised = sum(by_feature[each.feature].half_length is not None for each in strangers)
    rows = []
    for each in drawn:
        if each.token != token:
            continue
        curve = by_feature[each.feature]
        best = int(curve.effect.argmax())
        rows.append(
            {
                "chosen": each.chosen,
                "feature": each.feature,
                "next_token": token,
                "firings": each.firings,
                "induction_share": figure(each.share),
                "verdict": curve.verdict,
                "half_length": curve.half_length,
                "effect": figure(curve.effect[best]),
                "effect_half_width": figure(curve.half_width()[best]),
                "others": len(strangers),
                "others_raised": raised,
            }
        )
    return rows


def main(config: PrefixLengthsConfig) -> None:
    """Test every feature that the file has not, add its row, and write the page's table."""
    where = config.measured or str(attention_file(config.run))
    found, sae = read_attention(Path(where)), load(config.run)
    harvest, placement = open_harvest(sae, config.harvest, found["site"])
    if weights_hash(placement.sae) != found["sae_hash"]:
        raise ArtefactError("was measured with another SAE", where=where)
    model = load_harvested_model(harvest, "float32")
    drawn, path = draw(found, config, model.special_token_ids), Path(config.results)
    done = {
        int(row["feature"])
        for row in results.read(path, COLUMNS)
        if (row["sae_hash"], row["seed"]) == (found["sae_hash"], str(config.seed))
    }
    left = [each for each in drawn if each.feature not in done]
    about = {name: found[name] for name in ("site", "sae_hash")}
    about |= {"lengths": " ".join(map(str, LENGTHS)), "texts": config.texts, "seed": config.seed}
    about |= {k: v for k, v in results.facts("cpu").items() if k in COLUMNS}
    with Progress("features on repeats", len(left), "features") as progress:
        for token in dict.fromkeys(each.token for each in left):
            tests = prefix_tests(
                model,
                sae,
                [each.feature for each in drawn],
                token,
                lengths=LENGTHS,
                texts=config.texts,
                seed=config.seed,
                site=found["site"],
            )
            named = {**about, "text": model.token_strings([token])[0]}
            made = [row for row in rows_of(drawn, token, tests) if row["feature"] not in done]
            results.append(path, [{**row, **named} for row in made], COLUMNS)
            progress.advance(len(made))
    say(f"{path}: {len(drawn)} features")
    if config.page is not None:
        write_table(Path(config.page), results.read(path, COLUMNS), found["sae_hash"])


def write_table(page: Path, rows: Sequence[Mapping[str, str]], sae_hash: str) -> None:
    """Put the table in its place in a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(_START)
    table, after = "\n".join(table_lines(rows, sae_hash)), rest.partition(_END)[2]
    write_bytes(page, f"{before}{_START}\n\n{table}\n\n{_END}{after}".encode())


def table_lines(rows: Sequence[Mapping[str, str]], sae_hash: str) -> list[str]:
    """Shares of an SAE's features by verdict, with Wilson's intervals, beside both nulls."""
    mine = [row for row in rows if row["sae_hash"] == sae_hash]
    lines = [
        "| features | raised by a repeat | short-prefix | long-prefix "
        "| of half length 1, 2, 3, 4 or more |",
        "|---|---|---|---|---|",
    ]
    for chosen, title in (("induction", "induction"), ("other", "other families")):
        own = [row for row in mine if row["chosen"] == chosen]
        counts = {name: sum(row["verdict"] == name for row in own) for name in VERDICTS}
        halves = [int(row["half_length"]) for row in own if row["half_length"]]
        several = [sum(min(half, 4) == n for half in halves) for n in range(1, 5)]
        cells = [
            _share(each, len(own))
            for each in (len(own) - counts["none"], counts["short-prefix"], counts["long-prefix"])
        ]
        lines.append(f"| {title} | {' | '.join(cells)} | {', '.join(map(str, several))} |")
    own = [row for row in mine if row["chosen"] == "induction"]
    raised, tested = (sum(int(row[name]) for row in own) for name in ("others_raised", "others"))
    lines.append(
        f"| induction, in texts of another one's token | {100 * raised / max(1, tested):.1f} % of "
        f"{tested:,} | | | |"
    )
    first = mine[0]
    lines += [
        "",
        f"{first['texts']} texts a length ({first['lengths'].replace(' ', ', ')} tokens), seed "
        f"{first['seed']}; {first['date']}, {first['processor']}, {first['threads']} thread.",
    ]
    return lines


def _share(count: int, of: int) -> str:
    low, high = wilson(count, of)
    return f"{count} of {of} ({100 * low:.0f} to {100 * high:.0f} %)"


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run(PrefixLengthsConfig, main)
