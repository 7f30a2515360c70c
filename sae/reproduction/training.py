"""SAEs of a paper's trials: trained and measured by the commands that users have."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from activations import HarvestConfig, harvest
from sae.commands.evaluate import evaluate
from sae.commands.evaluate_config import EvaluateConfig
from sae.commands.train import train
from sae.training.config import TrainConfig
from saescope.config import from_dict, read_toml
from saescope.examples import examples
from saescope.progress import silent


def harvested(folder: Path, example: str, **changes: Any) -> Path:
    """A harvest of an example configuration, beside the folder of a paper: papers share it.

    What is there already is gone on with. `changes` are fields of the configuration, and are in the
    folder's name.
    """
    marks = "".join(f"-{name}-{value}" for name, value in sorted(changes.items()))
    out = folder.parent / "harvests" / f"{example}{marks}"
    values = read_toml(examples()[f"configs/harvest/{example}.toml"])
    with silent():
        harvest(from_dict(HarvestConfig, {**values, **changes, "out": str(out)}, where=str(out)))
    return out


def trained(out: Path, values: Mapping[str, Any]) -> Path:
    """The run of a training file with these values; what is there already is gone on with."""
    config = from_dict(TrainConfig.specialise(values), {**values, "out": str(out)}, where=str(out))
    with silent():
        train(config)
    return out


def measured(run: Path, **values: Any) -> dict[str, Any]:
    """What `saescope eval` measures on a run's held-out rows, with these settings."""
    with silent():
        return evaluate(EvaluateConfig(run=str(run), replace=True, **values))
