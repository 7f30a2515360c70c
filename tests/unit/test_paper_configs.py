"""Configurations for papers' own scale: each loads, and reads a harvest of its layout."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import sae.papers
from activations import ActivationStore, HarvestConfig
from sae.commands.sweep import SweepConfig, members, sweep
from saescope.config import from_dict, read_toml
from saescope.examples import examples

SWEEPS = {
    name: path
    for name, path in examples().items()
    if name.startswith("configs/papers/") and "grid" in read_toml(path)
}
SMALL = {"sae.d_sae": 64, "trainer.batch_size": 16, "seed": [0]}


def _sparse(table: Mapping[str, object]) -> dict[str, object]:
    """A small L0, by the name that a grid's table has for it."""
    return {"trainer.target_l0": 4.0} if "trainer.target_l0" in table else {"sae.k": 4}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_reads_a_small_harvest_of_its_layout(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = from_dict(SweepConfig, read_toml(SWEEPS[name]), name)
    assert len(members(config)) >= 9
    # what it reads is the harvest of another example
    example = examples()[f"configs/harvest/{Path(config.harvest).name}.toml"]
    harvest = from_dict(HarvestConfig, read_toml(example), example.name)
    assert harvest.out == config.harvest
    rows = np.random.default_rng(0).normal(size=(400, 16)).astype(np.float32)
    ActivationStore.from_arrays(
        tmp_path / "data", dict.fromkeys(harvest.sites, rows), held_out_fraction=0.2
    )
    small = replace(
        config,
        harvest=str(tmp_path / "data"),
        out=str(tmp_path / "runs"),
        plan=True,
        base={**config.base, "device": "cpu"},
        grid=tuple({**each, **SMALL, **_sparse(each)} for each in config.grid),
    )
    sweep(small)
    assert "steps at the start" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_papers_name_files_that_there_are() -> None:
    named = {each for name in sae.papers.names() for each in sae.papers.paper(name).configs}
    assert {f"configs/papers/{each}" for each in named} <= set(examples())
    assert set(SWEEPS) <= {f"configs/papers/{each}" for each in named}
