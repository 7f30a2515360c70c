"""The benchmark of prefix lengths: what is drawn, what a row says, and the table."""

import numpy as np

from benchmarks.prefix_lengths import Drawn, PrefixLengthsConfig, draw, rows_of, table_lines
from sae.analysis.attention.prefix import PrefixCurve, PrefixTest


def measured(feature: int, effect: list[float]) -> PrefixTest:
    null = np.random.default_rng(feature).normal(size=(2, 12)) * 0.01
    repeated = null[:, ::-1] + np.array(effect)[:, None]
    curve = PrefixCurve(lengths=(1, 4), repeated=repeated, shuffled=null)
    return PrefixTest(feature=feature, next_token=7, activation=curve, log_prob=curve)


def test_features_are_drawn_by_family_and_have_a_token() -> None:
    columns = {
        "feature": list(range(30)), "family": ["induction", "local", "mixed"] * 10,
        "read_token": [-1, 2, 5, *range(3, 30)], "firings": [10] * 30,
        "shares": {"induction": [n / 30 for n in range(30)]},
    }  # fmt: skip
    config = PrefixLengthsConfig(run="r", features=20, others=5)
    drawn = draw({"features": columns}, config, {2, 3})
    induction = [each for each in drawn if each.chosen == "induction"]
    assert sorted(each.feature for each in induction) == [6, 9, 12, 15, 18, 21, 24, 27]
    others = [each for each in drawn if each.chosen == "other"]
    assert len(others) == 5
    assert all(each.feature % 3 and each.feature != 1 for each in others)
    assert all(each.token == columns["read_token"][each.feature] for each in drawn)
    assert induction[0].share == induction[0].feature / 30


def test_a_row_has_the_features_verdict_and_what_strangers_do_there() -> None:
    drawn = [
        Drawn("induction", 1, 7, 20, 0.9), Drawn("induction", 2, 8, 20, 0.8),
        Drawn("induction", 3, 9, 20, 0.7), Drawn("other", 4, 7, 20, 0.1),
    ]  # fmt: skip
    tests = [
        measured(1, [0.2, 1.0]),
        measured(2, [1.0, 1.0]),
        measured(3, [0.0, 0.0]),
        measured(4, [0.0, 0.0]),
    ]
    first, second = rows_of(drawn, 7, tests)
    assert (first["feature"], first["verdict"], first["half_length"]) == (1, "long-prefix", 4)
    assert (second["feature"], second["chosen"], second["verdict"]) == (4, "other", "none")
    # features 2 and 3 are of other tokens; 2 is raised here all the same
    assert [(row["others"], row["others_raised"]) for row in (first, second)] == [(2, 1), (2, 1)]
    assert float(first["effect"]) == 1.0 or abs(float(first["effect"]) - 1) < 0.05
    facts = {"sae_hash": "h", "texts": "12", "lengths": "1 4", "seed": "0", "date": "d",
             "processor": "p", "threads": "1"}  # fmt: skip
    rows = [{**{k: "" if v is None else str(v) for k, v in row.items()}, **facts}
            for row in (first, second)]  # fmt: skip
    lines = table_lines(rows, "h")
    assert lines[2] == (
        "| induction | 1 of 1 (21 to 100 %) | 0 of 1 (0 to 79 %) | 1 of 1 (21 to 100 %) "
        "| 0, 0, 0, 1 |"
    )
    assert lines[3].startswith("| other families | 0 of 1 (0 to 79 %) | 0 of 1")
    assert lines[4].startswith("| induction, in texts of another one's token | 50.0 % of 2 |")
