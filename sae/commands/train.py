"""`saescope train`: from a harvest to a run's folder.

A run's folder holds `manifest.json` (what, from what, with which versions), `metrics.jsonl`,
`checkpoints/` and, once trained, `sae/` (the SAE itself).
"""

from collections.abc import Mapping
from typing import Any, overload

from numpy.typing import NDArray
from torch import Tensor

from sae import distributed
from sae.core.base import SAEConfig, SparseAutoencoder
from sae.data.harvests import open_complete
from sae.formats.load import load
from sae.synthetic.config import PREFIX
from sae.training import process_group
from sae.training.config import TrainConfig
from sae.training.estimate import describe
from sae.training.rows import train_rows
from sae.training.run import Run
from sae.training.synthetic import SyntheticRun
from saescope.errors import InputError
from saescope.progress import say
from saescope.system import system_errors


@overload
def train(config: TrainConfig) -> SparseAutoencoder | None: ...
@overload
def train(
    x: Tensor | NDArray[Any],
    /,
    config: str | SAEConfig | Mapping[str, Any] = "topk",
    **settings: Any,
) -> SparseAutoencoder: ...
@system_errors()
def train(*given: Any, **settings: Any) -> SparseAutoencoder | None:
    """Train an SAE: on a harvest or a synthetic world, as a TrainConfig says, or on rows in memory.

    `train(config)` goes on from the run's last checkpoint if it has one. With `plan` nothing is
    trained and None returned. Under torchrun its processes train together, and each returns what it
    holds.

    `train(x, config, **settings)` trains on x [rows, d_in], a NumPy array or a tensor (float32,
    float16 or bfloat16; where a tensor is, is trained) and returns the SAE, its scale folded in and
    its thresholds measured, with the measurements on held-out rows in `metadata["held_out"]`.

    Args:
        config: of x: the name of an architecture, its configuration, or a table of it.
        settings: of x: fields of the architecture's configuration and of TrainerConfig, and
            target: rows [rows, d_out] that a transcoder is to reconstruct;
            out: a folder to write the run to, where it goes on if it was interrupted;
            passes over the rows (3); held_out_fraction (0.05); normaliser; seed; trainer, a
            TrainerConfig.

    Raises InputError if the folder holds another run, the sites are unknown or do not fit the
    architecture, a setting is unknown, rows are not finite or too few; ArtefactError if the harvest
    is missing, unfinished or damaged, or if another process trains into the same folder.

    >>> import torch
    >>> x = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
    >>> sae = train(x, "topk", d_sae=64, k=4, batch_size=128, passes=10)
    training: ...
    >>> sae.encode(x).shape, sae.metadata["held_out"]["l0"]
    (torch.Size([2000, 64]), 4.0)
    """
    if given and not isinstance(given[0], TrainConfig):
        return train_rows(*given, **settings)
    config = given[0] if given else settings.pop("config", None)
    if not isinstance(config, TrainConfig):
        raise InputError(
            "is no configuration of a run",
            where="train",
            given=config,
            allowed="a TrainConfig, or rows [rows, d_in] and an architecture",
        )
    if settings or len(given) > 1:
        raise InputError(
            "settings stand beside rows; of a harvest they are in the configuration",
            where="train",
            given=", ".join(settings),
        )
    return _train_as_configured(config)


def _train_as_configured(config: TrainConfig) -> SparseAutoencoder | None:
    with process_group.session(config.ranks, config.device):
        run = _run_of(config)
        if config.plan:
            for line in [run.plan()] if isinstance(run, SyntheticRun) else describe([run]):
                say(line)
            return None
        with run.locked():
            if run.finished():
                say(f"{run.folder}: already trained")
                with distributed.alone():
                    return load(run.folder)
            run.start()
            run.trainer.run()
            return run.release()


def _run_of(config: TrainConfig) -> Run | SyntheticRun:
    if config.harvest.startswith(PREFIX):
        return SyntheticRun(config)
    return Run(config, open_complete(config.harvest))
