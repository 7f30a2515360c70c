"""What the Mutual Choice paper's trials measure on held-out rows."""

from pathlib import Path

import numpy as np
import pytest
import torch

from activations import ActivationStore
from sae.data.harvests import held_out_rows
from sae.formats.load import load
from sae.kernels.codes import SparseCodes
from sae.papers import mutual_choice
from sae.reproduction.training import trained

SITE = mutual_choice._SITE


def test_features_that_could_be_left_out_are_those_whose_removal_does_no_harm(
    tmp_path: Path,
) -> None:
    rows = np.random.default_rng(0).normal(size=(600, 12)).astype(np.float32)
    store = ActivationStore.from_arrays(tmp_path / "data", {SITE: rows}, held_out_fraction=0.2)
    values = {
        "harvest": str(tmp_path / "data"),
        "passes": 4.0,
        "sae": {"kind": "mutual_choice", "d_sae": 40, "k": 4},
        "trainer": {"batch_size": 32},
    }
    run = trained(tmp_path / "run", values)
    sae = load(run)
    found = mutual_choice._on_held_out(run, tmp_path / "data")
    with torch.no_grad():
        x = torch.cat(list(held_out_rows(store, SITE, None)()))
        codes = sae.encode_sparse(x)

        def error(value: torch.Tensor) -> torch.Tensor:
            kept = SparseCodes(codes.row_ptr, codes.index, value, codes.d_sae)
            return (x - sae.decode(kept, like=x)).double().square().sum(1)

        whole = error(codes.value)
        without = torch.stack([error(codes.value * (codes.index != j)).sum() for j in range(40)])
    assert found.idle_fraction == pytest.approx(float((without <= whole.sum()).double().mean()))
    assert 0 < found.idle_fraction < 1
    np.testing.assert_allclose(found.error, whole, rtol=1e-4)
    np.testing.assert_array_equal(found.l0, codes.l0().numpy())


def test_what_both_owe_to_a_third_is_no_agreement() -> None:
    chance = np.random.default_rng(0)
    norm, own = chance.normal(size=4000), chance.normal(size=4000)
    l0, error = np.exp(norm) + 0.1 * own, 3 * norm + chance.normal(size=4000)
    assert mutual_choice._agreement(l0, error) > 0.8
    assert abs(mutual_choice._agreement(l0, error, given=norm)) < 0.1
    assert mutual_choice._agreement(norm + own, own, given=norm) > 0.8
    assert mutual_choice._agreement(norm, -(norm**3)) == pytest.approx(-1)
