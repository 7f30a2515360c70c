"""A run on a synthetic world: `harvest = "synth:small"`, `samples = 2000000`."""

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sae.architectures import architecture
from sae.core.base import SparseAutoencoder, kind_of
from sae.core.gradients import check_trainable
from sae.core.normaliser import Normaliser
from sae.formats.load import SAE_FOLDER
from sae.synthetic.stream import SyntheticStream, world_hash
from sae.synthetic.world import World, named_world
from sae.training import process_group, run_folder, sharded_checkpoint
from sae.training.config import TrainConfig
from sae.training.trainer import Trainer
from saescope.artefact import git_commit, sha256_json
from saescope.config import to_dict
from saescope.errors import InputError
from saescope.locks import locked
from saescope.metrics import texts
from saescope.paths import local
from saescope.progress import say

_FITTING_ROWS = 65_536
"""the first training rows, on which the normaliser is fitted"""
_OF_HARVESTS = (
    "site",
    "sites",
    "target_site",
    "target_sites",
    "mix_layers",
    "objective",
    "end_to_end",
    "finish",
    "passes",
    "outliers",
    "lens",
    "mix_chunks",
    "order",
    "start_from",
)
"""settings that say nothing of rows that come from no model"""


class SyntheticRun:
    """A configuration applied to a world; nothing is written before `start`.

    Raises InputError if the configuration or its architecture asks for what only a harvest has, or
    if the folder holds another run.
    """

    def __init__(self, config: TrainConfig, world: World | None = None) -> None:
        check_trainable("train")
        self.config, self.folder = config, local(config.out)
        self.cls = architecture(kind_of(config.sae))
        samples = _samples(config)
        _check_fits(config, self.cls)
        self.world = world or named_world(config.harvest)
        self.sae_config = config.sae
        if config.trainer.target_l0 is not None:
            self.sae_config = config.sae.with_target_l0(config.trainer.target_l0)
        self.total_steps = samples // config.trainer.batch_size
        before = run_folder.read_if_there(self.folder)
        trainer = config.trainer.with_lr(
            self.sae_config, self.total_steps, before and before["config"]["trainer"]
        )
        self.trainer_config = dataclasses.replace(
            trainer, dead_after_tokens=trainer.dead_after(samples)
        )
        self.settings = {**to_dict(config), "trainer": to_dict(self.trainer_config)}
        self.tag = sha256_json(
            {"config": run_folder.identity(self.settings), "harvest": world_hash(self.world)}
        )
        if before is not None and before["tag"] != self.tag:
            raise run_folder.another_run(self.folder, before["config"], self.settings)
        self.stream = SyntheticStream(
            self.world,
            batch_size=config.trainer.batch_size,
            seed=config.seed if config.data_seed is None else config.data_seed,
            device=process_group.device(config.device),
        )

    def plan(self) -> str:
        """What the run would do, in a line."""
        config, world = self.config, self.world.config
        return (
            f"{self.folder}: {kind_of(config.sae)}, {world.d_in} x {config.sae.d_sae}, "
            f"{self.total_steps:,} steps of {config.trainer.batch_size:,} rows of "
            f"{config.harvest} ({world.features:,} true features); learning rate "
            f"{self.trainer_config.peak_lr(self.sae_config, self.total_steps):.2g}, from "
            f"{config.trainer.lr_from()}"
        )

    def finished(self) -> bool:
        """True if the SAE is there already."""
        return (self.folder / SAE_FOLDER).exists()

    def locked(self) -> AbstractContextManager[None]:
        """A lock against other processes training into the folder; ArtefactError if one does."""
        return locked(self.folder, "training") if process_group.first() else nullcontext()

    def start(self) -> None:
        """Make the trainer and, in a new folder, write the manifest."""
        trainer = self.trainer  # before anything is written: wrong input leaves no folder behind
        if process_group.first():
            run_folder.write(
                self.folder,
                self.settings,
                parent=world_hash(self.world),
                tag=trainer.tag,
                site=None,
                numerics=trainer.numerics.state_dict(),
                learning_rate={"peak": trainer.lr, "from": self.config.trainer.lr_from()},
            )

    @cached_property
    def trainer(self) -> Trainer:
        """The trainer, at the run's last checkpoint."""
        return self.make_trainer(self.folder)

    def make_trainer(self, folder: Path | None) -> Trainer:
        """A trainer that writes to a folder (None: nowhere)."""
        config = self.config
        return Trainer(
            self.make_sae().to(process_group.device(config.device)),
            self.stream,
            self.trainer_config,
            total_steps=self.total_steps,
            held_out=self.stream.held_out(config.evaluation_rows),
            calibration=self.stream.held_out(config.calibration_rows),
            folder=folder,
            tag=self.tag,
            seed=config.seed,
        )

    def make_sae(self) -> SparseAutoencoder:
        """The SAE before training, with its normaliser and metadata."""
        config = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            sae = self.cls(self.sae_config, self.world.config.d_in)
        x = self.stream.first_rows(_FITTING_ROWS).cpu()
        sae.normaliser = Normaliser.fit(
            config.normaliser,
            mean=x.mean(0, dtype=torch.float64),
            mean_square=float(x.double().square().sum(1).mean()),
            sample=x,
        )
        sae.metadata = self._metadata()
        return sae

    def _metadata(self) -> dict[str, Any]:
        config = self.config
        return {
            "world": to_dict(self.world.config),
            "harvest": config.harvest,
            "harvest_hash": world_hash(self.world),
            "tokens_trained": self.total_steps * config.trainer.batch_size,
            "normaliser": config.normaliser,
            "seed": config.seed,
            "saescope_commit": git_commit(),
        }

    def release(self) -> SparseAutoencoder:
        """Write the trained SAE, folded, with its held-out metrics; the SAE."""
        sae, last = self.trainer.release(), self.trainer.last_held_out
        sharded_checkpoint.release(sae, self.folder / SAE_FOLDER)
        say(
            f"{self.folder}: {kind_of(sae.config)}, d_in {sae.d_in}, d_sae {sae.config.d_sae}; on "
            f"{last['rows']:,} held-out rows: {texts(('l0', 'fvu', 'cosine'), last)}"
        )
        return sae


def _samples(config: TrainConfig) -> int:
    """How many rows to train on; InputError unless there is a batch of them."""
    if config.samples is None:
        raise InputError(
            "a synthetic world has no end: say how many rows to train on", where="samples"
        )
    if config.samples < config.trainer.batch_size:
        raise InputError(
            "fewer rows than one batch",
            where="samples",
            given=config.samples,
            allowed=f"at least {config.trainer.batch_size}",
        )
    return config.samples


def _check_fits(config: TrainConfig, cls: type[SparseAutoencoder]) -> None:
    """Raise InputError for what a world has not: sites, texts, a model."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    for name in _OF_HARVESTS:
        field, given = fields[name], getattr(config, name)
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        if given != default:
            raise InputError(
                "is of harvests: a synthetic world has no sites, no texts and no model",
                where=name,
                given=given,
                allowed="leave it out",
            )
    of_texts = config.sae.needs_labels or config.sae.needs_neighbours
    if cls.transcodes or cls.concatenates or of_texts:
        what = "targets" if cls.transcodes else "sites" if cls.concatenates else "documents"
        raise InputError(
            f"needs {what}, which a synthetic world has not",
            where="sae.kind",
            given=kind_of(config.sae),
        )
