"""What the JumpReLU paper's trials say of thresholds, and values at one L0."""

from pathlib import Path

import numpy as np
import pytest

from activations import ActivationStore
from sae.papers import jumprelu
from sae.reproduction.training import trained
from sae.training.snapshots import find_snapshots


def test_thresholds_are_in_deviations_of_the_data_whatever_its_scale(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(600, 12)).astype(np.float32)
    found = []
    for scale in (1.0, 50.0):
        data = tmp_path / f"data-{scale:g}"
        sites = {jumprelu._SITE: scale * rows}
        ActivationStore.from_arrays(data, sites, held_out_fraction=0.2)
        values = {
            "harvest": str(data),
            "passes": 8.0,
            "sae": {"kind": "jumprelu", "d_sae": 24},
            "trainer": {"batch_size": 32, "target_l0": 4.0, "snapshot_tokens": [640, 1280, 1920]},
        }
        run = trained(tmp_path / f"run-{scale:g}", values)
        assert len(find_snapshots(run)) == 3
        found.append(jumprelu._over_steps(run))
    one, fifty = found
    np.testing.assert_allclose(one["quartiles"], fifty["quartiles"], rtol=1e-3)
    np.testing.assert_allclose(one["end"], fifty["end"], rtol=1e-3)
    assert 0.3 < one["end"][1] < 3, "a threshold is of the order of a coordinate's deviation"
    assert sum(one["thresholds"]) == pytest.approx(1)
    assert len(one["drift"]) == 2
    assert all(-1 <= each <= 1 for each in one["agreement"])


def test_an_l0_that_was_missed_is_made_up_for_by_the_slope_of_the_kind() -> None:
    reached = {(0, 16.0): 15.0, (0, 32.0): 35.0, (1, 32.0): 30.0, (0, 64.0): 66.0}
    rows = [
        {"seed": seed, "kind": "relu", "target_l0": target, "l0": l0, "fvu": 0.5 * l0**-0.3}
        for (seed, target), l0 in reached.items()
    ]
    assert jumprelu._at(rows, "fvu", "relu") == pytest.approx([0.5 * 32**-0.3] * 2)
    alone = [row for row in rows if row["target_l0"] == 32]
    assert jumprelu._at(alone, "fvu", "relu") == [row["fvu"] for row in alone]


def test_quartiles_are_level_where_all_three_stay() -> None:
    scale = [2.0, 1.5, 1.2, 1.05, 1.0, 1.04, 1.0, 0.96, 1.3, 1.4]
    quartiles = [[0.9 * each, each, 1.1 * each] for each in scale]
    quartiles[3][2] *= 1.2  # one quartile is late
    row = {
        "steps": 1050,
        "quartiles": quartiles,
        "end": [1.4, 1.5, 1.6],
        "drift": [0.1 * n for n in range(9)],
        "agreement": [0.1 * n for n in range(10)],
    }
    found = jumprelu._course(row)
    assert found["levels"] == 500
    assert found["left"] == pytest.approx(1.0)
    assert found["end"] == 1.5
    assert found["drift"] == pytest.approx(0.6), "the change from the last but one of eight looks"
    assert found["agreement"] == pytest.approx(0.7)
