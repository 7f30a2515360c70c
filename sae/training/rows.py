"""Training on rows that are in memory: `sae.train(x, "topk", d_sae=4096, k=32)`.

Some rows, drawn by the seed, are held out; the others are shuffled anew in each pass. Rows of one
text may then be on both sides: `ActivationStore.from_arrays` holds out whole documents instead.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activations.storage.arrays import RowsInMemory, as_rows
from sae.architectures import architecture
from sae.core.base import SAEConfig, SparseAutoencoder, kind_of
from sae.core.batch import RawBatch
from sae.core.normaliser import Normaliser, NormaliserKind
from sae.formats.load import SAE_FOLDER, load
from sae.training import process_group, run_folder, sharded_checkpoint
from sae.training.schedules import steps_in
from sae.training.trainer import Trainer
from sae.training.trainer_config import TrainerConfig
from saescope.artefact import MANIFEST, git_commit, sha256_json
from saescope.config import from_dict, to_dict
from saescope.errors import InputError, check_range
from saescope.integers import as_index
from saescope.locks import locked
from saescope.paths import local
from saescope.progress import say
from saescope.renamed_fields import with_current_names

_BLOCK = 65_536
"""rows looked at together"""
_MEASURED_ROWS = 16_384
"""held-out rows that are measured during training, and that thresholds are set on"""
_SAMPLE_ROWS = 16_384


def train_rows(
    x: Tensor | NDArray[Any],
    config: str | SAEConfig | Mapping[str, Any] = "topk",
    *,
    target: Tensor | NDArray[Any] | None = None,
    out: str | Path | None = None,
    passes: float = 3.0,
    held_out_fraction: float = 0.05,
    normaliser: NormaliserKind = "unit_mean_square",
    seed: int = 0,
    trainer: TrainerConfig | None = None,
    **settings: Any,
) -> SparseAutoencoder:
    """See `sae.train`."""
    process_group.refuse_several("training on rows in memory", where="train")
    check_range("passes", passes, above=0)
    check_range("held_out_fraction", held_out_fraction, above=0, below=1)
    seed = as_index(seed, where="seed", low=0)
    data = _Data.of(x, target)
    sae_config, trainer = _configured(config, trainer, settings)
    split = _Split(len(data.rows), held_out_fraction, seed)
    if "batch_size" not in settings and trainer.batch_size > len(split.train):
        trainer = dataclasses.replace(trainer, batch_size=len(split.train))
    batch = trainer.batch_size
    steps = steps_in(passes * len(split.train), batch, batch, where="batch_size")
    folder = None if out is None else local(str(out))
    lr_from, trainer = trainer.lr_from(), trainer.with_lr(sae_config, steps, _recorded(folder))
    resolved = {
        **data.facts(),
        "sae": to_dict(sae_config),
        "trainer": to_dict(trainer),
        "passes": passes,
        "held_out_fraction": held_out_fraction,
        "normaliser": normaliser,
        "seed": seed,
    }
    tag = sha256_json({**resolved, "trainer": run_folder.without_new(resolved["trainer"])})
    if folder is not None and _is_trained(folder, tag):
        say(f"{folder}: already trained")
        return load(folder)
    sae = _untrained(sae_config, data, split, normaliser, seed)
    sae.metadata = {
        "rows": resolved["rows"],
        "tokens_trained": steps * trainer.batch_size,
        "normaliser": normaliser,
        "seed": seed,
        "saescope_commit": git_commit(),
    }
    with nullcontext() if folder is None else locked(folder, "training"):
        made = Trainer(
            sae,
            _Batches(data, split.train, batch_size=trainer.batch_size, seed=seed),
            trainer,
            total_steps=steps,
            held_out=_HeldOut(data, split.held),
            folder=folder,
            tag=tag,
            seed=seed,
        )
        return _run(made, folder, resolved, lr_from)


def _run(
    trainer: Trainer, folder: Path | None, resolved: dict[str, Any], lr_from: str
) -> SparseAutoencoder:
    """Train to the end; the SAE, which is also written if there is a folder."""
    if folder is None:
        trainer.run()
        return trainer.release()
    run_folder.write(
        folder,
        resolved,
        parent=resolved["rows"]["sha256"],
        tag=trainer.tag,
        site=None,
        numerics=trainer.numerics.state_dict(),
        learning_rate={"peak": trainer.lr, "from": lr_from},
    )
    trainer.run()
    sae = trainer.release()
    sharded_checkpoint.release(sae, folder / SAE_FOLDER)
    return sae


def _configured(
    config: str | SAEConfig | Mapping[str, Any],
    trainer: TrainerConfig | None,
    settings: Mapping[str, Any],
) -> tuple[SAEConfig, TrainerConfig]:
    """The configurations of the architecture and of the trainer, with the settings put in."""
    if isinstance(config, str):
        config = {"kind": config}
    if isinstance(config, Mapping):
        values = dict(config)
        cls = architecture(values.get("kind", "topk")).Config
        config = from_dict(cls, values, "config")
    if not isinstance(config, SAEConfig):
        raise InputError(
            "is no configuration of an architecture",
            where="config",
            given=config,
            allowed="a name, as 'topk'; a configuration, as TopKConfig(k=32); for a TrainConfig, "
            "which is of a harvest, sae.train(config) alone",
        )
    trainer = trainer or TrainerConfig()
    settings = with_current_names(TrainerConfig, settings, "train")
    own = {field.name for field in dataclasses.fields(config)} - {"kind"}
    others = {field.name for field in dataclasses.fields(trainer)}
    unknown = sorted(set(settings) - own - others)
    if unknown:
        raise InputError(
            "no such setting",
            where="train",
            given=", ".join(unknown),
            allowed=(*sorted(own), *sorted(others)),
        )
    mine = {name: value for name, value in settings.items() if name in own}
    rest = {name: value for name, value in settings.items() if name not in own}
    config, trainer = dataclasses.replace(config, **mine), dataclasses.replace(trainer, **rest)
    if trainer.target_l0 is not None:
        config = config.with_target_l0(trainer.target_l0)
    if config.needs_neighbours:
        raise InputError(
            "needs neighbouring tokens, which rows of a matrix do not tell",
            where="config",
            given=kind_of(config),
            allowed="a harvest: sae.train(TrainConfig(...))",
        )
    return config, trainer


class _Data(NamedTuple):
    """Rows, and what a transcoder is to make of each."""

    rows: RowsInMemory
    targets: RowsInMemory | None

    @classmethod
    def of(cls, x: Tensor | NDArray[Any], target: Tensor | NDArray[Any] | None) -> Self:
        """Check both; InputError unless they are finite matrices with equally many rows."""
        rows = as_rows(x, where="x")
        targets = None if target is None else as_rows(target, where="target")
        if targets is not None and len(targets) != len(rows):
            raise InputError(
                "another number of rows than x",
                where="target",
                given=len(targets),
                allowed=str(len(rows)),
            )
        return cls(rows, targets)

    def facts(self) -> dict[str, Any]:
        """Shapes and hashes that identify them."""
        return {"rows": self.rows.facts(), "target": self.targets and self.targets.facts()}

    def batch(self, index: NDArray[np.int64]) -> RawBatch:
        """The rows at these indices."""
        target = None if self.targets is None else self.targets.take(index)
        return RawBatch(self.rows.take(index), target)


class _Split:
    """Which rows are trained on, and which are held out: int64, each in ascending order."""

    def __init__(self, rows: int, fraction: float, seed: int) -> None:
        if rows < 2:
            raise InputError(
                "too few rows to hold some out", where="x", given=rows, allowed="2 or more"
            )
        held = min(rows - 1, max(1, round(fraction * rows)))
        order = np.random.default_rng((seed, 0)).permutation(rows)
        self.held, self.train = np.sort(order[:held]), np.sort(order[held:])


class _Batches:
    """Endless batches of the rows at some indices, in another order in each pass.

    Its state resumes exactly.
    """

    def __init__(
        self,
        data: _Data,
        index: NDArray[np.int64],
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        self._data, self._index = data, index
        self._size, self._seed, self._next = batch_size, seed, 0

    def __iter__(self) -> Iterator[RawBatch]:
        per_pass = max(1, len(self._index) // self._size)
        while True:
            number, first = divmod(self._next, per_pass)
            order = np.random.default_rng((self._seed, 1, number)).permutation(self._index)
            for start in range(first * self._size, per_pass * self._size, self._size):
                self._next += 1
                yield self._data.batch(order[start : start + self._size])

    def state_dict(self) -> dict[str, Any]:
        """How many batches were given; JSON-able."""
        return {"batch": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch at which the state was taken."""
        self._next = int(state["batch"])


class _HeldOut:
    """Fresh iterators over the first held-out rows."""

    def __init__(self, data: _Data, index: NDArray[np.int64]) -> None:
        self._data, self._index = data, index[:_MEASURED_ROWS]

    def __call__(self) -> Iterator[RawBatch]:
        yield self._data.batch(self._index)


def _untrained(
    config: SAEConfig, data: _Data, split: _Split, kind: NormaliserKind, seed: int
) -> SparseAutoencoder:
    """The SAE to train, with its normalisers, where the rows are."""
    rows, targets = data
    cls = architecture(kind_of(config))
    if cls.concatenates:
        raise InputError(
            "reads several sites, which rows of one array do not have: bring them with "
            "ActivationStore.from_arrays",
            where="config",
            given=kind_of(config),
        )
    if cls.transcodes != (targets is not None):
        what = (
            "a transcoder needs target, the rows to reconstruct"
            if cls.transcodes
            else (f"{kind_of(config)} reconstructs what it reads")
        )
        raise InputError(what, where="target", given=None if targets is None else "rows")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = cls(config, rows.d_in, targets.d_in if targets else None)
    sae.normaliser = _fitted(rows, split.train, kind)
    if targets is not None:
        sae.output_normaliser = _fitted(targets, split.train, kind)
    return sae.to(rows.device)


def _fitted(rows: RowsInMemory, index: NDArray[np.int64], kind: NormaliserKind) -> Normaliser:
    total = torch.zeros(rows.d_in, dtype=torch.float64)
    square = 0.0
    for start in range(0, len(index), _BLOCK):
        x = rows.take(index[start : start + _BLOCK])
        total += x.sum(0, dtype=torch.float64).cpu()
        square += float(x.double().square().sum())
    sample = rows.take(index[:: -(-len(index) // _SAMPLE_ROWS)])
    mean, mean_square = total / len(index), square / len(index)
    return Normaliser.fit(kind, mean=mean, mean_square=mean_square, sample=sample.cpu())


def _recorded(folder: Path | None) -> dict[str, Any] | None:
    """The trainer's settings of the run in a folder; None if there is none."""
    if folder is None or not (folder / MANIFEST).exists():
        return None
    return run_folder.read_run(folder)["config"]["trainer"]


def _is_trained(folder: Path, tag: str) -> bool:
    """Whether the folder holds this run, finished. InputError if it holds another."""
    if not (folder / MANIFEST).exists():
        return False
    if run_folder.read_run(folder)["tag"] != tag:
        raise InputError("holds another run; choose another out, or remove it", where=str(folder))
    return (folder / SAE_FOLDER).exists()
