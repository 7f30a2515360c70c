"""One run: from its configuration to a trainer over a harvest, and to the SAE it releases."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from activations import ActivationStore
from activations.loading.epoch_order import Order
from sae import distributed
from sae.analysis.lens import TunedLens
from sae.architectures import architecture
from sae.core.base import SparseAutoencoder, kind_of
from sae.core.gradients import check_trainable
from sae.core.normaliser import Normaliser
from sae.data.harvests import check_held_out, choose_sites
from sae.data.streams import Stream, make_stream
from sae.formats.load import SAE_FOLDER, load
from sae.training import process_group, run_folder, sharded_checkpoint
from sae.training.config import TrainConfig
from sae.training.finish import FinishStream
from sae.training.remote_run import remote_run
from sae.training.schedules import FinishRate, steps_in
from sae.training.through_model import loss_through_model, stream_through_model
from sae.training.trainer import Trainer
from sae.training.trainer_config import TrainerConfig
from saescope.artefact import git_commit, sha256_json
from saescope.config import to_dict
from saescope.errors import InputError
from saescope.leftovers import leftovers, remove_leftover
from saescope.locks import locked
from saescope.metrics import texts
from saescope.paths import as_path, if_local, local
from saescope.progress import say
from saescope.replacing import check_apart

_SAMPLE_ROWS = 16384
"""rows of a site that a normaliser is fitted on where moments do not suffice"""


class Run:
    """A configuration applied to a harvest; nothing is written before `start`.

    Args: streams holds streams by `stream_key`, for runs that read the harvest alike to share; the
    run's own is added if it is not there.

    Raises InputError if the sites are unknown or do not fit the architecture, if there are too few
    rows, or if the folder holds another run.
    """

    def __init__(
        self,
        config: TrainConfig,
        harvest: ActivationStore,
        *,
        streams: dict[str, Stream] | None = None,
    ) -> None:
        check_trainable("train")
        check_held_out(harvest)
        self.config, self.harvest, self.folder = config, harvest, as_path(config.out)
        self._remote = remote_run(self.folder, harvest.path, config.trainer)
        self.cls = architecture(kind_of(config.sae))
        if harvest.storage == "none":
            process_group.refuse_together("training straight from the model", where="harvest")
        self.sites, self.targets = choose_sites(
            harvest,
            self.cls,
            site=config.site,
            sites=config.sites,
            target_site=config.target_site,
            target_sites=config.target_sites,
            mix_layers=config.mix_layers,
        )
        self.sae_config = config.sae.for_sites(len(self.sites))
        if config.trainer.target_l0 is not None:
            self.sae_config = self.sae_config.with_target_l0(config.trainer.target_l0)
        before = run_folder.read_if_there(self.folder)
        check_apart(self.work_folder, if_local(harvest.path))
        self._chosen_order: Order | None = self._order(before)
        self._lens = TunedLens.load(config.lens) if config.lens else None
        shared, key = {} if streams is None else streams, self.stream_key()
        if key not in shared:
            shared[key] = self.make_stream()
        self.stream = shared[key]
        batch, tokens = config.trainer.batch_size, config.passes * harvest.n_rows("train")
        self.total_steps = steps_in(tokens, self.stream.tokens_per_batch, batch)
        self.trainer_config = self._trainer_config(before)
        self.settings = {
            **to_dict(config),
            "sites": list(self.sites),
            "site": None,
            "target_sites": list(self.targets) if config.target_sites else (),
            "order": self._chosen_order,
            "trainer": to_dict(self.trainer_config),
        }
        self.tag = sha256_json(
            {
                "config": run_folder.identity(self.settings),
                "harvest": harvest.hash,
                **({"lens": self._lens.hash} if self._lens else {}),
            }
        )
        if before is not None and before["tag"] != self.tag:
            raise run_folder.another_run(self.folder, before["config"], self.settings)

    def _order(self, before: Mapping[str, Any] | None) -> Order | None:
        """The order of the batches; a run that goes on (its manifest is `before`) keeps its own.

        None in a run from before there was a choice, which is in chunks, and where there is none.
        """
        chosen = self.config.order
        if self.harvest.storage == "none" or self.config.objective == "end_to_end":
            return chosen
        if before is None:
            return chosen or ("windows" if self.sae_config.needs_neighbours else "spread")
        earlier: Order | None = before["config"].get("order")
        return earlier if chosen is None or (chosen, earlier) == ("chunks", None) else chosen

    def _trainer_config(self, before: Mapping[str, Any] | None) -> TrainerConfig:
        """The trainer's configuration, with what the length of the run decides filled in.

        These are the learning rate and the tokens after which a feature is dead. A run that goes on
        keeps those that it started with.
        """
        recorded = None if before is None else before["config"]["trainer"]
        given = self.config.trainer.with_lr(self.sae_config, self.total_steps, recorded)
        if given.dead_after_tokens is None and recorded is not None:
            given = replace(given, dead_after_tokens=recorded["dead_after_tokens"])
        tokens = round(self.config.passes * self.harvest.n_rows("train"))
        return replace(given, dead_after_tokens=given.dead_after(tokens))

    @property
    def _reading_order(self) -> Order | None:
        stored = self.harvest.storage != "none"
        default: Order | None = "chunks" if stored else None
        return self._chosen_order or default

    def stream_key(self) -> str:
        """A hash that is equal for runs that can share a stream."""
        config = self.config
        return sha256_json(
            [
                self.sites,
                config.target_site,
                *([self.targets] if config.target_sites else []),
                config.mix_layers,
                self.cls.concatenates,
                config.trainer.batch_size,
                self._data_seed,
                config.outliers,
                self._labels,
                self._lens and self._lens.hash,
                config.mix_chunks,
                self._reading_order,
                config.objective,
                to_dict(config.end_to_end),
                # when a finish begins depends on the run's length
                *([to_dict(config.finish), config.passes] if config.finish.objective else []),
            ]
        )

    def make_stream(self) -> Stream:
        """The run's batches, from their beginning."""
        config = self.config
        if config.objective == "end_to_end" or config.finish.objective is not None:
            return stream_through_model(
                config, self.harvest, self.sites, seed=self._data_seed, order=self._reading_order
            )
        return make_stream(
            self.harvest,
            self.sites,
            batch_size=config.trainer.batch_size,
            seed=self._data_seed,
            target_site=config.target_site,
            target_sites=self.targets if config.target_sites else (),
            mix_layers=config.mix_layers,
            crosscoder=self.cls.concatenates,
            outlier_multiple=config.outliers,
            labels=self._labels,
            transform=self._lens,
            mix_chunks=config.mix_chunks,
            order=self._reading_order,
            device=process_group.device(config.device),
        )

    @property
    def _labels(self) -> Literal["document", "neighbours"] | None:
        """Which rows are of one class, or neighbours, for losses that need to know."""
        if self.sae_config.needs_neighbours:
            return "neighbours"
        return "document" if self.sae_config.needs_labels else None

    @property
    def _data_seed(self) -> int:
        return self.config.seed if self.config.data_seed is None else self.config.data_seed

    def finished(self) -> bool:
        """True if the SAE is there already."""
        if self._remote is not None:
            return self._remote.finished()
        return (self.work_folder / SAE_FOLDER).exists()

    def locked(self) -> AbstractContextManager[None]:
        """A lock against processes other than those of this torchrun training into the folder.

        Raises ArtefactError if one does.
        """
        if self._remote is not None:
            return self._remote.locked()
        return locked(self.folder, "training") if process_group.first() else nullcontext()

    @property
    def work_folder(self) -> Path:
        """Where files are written: `folder`, or for an object store a folder of this machine."""
        return local(self.folder) if self._remote is None else self._remote.folder

    def start(self) -> None:
        """Make the trainer and, in a new folder, write the manifest."""
        if self._remote is not None:
            self._remote.fetch()
        elif process_group.first():
            for found in list(leftovers(self.work_folder)):
                remove_leftover(found)
        trainer = self.trainer  # before anything is written: wrong input leaves no folder behind
        tokens = self.total_steps * self.stream.tokens_per_batch
        if trainer.dead_after >= tokens:
            say(
                f"trainer.dead_after_tokens {trainer.dead_after:,} is all of the run's {tokens:,} "
                "tokens or more: no feature will count as dead, and nothing (AuxK) revives any"
            )
        if process_group.first():
            run_folder.write(
                self.folder,
                self.settings,
                parent=self.harvest.hash,
                tag=trainer.tag,
                site=self.sites[0],
                numerics=trainer.numerics.state_dict(),
                learning_rate={"peak": trainer.lr, "from": self.config.trainer.lr_from()},
            )

    @cached_property
    def trainer(self) -> Trainer:
        """The trainer, at the run's last checkpoint."""
        saved = None if self._remote is None else self._remote.put_checkpoint
        return self.make_trainer(self.work_folder, saved)

    def make_trainer(self, folder: Path | None, saved: Callable[[], None] | None = None) -> Trainer:
        """A trainer that writes to a folder (None: nowhere); `saved` is called after each save."""
        config = self.config
        sae = self.make_sae().to(process_group.device(config.device))
        return Trainer(
            sae,
            self.stream,
            self.trainer_config,
            total_steps=self.total_steps,
            held_out=self.stream.held_out(config.evaluation_rows),
            calibration=self.stream.held_out(config.calibration_rows),
            folder=folder,
            with_loss=loss_through_model(self.stream, sae),
            finish=self.finish_rate,
            initialise=config.start_from is None,
            tag=self.tag,
            seed=config.seed,
            saved=saved,
        )

    def make_sae(self) -> SparseAutoencoder:
        """The SAE before training (new, or `start_from`), with its normalisers and metadata."""
        config, stream = self.config, self.stream
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            d_out = sum(map(self.harvest.d_in, self.targets)) or None
            sae = self.cls(self.sae_config, stream.d_in, d_out)
        fits = {site: self._fit(site) for site in (*self.sites, *self.targets)}
        if config.mix_layers is not None:
            sae.site_normalisers = {site: fits[site] for site in self.sites}
        elif self.cls.concatenates:
            sae.normaliser = Normaliser.side_by_side([fits[site] for site in self.sites])
        else:
            sae.normaliser = fits[self.sites[0]]
        if self.targets:
            written = [fits[site] for site in self.targets]
            several = self.cls.concatenates
            sae.output_normaliser = Normaliser.side_by_side(written) if several else written[0]
        if config.start_from is not None:
            _go_on_from(sae, config.start_from)
        sae.metadata = self._metadata()
        return sae

    def _fit(self, site: str) -> Normaliser:
        moments = self.stream.statistics(site)
        sample = None
        if self.config.normaliser in ("standardised", "sqrt_d"):
            sample = torch.cat(list(self.stream.fitting_rows(site, _SAMPLE_ROWS)))
        return Normaliser.fit(
            self.config.normaliser,
            mean=torch.from_numpy(moments.mean),
            mean_square=moments.mean_square,
            sample=sample,
        )

    def _metadata(self) -> dict[str, Any]:
        model, config = self.harvest.manifest["model"], self.config
        first, *others = self.sites
        several = {}
        if others:
            several = {
                "sites": list(self.sites),
                "site_widths": [self.harvest.d_in(site) for site in self.sites],
            }
        return {
            "site": first,
            **several,
            **({"target_site": config.target_site} if config.target_site else {}),
            **({"target_sites": list(self.targets)} if config.target_sites else {}),
            "model": model["name"],
            "model_spec": model["spec"],
            "model_revision": model["revision"],
            "weights_hash": model["weights_hash"],
            **({"tokenizer_hash": model["tokenizer_hash"]} if "tokenizer_hash" in model else {}),
            "harvest": str(config.harvest),
            "harvest_hash": self.harvest.hash,
            "context": self.harvest.context,
            "tokens_trained": self.total_steps * self.stream.tokens_per_batch,
            "normaliser": config.normaliser,
            **({"lens": config.lens} if config.lens else {}),
            **self._finish_facts(),
            "seed": config.seed,
            "saescope_commit": git_commit(),
        }

    @property
    def finish_steps(self) -> int:
        """Steps of the finish, at the run's end; 0 without one."""
        if not isinstance(self.stream, FinishStream):
            return 0
        return self.total_steps - self.stream.first_batches

    @property
    def finish_rate(self) -> FinishRate:
        """Steps and learning rate of the finish."""
        optimiser = self.config.trainer.optimiser
        lr = self.config.finish.peak_lr(self.sae_config.d_sae, optimiser)
        return FinishRate(self.finish_steps, lr)

    def _finish_facts(self) -> dict[str, Any]:
        """What is said of a finish; an SAE of no more tokens than `after_tokens` has had none."""
        if not isinstance(self.stream, FinishStream):
            return {}
        after = self.stream.first_batches * self.stream.tokens_per_batch
        return {"finish": {"objective": self.config.finish.objective, "after_tokens": after}}

    def release(self) -> SparseAutoencoder:
        """Write the trained SAE, folded, with its held-out metrics; the SAE."""
        sae, last = self.trainer.release(), self.trainer.last_held_out
        if self.stream.outliers is not None:
            sae.metadata["outliers"] = {
                **self.stream.outliers.to_dict(),
                "rows_left_out": self.stream.removed,
            }
        sharded_checkpoint.release(sae, self.work_folder / SAE_FOLDER)
        if self._remote is not None:
            self._remote.put_sae()
        say(
            f"{self.folder}: {kind_of(sae.config)}, d_in {sae.d_in}, d_sae {sae.config.d_sae}; on "
            f"{last['rows']:,} held-out rows: {texts(('l0', 'fvu', 'cosine'), last)}"
        )
        return sae


def _go_on_from(sae: SparseAutoencoder, path: str) -> None:
    """Give `sae` the weights of a released one, at its own normaliser's scale."""
    with distributed.alone():
        given = load(path)
    same = kind_of(given.config) == kind_of(sae.config)
    width = sae.config.d_sae
    if not same or (given.d_in, given.d_out, given.d_sae) != (sae.d_in, sae.d_out, width):
        raise InputError(
            "of another architecture or size",
            where="start_from",
            given=f"{kind_of(given.config)} {given.d_in} x {given.d_sae}",
            allowed=f"{kind_of(sae.config)} {sae.d_in} x {width}",
        )
    with distributed.alone():
        ready = given.unfold(sae.normaliser, sae.output_normaliser).state_dict()
    sae.load_state_dict(sharded_checkpoint.own_rows(ready, sharded_checkpoint.has_rows(sae)))
