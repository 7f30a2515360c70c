"""The table of `benchmarks.probing_sets`: a row for each set, setting and number of features."""

from typing import Any

from benchmarks.probing_sets import COLUMNS, rows_of


def of(method: str, k: int, auc: float, setting: str = "normal") -> dict[str, Any]:
    shown = {"set": "a", "setting": setting, "method": method, "k": k, "seeds": 3}
    spread = {"auc_interval": 0.25, "accuracy": 0.5, "majority": 0.75, "train": 70.0, "test": 30.0}
    return {**shown, "auc": auc, **spread}


def test_methods_of_one_set_setting_and_k_stand_in_one_row() -> None:
    by_set = [
        of("sae", 1, 0.6),
        of("sae", 2, 0.7),
        of("pca", 1, 0.65),
        of("raw", 9, 0.9),
        of("sae", 1, 0.55, "ood"),
        of("raw", 9, 0.8, "ood"),
    ]
    found = rows_of({"by_set": by_set}, {"date": "2026-11-30"})
    assert [(row["setting"], row["k"], row["sae"], row["raw"]) for row in found] == [
        ("normal", 1, "0.6000", "0.9000"),
        ("normal", 2, "0.7000", "0.9000"),
        ("ood", 1, "0.5500", "0.8000"),
    ]
    assert found[0]["pca"] == "0.6500"
    assert "pca" not in found[1]  # a setting may have too few texts for so many components
    assert (found[0]["sae_interval"], found[0]["majority"], found[0]["date"]) == (
        "0.2500",
        "0.7500",
        "2026-11-30",
    )
    assert all(set(row) <= set(COLUMNS) for row in found)
