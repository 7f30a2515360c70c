"""`saescope train`: from a harvest to a run's folder.

A run's folder holds `manifest.json` (what, from what, with which versions), `metrics.jsonl`,
`checkpoints/` and, once trained, `sae/` (the SAE itself).
"""

import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from activations import ActivationLoader, ActivationStore
from sae.architectures import architecture
from sae.architectures.topk import TopKConfig
from sae.base import SAEConfig, SparseAutoencoder, kind_of
from sae.harvests import choose_site, held_out_rows, open_complete
from sae.loading import SAE_FOLDER, load
from sae.normaliser import Normaliser, NormaliserKind
from sae.training.trainer import Trainer, TrainerConfig
from saescope.artefact import MANIFEST, read_manifest, sha256_json, write_manifest
from saescope.config import Config, to_dict
from saescope.errors import InputError, check_range
from saescope.progress import say

RUN_SCHEMA = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """Train one SAE on one site of a harvest."""

    SELECTORS: ClassVar[tuple[str, ...]] = ("sae.kind",)

    harvest: str
    """Folder of a finished harvest."""
    out: str
    """Folder of the run to write."""
    site: str | None = None
    """TransformerLens name of the site; may be left out if the harvest has only one."""
    passes: float = 3.0
    """Passes over the harvest's training rows."""
    seed: int = 0
    """Seed of the initial weights and of the order of the batches."""
    normaliser: NormaliserKind = "unit_mean_square"
    """Scale to train at: none, unit_mean_square (E||x||^2 = 1), or centred (same, mean removed)."""
    evaluation_rows: int = 8192
    """Held-out rows measured during training."""
    sae: SAEConfig = dataclasses.field(default_factory=TopKConfig)
    """The architecture and its size."""
    trainer: TrainerConfig = dataclasses.field(default_factory=TrainerConfig)
    """The optimiser and its schedule."""

    def __post_init__(self) -> None:
        check_range("passes", self.passes, above=0)
        check_range("evaluation_rows", self.evaluation_rows, low=1)

    @classmethod
    def specialise(cls, values: Mapping[str, Any]) -> type[Self]:
        """The same with the chosen architecture's own configuration."""
        table = values.get("sae", {})
        kind = table.get("kind", "topk") if isinstance(table, Mapping) else "topk"
        return _specialised(kind)  # type: ignore[return-value]


@cache
def _specialised(kind: str) -> type[TrainConfig]:
    concrete = architecture(kind).Config
    made = dataclasses.make_dataclass(
        "TrainConfig",
        [("sae", concrete, dataclasses.field(default_factory=concrete))],
        bases=(TrainConfig,),
        frozen=True,
        kw_only=True,
    )
    made.__doc__ = TrainConfig.__doc__
    return made


def train(config: TrainConfig) -> SparseAutoencoder:
    """Train an SAE as configured, going on from the run's last checkpoint if it has one.

    Raises InputError if the folder holds another run, the site is unknown, or there are too few
    rows; ArtefactError if the harvest is missing, unfinished or damaged.
    """
    folder = Path(config.out)
    harvest = open_complete(config.harvest)
    site = choose_site(harvest, config.site)
    settings = {**to_dict(config), "site": site}
    tag = sha256_json(
        {"config": {**settings, "harvest": None, "out": None}, "harvest": harvest.hash}
    )
    if (folder / MANIFEST).exists():
        _check_same_run(folder, tag, settings)
        if (folder / SAE_FOLDER).exists():
            say(f"{folder}: already trained")
            return load(folder)
    # made before anything is written, so that wrong input leaves no folder behind
    trainer = _prepare(config, harvest, site, tag)
    if not (folder / MANIFEST).exists():
        more = {"tag": tag, "site": site}
        write_manifest(
            folder, kind="run", schema=RUN_SCHEMA, config=settings, parent=harvest.hash, **more
        )
    sae = trainer.run()
    last = trainer.last_held_out
    sae.save(folder / SAE_FOLDER, held_out_during_training=last)
    say(
        f"{folder}: {kind_of(sae.config)}, d_in {sae.d_in}, d_sae {sae.d_sae}; on {last['rows']:,} "
        f"held-out rows: L0 {last['l0']:.1f}, FVU {last['fvu']:.4f}, cosine {last['cosine']:.4f}"
    )
    return sae


def _check_same_run(folder: Path, tag: str, settings: dict[str, Any]) -> None:
    manifest = read_manifest(folder, kind="run", schema=RUN_SCHEMA)
    if manifest["tag"] == tag:
        return
    differing = [name for name in settings if manifest["config"].get(name) != settings[name]]
    raise InputError(
        f"holds another run (differs in: {', '.join(differing) or 'the harvest'}); choose another "
        "out, or remove it",
        where=str(folder),
    )


def _prepare(config: TrainConfig, harvest: ActivationStore, site: str, tag: str) -> Trainer:
    rows = harvest.n_rows("train")
    total_steps = int(config.passes * rows / config.trainer.batch_size)
    if total_steps < 1:
        raise InputError(
            "fewer training rows than one batch", where="trainer.batch_size",
            given=config.trainer.batch_size, allowed=f"up to {int(config.passes * rows)}",
        )  # fmt: skip
    if harvest.n_rows("held_out") == 0:
        raise InputError("no held-out rows to evaluate on", where=config.harvest)
    torch.manual_seed(config.seed)
    sae = architecture(kind_of(config.sae))(config.sae, harvest.d_in(site))
    statistics = harvest.statistics(site)
    sae.normaliser = Normaliser.fit(
        config.normaliser,
        mean=torch.from_numpy(statistics.mean),
        mean_square=statistics.mean_square,
    )
    model = harvest.manifest["model"]
    sae.metadata = {
        "site": site,
        "model": model["name"],
        "model_spec": model["spec"],
        "model_revision": model["revision"],
        "weights_hash": model["weights_hash"],
        "harvest": str(config.harvest),
        "harvest_hash": harvest.hash,
        "context": harvest.context,
        "tokens_trained": total_steps * config.trainer.batch_size,
    }
    loader = ActivationLoader(harvest, site, batch_size=config.trainer.batch_size, seed=config.seed)
    return Trainer(
        sae,
        loader,
        config.trainer,
        total_steps=total_steps,
        held_out=held_out_rows(harvest, site, config.evaluation_rows),
        folder=Path(config.out),
        tag=tag,
    )
