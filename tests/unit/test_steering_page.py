"""The page of the steering bench: shares, quarters and verdicts by hand."""

import numpy as np
import pytest

from benchmarks import steering_page
from benchmarks.quarters import quarters, ratio_words
from benchmarks.steering_page import (
    BOTH,
    correlation,
    figure,
    gain,
    page,
    quartiles,
    wilson,
    with_both,
)
from benchmarks.steering_texts_page import ratio, section


def row(number: int, words: str, succeeds: int) -> dict[str, str]:
    return {
        "date": "2026-11-30", "store": "s", "feature": str(number), "words": words,
        "output_score": str(number / 8), "confidence_change": "0.5", "measured_kl": "",
        "strength": "2", "kl": "0.5", "target_above_null_low": str(number / 100),
        "succeeds": str(succeeds), "target_succeeds": "1", "null_succeeds": "0",
        "target_null_succeeds": "0", "texts": "5", "new_tokens": "12",
        "processor": "p", "threads": "1",
    }  # fmt: skip


ROWS = [row(n, words, int(n >= 5)) for n in range(8) for words in ("direct", "measured")]


def test_quarters_are_by_the_score() -> None:
    low, high = quartiles(ROWS[::2], "output_score")
    assert [each["feature"] for each in low] == ["0", "1"]
    assert [each["feature"] for each in high] == ["6", "7"]
    assert steering_page.ratio_words(low, high, "succeeds") == "reached"
    assert steering_page.ratio_words(high, low, "succeeds") == "0.0 times: not reached"
    assert steering_page.ratio_words(low, high, "target_succeeds") == "1.0 times: not reached"
    assert steering_page.ratio_words(low, low, "succeeds") == "neither succeeds"


def test_shares_have_wilsons_interval() -> None:
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_the_correlation_is_of_ranks() -> None:
    assert correlation(ROWS[::2], "output_score").startswith("+1.00 (")
    assert correlation(ROWS[::2], "measured_kl") == "too few"
    assert correlation(ROWS[::2], "confidence_change") == "all are equal"


def test_two_scores_are_one_by_the_mean_of_ranks() -> None:
    kl = ["0.8", "0.1", "", "0.2"]
    rows = [{**each, "measured_kl": x} for each, x in zip(ROWS[:8:2], kl, strict=True)]
    assert [each[BOTH] for each in with_both(rows)] == ["2.0", "1.5", "", "2.5"]


def test_the_gain_of_a_quarter_is_in_points() -> None:
    surely = [{**each, "target_succeeds": each["succeeds"]} for each in ROWS[::2] * 10]
    assert gain(surely, "output_score").startswith("+100 (+100 to +100")
    assert gain(ROWS[::2], "output_score") == "+0 (+0 to +0)"
    assert gain(ROWS[::2], "measured_kl") == "unknown"


def test_the_page_says_all_of_it() -> None:
    text = page(ROWS, [])
    assert (
        "| direct | 3 of 8 (14 to 69 %) | 0 of 8 (0 to 32 %) | 8 of 8 (68 to 100 %) | 0 of 8 "
        in text
    )
    assert "| output score | direct | 0 of 2 (0 to 66 %) | 2 of 2 (34 to 100 %) | reached |" in text
    assert "The command goes on with the other 42 of 50." in text
    assert "Which estimate foretells" not in text
    assert "It has not been run yet" in text
    assert "1.0 (1.0 to 1.0) with direct words by the output score" in text
    assert "| direct | output score | 1.0 (1.0 to 1.0) | 1.0 (1.0 to 1.0) |" in text
    bars = figure(ROWS)["direct words, by rate"]
    assert bars == {
        "top quarter": 1.0, "all features": 0.375, "bottom quarter": 0.0, "random direction": 0.0,
    }  # fmt: skip


def text_row(number: int, words: str, features: int) -> dict[str, str]:
    top = number >= features // 2
    return {
        "date": "2026-11-30", "feature": str(number), "words": words,
        "output_score": str(number), "confidence_change": str(-number), "measured_kl": "0.1",
        "kl": "0.6", "count": "3" if top else "1", "expected": "2.5" if top else "0.5",
        "random_expected": "0.5", "unsteered_expected": "0.4", "succeeds": str(int(top)),
        "prompts": "10", "new_tokens": "20", "temperature": "0.7", "nulls": "19",
        "processor": "p", "threads": "1",
    }  # fmt: skip


TEXTS = [text_row(n, words, 40) for n in range(40) for words in ("direct", "measured")]


def test_ratios_of_quarters_have_intervals_over_features() -> None:
    own = TEXTS[::2]
    assert quarters(np.array([3.0, 1, 2, 0]), np.array([5.0, 7, 6, 8])) == (8, 5)
    assert ratio(own, "output_score", "count") == (3, 3, 3)
    above, low, high = ratio(own, "output_score", "above")  # 2 over nothing
    assert (above, low, high) == (np.inf, np.inf, np.inf)
    assert ratio_words((above, low, high)) == "**∞** (∞ to ∞)"
    down, low, high = ratio(own, "confidence_change", "count")
    assert (down, low, high) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    value, low, high = ratio(own, "measured_kl", "count")  # all are equal: by the order of rows
    assert low < value
    assert ratio_words((2.0, 0.9, 3.0)) == "2.0 (0.9 to 3.0)"


def test_the_section_has_each_score_and_tests_the_chosen_one_on_the_other_half() -> None:
    lines = section(TEXTS)
    assert section([]) == []
    assert (
        "| direct | 20 of 40 (35 to 65 %) | 2.00 (1.70 to 2.30) | 1.50 (1.20 to 1.80) | "
        "0.50 (0.50 to 0.50) | 0.40 (0.40 to 0.40) |"
    ) in lines
    assert (
        "| output score | direct | 1.00, 3.00 | **3.0** (3.0 to 3.0) | 0.00, 2.00 | "
        "**∞** (∞ to ∞) | 0 of 10 (0 to 28 %) | 10 of 10 (72 to 100 %) | **∞** (∞ to ∞) |"
    ) in lines
    chosen = [line for line in lines if line.startswith("| direct | own words |")]
    assert chosen == [
        "| direct | own words | output score | **3.0** (3.0 to 3.0) | **3.0** (3.0 to 3.0) |"
    ]
    text = page(ROWS, [], lines)
    assert "It has not been run yet" not in text
    assert text.index("In generated text") > text.index("Does a score say which")
