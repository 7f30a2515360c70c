"""Suites of texts put controls beside an SAE unit by unit; planted numbers, by hand."""

from typing import Any

import pytest

from sae.evaluation import absorption, clamping, ravel, scr, tpp
from sae.evaluation import probing as probing_family
from sae.evaluation.ranks import ranking
from sae.evaluation.unlearning import summary as unlearning_summary
from sae.probing.spurious import scr_difference, scr_scores
from saescope.metrics import metric

T1, T2 = 12.706205, 4.302653
"""quantiles of Student's t with one and two degrees of freedom"""
approx = pytest.approx


def probing_rows() -> list[dict[str, Any]]:
    """Three sets, whose AUC differ by tenths, and by less from an untrained SAE's."""
    auc = {
        "sae": {"a": 0.9, "b": 0.7, "c": 0.6},
        "untrained": {"a": 0.8, "b": 0.62, "c": 0.49},
        "random": {"a": 0.9, "b": 0.5, "d": 0.1},  # c is not there, d is nobody else's
    }
    about = {"setting": "normal", "k": 1, "accuracy": 0.5, "majority": 0.5, "train": 9, "test": 9}
    return [
        {**about, "set": name, "method": method, "seed": seed, "auc": value + shift}
        for method, sets in auc.items()
        for name, value in sets.items()
        for seed, shift in ((0, 0.05), (1, -0.05))  # two divisions, of which the mean is taken
    ]


def test_probing_by_sets() -> None:
    found = probing_family.summary(probing_rows())
    name = "probing_auc_k1_untrained_difference"
    # 0.1, 0.08, 0.11: mean 0.29 / 3, variance (11.11 + 277.78 + 177.78) / 2 millionths
    assert found[name] == approx(0.29 / 3)
    assert found[f"{name}_interval"] == approx(T2 * 0.0152753 / 3**0.5, rel=1e-5)
    # of the sets that both have: 0 and 0.2
    assert found["probing_auc_k1_random_difference"] == approx(0.1)
    assert found["probing_auc_k1_random_difference_interval"] == approx(T1 * 0.1)


def test_what_intervals_of_figures_do_not_tell_is_told_set_by_set() -> None:
    found = probing_family.summary(probing_rows())

    def values(*ends: str) -> dict[str, dict[str, Any]]:
        of = {"trained": "probing_auc_k1", "untrained": "probing_auc_k1_untrained"}
        return {
            sae: {f"probing_auc_k1{e}": found[name + e] for e in ends if name + e in found}
            for sae, name in of.items()
        }

    row = metric("probing_auc_k1")
    alone = ("", "_interval")
    assert ranking(row, values(*alone)) == {"untrained": "cannot tell"}
    both = (*alone, "_difference", "_difference_interval")
    assert ranking(row, values(*both)) == {"untrained": "right"}


@pytest.mark.parametrize(
    ("name", "difference", "half", "verdict"),
    [
        ("cosine", 0.02, 0.01, "right"),
        ("cosine", -0.02, 0.01, "wrong"),
        ("cosine", 0.02, 0.03, "cannot tell"),
        ("unlearning_retain", -0.02, 0.01, "right"),  # lower is better
        ("unlearning_retain", 0.02, 0.01, "wrong"),
        ("cosine", 0.02, None, "cannot tell"),  # one unit
        ("cosine", 1e-7, 0.0, "cannot tell"),  # rounding
    ],
)
def test_verdicts(name: str, difference: float, half: float | None, verdict: str) -> None:
    control = {name: 0.1, f"{name}_difference": difference, f"{name}_difference_interval": half}
    # the figures themselves are far apart the other way: they are not looked at
    assert ranking(metric(name), {"trained": {name: 0.5}, "random": control}) == {"random": verdict}


def test_absorption_by_letters() -> None:
    letters = [chr(ord("A") + number) for number in range(20)]
    rows = [
        {
            "method": method,
            "letter": letter,
            "fraction": number / 100 + (0.02 if method == "untrained" else 0),
            "full": 0.0,
            "main": [1],
            "main_f1": number / 100 + (0.4 if method == "sae" else 0.1 * (number % 2)),
        }
        for method in ("sae", "untrained")
        for number, letter in enumerate(letters)
    ]
    found = absorption.summary(rows)
    assert found["absorption_fraction_untrained_difference"] == approx(-0.02)
    assert found["absorption_fraction_untrained_difference_interval"] == approx(0, abs=1e-12)
    # 0.4 and 0.3 in turn: variance 20 x 0.05^2 / 19, t of 19 degrees 2.093024
    assert found["letter_f1_untrained_difference"] == approx(0.35)
    half = 2.093024 * (0.05**2 / 19) ** 0.5
    assert found["letter_f1_untrained_difference_interval"] == approx(half, rel=1e-5)


def test_ravel_by_attributes() -> None:
    scores = {
        "sae": (0.6, 0.8),
        "random": (0.5, 0.5),
        "untrained": (0.7, 0.9),
        "activation": (1, 1),
    }
    rows = [
        {
            "kind": "city",
            "attribute": attribute,
            "method": method,
            "pairs": 4,
            **dict.fromkeys(("cause", "isolation", "disentangle"), float(value)),
        }
        for method, values in scores.items()
        for attribute, value in zip(("country", "language"), values, strict=True)
    ]
    found = ravel.summary(rows)
    assert found["ravel_disentangle_random_difference"] == approx(0.2)
    assert found["ravel_disentangle_random_difference_interval"] == approx(T1 * 0.1)
    assert found["ravel_disentangle_untrained_difference"] == approx(-0.1)
    assert found["ravel_disentangle_untrained_difference_interval"] == approx(0, abs=1e-12)


def scr_rows() -> list[dict[str, Any]]:
    """One pair, two divisions, in which 0.2 and 0.3 of accuracy are to be won; another pair, in
    which nothing is."""
    gains = {"sae": (0.1, 0.12), "untrained": (0.05, 0.09), "random": (0.0, 0.0)}
    return [
        {
            "pair": pair,
            "method": method,
            "n": 20,
            "seed": seed,
            "scored": True,
            "accuracy_biased": 0.5,
            "accuracy_clean": 0.5 + gap,
            "accuracy_ablated": 0.5 + gain,
        }
        for pair, gaps in (("p", (0.2, 0.3)), ("none", (0.0, 0.0)))
        for method, own in gains.items()
        for seed, (gap, gain) in enumerate(zip(gaps, own, strict=True))
    ]


def test_scr_by_divisions() -> None:
    rows = scr_rows()
    # (0.05 + 0.03) / 0.5; each division is 0.018 / 0.25 beyond, one up and one down
    assert scr_difference(rows, "sae", "untrained", 20) == approx((0.16, T1 * 0.072))
    found = scr.summary(rows)
    assert found["scr_n20_untrained_difference"] == approx(0.16)
    assert found["scr_n20_untrained_difference_interval"] == approx(T1 * 0.072)
    whole = {row["method"]: row["scr"] for row in scr_scores(rows) if row["pair"] is None}
    assert whole["sae"] - whole["untrained"] == approx(0.16)
    assert found["scr_n20_random_difference"] == approx(whole["sae"])
    undefined = [row for row in rows if row["pair"] == "none"]
    assert scr_difference(undefined, "sae", "random", 20) == (None, None)
    assert "scr_n20_untrained_difference" not in scr.summary(undefined)
    alone = [row for row in rows if row["seed"] == 0]
    assert scr_difference(alone, "sae", "untrained", 20) == (approx(0.25), None)


def test_tpp_by_divisions() -> None:
    scores = {"sae": ((0.3, 0.1), (0.5, 0.3)), "untrained": ((0.2, 0.1), (0.2, 0.1))}
    rows = [
        {
            "group": "g",
            "class": each,
            "method": method,
            "n": 20,
            "seed": seed,
            "tpp": value,
            "intended": value,
            "unintended": 0.0,
        }
        for method, divisions in scores.items()
        for seed, classes in enumerate(divisions)
        for each, value in enumerate(classes)
    ]
    found = tpp.summary(rows)
    # means over classes: 0.2 and 0.4, less 0.15 and 0.15
    assert found["tpp_n20_untrained_difference"] == approx(0.15)
    assert found["tpp_n20_untrained_difference_interval"] == approx(T1 * 0.1)


def test_unlearning_by_texts() -> None:
    """Text 0 has 10 tokens and text 1 has 30; clamp 0 is the SAE's, 1 and 2 are drawn."""
    rises = {0: (2.0, 3.0), 1: (1.0, 1.0), 2: (0.0, 2.0)}
    rows = [
        {"clamp": clamp, "text": text, "tokens": tokens, "ce_clean": 5.0, "ce": 5.0 + rise}
        for clamp, of_texts in rises.items()
        for text, (tokens, rise) in enumerate(zip((10, 30), of_texts, strict=True))
    ]
    # 1.5 of each text, over 40 tokens; each text is 0.75 beyond, one up and one down
    found = clamping.rise_difference(rows, [0], [1, 2])
    assert found == approx((0.075, T1 * 1.5 / 40))
    same = clamping.rise_difference(rows, [1], [1])
    assert same == (0.0, 0.0)
    values = ("forget_rise", "retain_rise", "retain_kl")
    figures = {f"{value}{end}": 0.1 for value in values for end in ("", "_interval")}
    differences = {"forget_rise_difference": found[0], "forget_rise_difference_interval": found[1]}
    told = {**differences, "retain_rise_difference": -0.5, "retain_rise_difference_interval": 0.25}
    tested = [{"method": "sae", **figures}, {"method": "random", **figures, **told}]
    told_of = unlearning_summary(tested)
    assert told_of["unlearning_forget_random_difference"] == approx(0.075)
    assert told_of["unlearning_retain_random_difference"] == -0.5
    assert "unlearning_forget_difference" not in told_of
