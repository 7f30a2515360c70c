"""The page of the recipe's ablations: intervals by hand, and which way it says they fall."""

import pytest

from benchmarks.recipe import RecipeBenchmark, runs, sae_options
from benchmarks.recipe_page import SHOWN, difference, page
from sae.architectures.matryoshka import MatryoshkaConfig

ALL = "k lista tilt detach sort"


def row(kind: str, options: str, seed: int, f1: float, mcc: float) -> dict[str, str]:
    rest = dict.fromkeys(SHOWN, "0.5")
    return {
        **rest, "architecture": kind, "options": options, "seed": str(seed), "samples": "1000",
        "lr_multiplier": "4", "cpu_s": "7", "f1": str(f1), "mcc": str(mcc),
    }  # fmt: skip


ROWS = [
    *(row("batchtopk", "none", n, 0.5, 0.6) for n in range(3)),
    *(row("matryoshka", "none", n, 0.5, 0.6) for n in range(3)),
    row("matryoshka", ALL, 0, 0.58, 0.5),
    row("matryoshka", ALL, 1, 0.60, 0.6),
    row("matryoshka", ALL, 2, 0.62, 0.7),
]


def test_differences_are_paired_by_seed() -> None:
    """0.08, 0.10, 0.12: mean 0.1, deviation 0.02, t(2) 4.303."""
    middle, half = difference(ROWS, "matryoshka", ALL, "f1")
    assert middle == pytest.approx(0.1)
    assert half == pytest.approx(4.3027 * 0.02 / 3**0.5, rel=1e-4)


def test_the_page_says_what_the_intervals_tell() -> None:
    text = page(ROWS, [])
    assert "F1 against batchtopk: +0.100 ± 0.050, better" in text
    assert "MCC against matryoshka: +0.000 ± 0.248, cannot tell" in text
    assert "On a language model" not in text
    measured = {"passes": "5", "l0": "32", "fvu": "0.1", "delta_ce": "0.2", "cpu_s": "9"}
    model = {"architecture": "batchtopk", "options": "none", "delta_ce_interval": "0.01"}
    together = {**model, "architecture": "matryoshka", "options": ALL, "fvu": "0.15"}
    text = page(ROWS, [{**measured, **model}, {**measured, **together}])
    assert "| batchtopk | none | 32.0 | 0.1000 | 0.2000 ± 0.0100 | 9 s |" in text
    assert "against batchtopk FVU +50%, delta CE +0%." in text


def test_all_options_are_those_of_the_recipe() -> None:
    config = RecipeBenchmark(seeds=(0,))
    own = MatryoshkaConfig(**sae_options(config, "matryoshka", ALL))
    assert (own.k, own.k_start, own.k_anneal_fraction, own.lista_eta) == (8, 19, 1.0, 0.3)
    assert own.detach_prefixes
    assert own.sort_by_frequency
    assert own.widths() == [16, 64, 256, 512]
    plain = MatryoshkaConfig(**sae_options(config, "matryoshka", ""))
    assert (plain.k_start, plain.lista_eta, plain.sort_by_frequency) == (None, 0.0, False)
    assert ("matryoshka", ALL, 0) in list(runs(config))
