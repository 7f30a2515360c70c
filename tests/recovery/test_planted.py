"""SAEs find the features that made the data, better than what was not trained for it."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.planted_training import absorption, controls, planted_for, recipe_of, train
from sae.architectures import list_architectures
from sae.evaluation.planted import PlantedConfig, PlantedDictionary
from sae.papers.hiding_data import Hiding, Start, distance

SMALL = Hiding(d_in=50, true=100, d_sae=500, k=3, rows=400)


QUICK = ("batchtopk", "jumprelu", "matryoshka", "topk")
"""architectures that the default suite trains; the others are trained with -m slow"""


def kinds() -> list[Any]:
    """All architectures that learn from single rows; those not in QUICK with the mark slow."""
    single = (k for k, cls in list_architectures().items() if not cls.Config().needs_neighbours)
    return [
        pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow)
        for kind in sorted(single)
    ]


@pytest.mark.parametrize("kind", kinds())
def test_recovers_planted_features(kind: str, tmp_path: Path) -> None:
    """More than its own rows before training, random rows, PCA and NMF, by a wide margin."""
    planted = planted_for(kind, PlantedConfig())
    recipe = recipe_of(kind, steps=400, batch_size=256)
    found = train(kind, planted, recipe, tmp_path)
    control = max(found.untrained, *controls(planted, recipe.d_sae).values())
    assert control < 0.75
    assert found.recovery.mean > control + 0.15
    assert found.recovery.mean > 0.75
    assert found.held_out["l0"] == pytest.approx(recipe.l0, rel=0.15)


@cache
def parents_missed(kind: str, folder: Path) -> tuple[float, float]:
    """Absorption of parents by a kind's children, and how often parents alone are missed."""
    planted = PlantedDictionary(PlantedConfig(structure="hierarchical"))
    found = train(kind, planted, recipe_of(kind, steps=500), folder / kind)
    measured = absorption(found, planted)
    return measured.rate, measured.missed_alone


@pytest.mark.parametrize("other", ["topk", pytest.param("batchtopk", marks=pytest.mark.slow)])
def test_matryoshka_absorbs_less(other: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """At equal L0, and not because its parents' latents are silent anyway."""
    folder = tmp_path_factory.getbasetemp()
    rate, missed_alone = parents_missed("matryoshka", folder)
    assert rate < 0.5 * parents_missed(other, folder)[0]
    assert missed_alone < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("start", ["truth", "samples"])
def test_masking_wins_at_high_noise_and_not_at_low(start: Start, tmp_path: Path) -> None:
    """Chidambaram et al. 2023: distance from the true dictionary, masked against plain."""
    found = {
        (noise, masked): distance(
            SMALL, tmp_path / f"{noise} {masked}", noise=noise, masked=masked, start=start
        )
        for noise in (0.01, 0.1)
        for masked in (False, True)
    }
    assert found[0.1, True] < 0.9 * found[0.1, False]
    assert found[0.01, True] > found[0.01, False]


def test_every_architecture_is_measured_on_data_that_it_can_read() -> None:
    """Transcoders alone get targets."""
    for kind, cls in list_architectures().items():
        config = planted_for(kind, PlantedConfig()).config
        assert (config.d_out > 0) == cls.transcodes
        assert replace(config, d_out=0) == PlantedConfig()
