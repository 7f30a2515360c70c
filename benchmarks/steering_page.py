"""The page docs/reports/steering.md, made of steering_bench.csv and effect_agreement.csv."""

from collections.abc import Sequence
from math import sqrt

import numpy as np
from scipy.stats import rankdata

from benchmarks.quarters import certain, ratio_of
from benchmarks.quarters import ratio_words as interval_words

Row = dict[str, str]
PLANNED = 50
FIGURE = "images/steering_bench.png"
SETS = ("direct", "measured")
SCORES = ("output_score", "confidence_change", "measured_kl")
BOTH = "output_score_and_measured_kl"
"""the mean of a feature's ranks by the two"""
_DRAWS = 2000
_Z = 1.959964
_HEAD = (
    "# Which features steer, and by how much\n\n"
    "Random live features of the quick demo's SAE (TopK, 4,096 features, layer 9 of SmolLM2-135M), "
    "[added](../how-to/steer.md) at 1, 2 and 4 times their largest activation at every kept "
    "position. A feature's words are ten tokens: those that its decoder raises most (direct), or "
    "those measured to rise most when it is added where it is active (measured). Its "
    "rate is the share of generated tokens that are its words. A feature *succeeds* if, at the "
    "strength that is best for it among those whose KL divergence from the unsteered model is "
    "below 1 nat a token, its rate is above that of directions of the same norm that mean nothing "
    "(random, and of an untrained SAE), each at its own best strength, by the 95 % bootstrap "
    "interval over texts. *Target* judges likewise by the log-probability of its words on held-out "
    "text."
)

_NOT_MEASURED = (
    "The output score was published with another measure of success (Arad et al. 2025, arXiv "
    "2505.20063): the mean number of tokens, in 20 new ones at temperature 0.7 after each of 50 "
    "neutral beginnings, that are among the 20 which a feature's decoder raises most. That has no "
    "threshold, and with more tokens a feature it tells smaller effects. `python -m "
    "benchmarks.steering_texts` measures it of 200 features, beside random directions at the same "
    "collateral. It has not been run yet, so whether the output score says which features steer is "
    "open.",
    "",
)


def wilson(successes: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share.

    >>> [round(each, 3) for each in wilson(5, 10)]
    [0.237, 0.763]
    """
    if not count:
        return 0.0, 1.0
    share, unit = successes / count, _Z**2 / count
    middle = (share + unit / 2) / (1 + unit)
    half = _Z * sqrt(share * (1 - share) / count + unit / (4 * count)) / (1 + unit)
    return max(0.0, middle - half), min(1.0, middle + half)


def share(rows: Sequence[Row], column: str) -> str:
    """The share of rows that have a 1 in a column, with its interval."""
    successes = sum(int(row[column]) for row in rows)
    low, high = wilson(successes, len(rows))
    return f"{successes} of {len(rows)} ({100 * low:.0f} to {100 * high:.0f} %)"


def quartiles(rows: Sequence[Row], score: str) -> tuple[list[Row], list[Row]]:
    """The rows in the lowest and the highest quarter of a score."""
    known = sorted((row for row in rows if row[score]), key=lambda row: float(row[score]))
    quarter = len(known) // 4
    return known[:quarter], known[len(known) - quarter :]


def ratio_words(low: Sequence[Row], high: Sequence[Row], column: str) -> str:
    """By how much a quarter succeeds more often than another, and whether that is twice."""
    few, many = (sum(int(row[column]) for row in rows) for rows in (low, high))
    if not few:
        return "reached" if many else "neither succeeds"
    return f"{many / few:.1f} times: {'reached' if many >= 2 * few else 'not reached'}"


def figure(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Panels of bars: shares that succeed, of all features and by quarters of the output score."""
    panels = {}
    for column, judged in (("succeeds", "rate"), ("target_succeeds", "target")):
        for name in SETS:
            own = [row for row in rows if row["words"] == name]
            low, high = quartiles(own, "output_score")
            parts = {"top quarter": high, "all features": own, "bottom quarter": low}
            bars = {
                part: np.mean([int(row[column]) for row in each]) for part, each in parts.items()
            }
            null = "null_succeeds" if column == "succeeds" else "target_null_succeeds"
            bars["random direction"] = np.mean([int(row[null]) for row in own])
            if any(bars.values()):  # of no successes the table says enough
                panels[f"{name} words, by {judged}"] = {part: float(x) for part, x in bars.items()}
    return panels


def page(rows: Sequence[Row], agreement: Sequence[Row], texts: Sequence[str] = ()) -> str:
    """The whole page in Markdown. texts: lines of the section on generated text."""
    first = rows[0]
    by_set = {name: [row for row in rows if row["words"] == name] for name in SETS}
    lines = [
        _HEAD,
        "",
        f"Written by `python -m benchmarks.steering_bench` from "
        f"`benchmarks/results/steering_bench.csv`: {len(by_set['direct'])} features, "
        f"{first['texts']} held-out texts each, {first['new_tokens']} new tokens, temperature 1, "
        f"all directions with the same random numbers ({first['date']}, {first['processor']}, "
        f"{first['threads']} thread). Intervals of shares are Wilson's. Some "
        f"{int(first['texts']) * int(first['new_tokens'])} generated tokens at a strength show "
        "only rates of some per cent, and so few texts only large effects: a feature that does not "
        "succeed may still steer a little.",
        *_unfinished(len(by_set["direct"])),
        "",
        "## How many features raise their own words at KL < 1",
        "",
        "| words | succeed | a random direction in their stead | by target | a random direction "
        "in their stead | median best strength | median KL there |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, own in by_set.items():
        lines.append(
            f"| {name} | {share(own, 'succeeds')} | {share(own, 'null_succeeds')} | "
            f"{share(own, 'target_succeeds')} | {share(own, 'target_null_succeeds')} | "
            f"{_median(own, 'strength')} × | "
            f"{_median(own, 'kl')} |"
        )
    lines += [
        "",
        f"![Shares of features that succeed, by quarters of the output score]({FIGURE})",
        "",
    ]
    lines += _by_score(by_set)
    lines += ["", *(texts or _NOT_MEASURED), *_agreement(agreement)]
    return "\n".join(lines) + "\n"


def _unfinished(count: int) -> list[str]:
    missing = PLANNED - count
    return (
        [] if missing <= 0 else ["", f"The command goes on with the other {missing} of {PLANNED}."]
    )


def _median(rows: Sequence[Row], column: str) -> str:
    found = [float(row[column]) for row in rows if row[column]]
    return f"{np.median(found):.2g}" if found else "none"


def _by_score(by_set: dict[str, list[Row]]) -> list[str]:
    lines = [
        "## Does a score say which",
        "",
        "The goal was that the top quarter by output score succeeds at least twice as often as the "
        "bottom quarter. The last column is Spearman's correlation over all features of the score "
        "with the lower end of the target's interval above the null, with its own 95 % bootstrap "
        "interval over features.",
        "",
        "| score | words | bottom quarter | top quarter | twice | by target, bottom | top | twice "
        "| correlation |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    by_set = {name: with_both(own) for name, own in by_set.items()}
    for score in (*SCORES, BOTH):
        for name, own in by_set.items():
            low, high = quartiles(own, score)
            cells = [score.replace("_", " "), name]
            for column in ("succeeds", "target_succeeds"):
                cells += [share(low, column), share(high, column), ratio_words(low, high, column)]
            lines.append(f"| {' | '.join([*cells, correlation(own, score)])} |")
    ahead = [
        f"{gain(own, score)} with {name} words by the {score.replace('_', ' ')}"
        for score in ("output_score", "measured_kl", BOTH)
        for name, own in by_set.items()
    ]
    lines += [
        "",
        "The last score is the mean of a feature's ranks by two others; it was tried after these "
        "had been seen. By target the top quarter is ahead of the bottom one, in points of per "
        "cent with 95 % bootstrap intervals over features: " + "; ".join(ahead) + ". "
        "With so few features a quarter, a ratio of two or more is not established where the "
        "interval has 0 in it.",
        "",
        *_ratios(by_set),
    ]
    return lines


def _ratios(by_set: dict[str, list[Row]]) -> list[str]:
    """Ratios of the quarters with intervals; and the best score of one half in the other."""

    def found(rows: Sequence[Row], score: str) -> tuple[float, float, float]:
        known = [row for row in rows if row[score]]
        values = [float(row["target_succeeds"]) for row in known]
        return ratio_of(np.array([float(row[score]) for row in known]), np.array(values))

    def known(rows: Sequence[Row]) -> list[str]:
        return [score for score in (*SCORES, BOTH) if sum(bool(row[score]) for row in rows) >= 8]

    ratios = [
        f"{interval_words(found(own, score))} with {name} words by the {score.replace('_', ' ')}"
        for score in (*SCORES, BOTH)
        for name, own in by_set.items()
        if score in known(own)
    ]
    lines = [
        "As ratios of the top to the bottom quarter by target, with intervals likewise (bold: "
        "twice or more, and the interval excludes once): " + "; ".join(ratios) + ".",
        "",
        "Of four scores the best is too good by luck. So the one with the largest ratio in every "
        "other feature was chosen, and tested with the rest:",
        "",
        "| words | chosen | where it was chosen | with the other half |",
        "|---|---|---|---|",
    ]
    for name, own in by_set.items():
        first, second = own[::2], own[1::2]
        best = max(known(own), key=lambda score: certain(found(first, score)))
        two = [interval_words(found(half, best)) for half in (first, second)]
        lines.append(f"| {name} | {best.replace('_', ' ')} | {' | '.join(two)} |")
    return lines


def with_both(rows: Sequence[Row]) -> list[Row]:
    """The rows with the mean of their ranks by output score and measured KL; "" where unknown."""
    names = ("output_score", "measured_kl")
    known = [row for row in rows if all(row[name] for name in names)]
    if not known:
        return [{**row, BOTH: ""} for row in rows]
    ranks = np.mean([rankdata([float(row[name]) for row in known]) for name in names], axis=0)
    found = {row["feature"]: str(rank) for row, rank in zip(known, ranks, strict=True)}
    return [{**row, BOTH: found.get(row["feature"], "")} for row in rows]


def gain(rows: Sequence[Row], score: str) -> str:
    """By how much the top quarter's share by target is above the bottom one's, in points."""
    known = [row for row in rows if row[score]]
    if len(known) < 4:
        return "unknown"

    def points(own: Sequence[Row]) -> float:
        low, high = quartiles(own, score)
        few, many = (np.mean([int(row["target_succeeds"]) for row in each]) for each in (low, high))
        return 100 * float(many - few)

    rng = np.random.default_rng(0)
    drawn = [
        points([known[n] for n in rng.integers(0, len(known), len(known))]) for _ in range(_DRAWS)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return f"{points(known):+.0f} ({low:+.0f} to {high:+.0f})"


def correlation(rows: Sequence[Row], score: str) -> str:
    """Spearman's correlation of a score with how surely the target is above the null."""
    above = "target_above_null_low"
    known = [row for row in rows if row[score] and row[above]]
    if len(known) < 4:
        return "too few"
    pairs = np.array([(float(row[score]), float(row[above])) for row in known])
    if np.ptp(pairs, axis=0).min() == 0:
        return "all are equal"
    rng = np.random.default_rng(0)
    drawn = [_spearman(pairs[rng.integers(0, len(pairs), len(pairs))]) for _ in range(1000)]
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return f"{_spearman(pairs):+.2f} ({low:+.2f} to {high:+.2f})"


def _spearman(pairs: np.ndarray) -> float:
    if np.ptp(pairs[:, 0]) == 0 or np.ptp(pairs[:, 1]) == 0:
        return float("nan")
    ranks = rankdata(pairs, axis=0)
    return float(np.corrcoef(ranks.T)[0, 1])


def _agreement(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    first = rows[0]
    lines = [
        "## Which estimate foretells a feature's effect",
        "",
        f"Of {first['features']} random features, among those that fire in enough of 100 random "
        f"sequences (commoner ones, that is), the change of log-probabilities was measured at "
        f"positions in 8 of these; the mean change at {first['held_out']} is held out. Pearson's "
        "correlation over the vocabulary (median over features) and how many of the ten most "
        "raised tokens are the same (mean), with 95 % bootstrap intervals over features; written "
        "by `python -m benchmarks.effect_agreement`.",
        "",
        "| estimate | positions | correlation | of ten |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['estimate']} | {row['contexts']} | {float(row['correlation']):.2f} "
        f"({float(row['correlation_low']):.2f} to {float(row['correlation_high']):.2f}) | "
        f"{float(row['same_of_ten']):.1f} ({float(row['same_low']):.1f} to "
        f"{float(row['same_high']):.1f}) |"
        for row in rows
    ]
    lines += [
        "",
        "Four positions of the feature's own agree as well as the Jacobian over 32 positions of "
        "anything, and cost this SAE about the same (16,000 and 18,000 variants of an activation), "
        "so `saescope effects` measures: that also has an error for every token, and a strength at "
        "which the model bends. The Jacobian's cost does not grow with the SAE, so it is the "
        "cheaper one for SAEs that are much wider. Both foretell far more than the direct effect "
        "does.",
    ]
    return lines
