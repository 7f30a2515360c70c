"""The part of docs/reports/steering.md that is made of steering_texts.csv."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.quarters import certain, quarters, ratio_of, ratio_words
from benchmarks.steering_page import BOTH, SCORES, SETS, Row, quartiles, share, with_both

COLUMNS = (
    "date",
    "store",
    "feature",
    "words",
    "output_score",
    "confidence_change",
    "measured_kl",
    "largest",
    "strength",
    "kl",
    "count",
    "expected",
    "unsteered_expected",
    "random_count",
    "random_expected",
    "random_most",
    "succeeds",
    "prompts",
    "new_tokens",
    "temperature",
    "nulls",
    "seed",
    "processor",
    "threads",
    "saescope",
    "commit",
)
RANKINGS = (*SCORES, BOTH)
_DRAWS = 2000
_MEASURES = {
    "count": "own words",
    "above": "above random",
    "succeeds": "succeed",
}


def values_of(rows: Sequence[Row], measure: str) -> NDArray[np.float64]:
    """A column of each row; "above" are expected words less those with random directions."""
    if measure == "above":
        return np.array([float(row["expected"]) - float(row["random_expected"]) for row in rows])
    return np.array([float(row[measure]) for row in rows])


def ratio(rows: Sequence[Row], score: str, measure: str) -> tuple[float, float, float]:
    """`ratio_of` a score and a measure of success."""
    return ratio_of(np.array([float(row[score]) for row in rows]), values_of(rows, measure))


def section(rows: Sequence[Row]) -> list[str]:
    """The section's lines; none without rows."""
    if not rows:
        return []
    by_set = {
        name: with_both([row for row in rows if row["words"] == name and row["measured_kl"]])
        for name in SETS
    }
    return [
        *_head(by_set),
        *_successes(by_set),
        "",
        *_by_score(by_set),
        "",
        *_by_halves(by_set),
        "",
    ]


def _head(by_set: dict[str, list[Row]]) -> list[str]:
    own = by_set["direct"]
    first, kl = own[0], values_of(own, "kl")
    return [
        "## In generated text, at one collateral",
        "",
        f"The measure of success of Arad et al. (2025, arXiv 2505.20063) of {len(own)} random live "
        f"features: how many of {first['new_tokens']} new tokens, at temperature "
        f"{first['temperature']}, are among the 20 that the feature's decoder raises most "
        f"(direct), or the 10 measured to rise most (measured); mean over {first['prompts']} "
        "neutral beginnings (the paper has 50 others, and texts end with their first sentence). "
        f"Each feature and each of {first['nulls']} random directions is added at every kept "
        "position, each at the strength at which KL on held-out text comes nearest to 0.7 nats a "
        f"token: {np.median(kl):.2f} in the median of features, {kl.min():.2f} to {kl.max():.2f} "
        f"in all. A feature *succeeds* if its own words are expected more often than with each of "
        f"the {first['nulls']} random directions, which of features no better than these "
        f"{100 / (1 + int(first['nulls'])):.0f} % do. Expected is by the probabilities from which "
        "tokens were drawn. Written by `python -m benchmarks.steering_texts` into "
        f"`benchmarks/results/steering_texts.csv` ({first['date']}, {first['processor']}, "
        f"{first['threads']} thread).",
        "",
    ]


def _successes(by_set: dict[str, list[Row]]) -> list[str]:
    lines = [
        "| words | succeed | own words a text | expected | with random directions | unsteered |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in by_set.items():
        columns = ("count", "expected", "random_expected", "unsteered_expected")
        cells = [_mean(values_of(own, column)) for column in columns]
        lines.append(f"| {name} | {share(own, 'succeeds')} | {' | '.join(cells)} |")
    return lines


def _mean(values: NDArray[np.float64]) -> str:
    rng = np.random.default_rng(0)
    drawn = values[rng.integers(0, len(values), (_DRAWS, len(values)))].mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return f"{values.mean():.2f} ({low:.2f} to {high:.2f})"


def _by_score(by_set: dict[str, list[Row]]) -> list[str]:
    lines = [
        "Top over bottom quarter of each score, with 95 % bootstrap intervals over features; bold "
        "where it is twice or more and the interval excludes once. *Own words* is the paper's "
        "measure; *above random* is expected words less those expected with random directions, so "
        "that words which are common anyway do not count.",
        "",
        "| score | words | own words: bottom, top | times | above random: bottom, top | times "
        "| succeed: bottom | top | times |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for score in RANKINGS:
        for name, own in by_set.items():
            scores = np.array([float(row[score]) for row in own])
            cells = [score.replace("_", " "), name]
            for measure in _MEASURES:
                low, high = quarters(scores, values_of(own, measure))
                if measure == "succeeds":
                    cells += [share(each, measure) for each in quartiles(own, score)]
                else:
                    cells.append(f"{low:.2f}, {high:.2f}")
                cells.append(ratio_words(ratio(own, score, measure)))
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _by_halves(by_set: dict[str, list[Row]]) -> list[str]:
    """The score that is best in one half of the features, tested in the other."""
    lines = [
        "A score that is chosen after seeing all of these is too good by luck. So the one with the "
        "largest ratio among every other feature was chosen, and tested with the rest:",
        "",
        "| words | measure | chosen | where it was chosen | with the other half |",
        "|---|---|---|---|---|",
    ]
    for name, own in by_set.items():
        for measure, title in _MEASURES.items():
            first, second = own[::2], own[1::2]
            best = max(RANKINGS, key=lambda score: certain(ratio(first, score, measure)))
            lines.append(
                f"| {name} | {title} | {best.replace('_', ' ')} | "
                f"{ratio_words(ratio(first, best, measure))} | "
                f"{ratio_words(ratio(second, best, measure))} |"
            )
    return lines
