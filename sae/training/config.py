"""TrainConfig: the fields of a training file.

How to train, whatever the architecture, is its `[trainer]` (trainer_config); the architecture and
its size are its `[sae]`.
"""

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, Literal, Self

from sae.architectures import architecture
from sae.architectures.topk import TopKConfig
from sae.core.base import SAEConfig
from sae.core.normaliser import NormaliserKind
from sae.synthetic.config import PREFIX
from sae.training.end_to_end import EndToEndConfig
from sae.training.finish import FinishConfig
from sae.training.trainer_config import TrainerConfig
from saescope.config import Config, ConfigT
from saescope.errors import InputError, check_range
from saescope.renamed_fields import WAS

_MOST_PASSES = 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """Train one SAE on a harvest."""

    SELECTORS: ClassVar[tuple[str, ...]] = ("sae.kind",)

    harvest: str
    """Folder of a finished harvest, or its URL; of one with storage none, activations come straight
    from the model. Or a synthetic world: synth:small, synth:16k."""
    out: str
    """Folder of the run to write, or its URL: s3://bucket/name."""
    site: str | None = None
    """TransformerLens name of the site; may be left out if the harvest has only one."""
    sites: tuple[str, ...] = ()
    """Several sites, or patterns, for a crosscoder, one SAE of several layers (see mix_layers), or
    a cross-layer transcoder."""
    target_site: str | None = None
    """The site that a transcoder reconstructs."""
    target_sites: tuple[str, ...] = ()
    """The sites, or patterns, that a cross-layer transcoder reconstructs: one in each layer of
    `sites`."""
    mix_layers: Literal["all", "drawn"] | None = dataclasses.field(
        default=None, metadata={WAS: "mix"}
    )
    """Train one SAE on the rows of several layers: all (each token gives a row of every layer,
    MLSAE) or drawn (each token gives the row of one layer drawn uniformly, Group-SAE)."""
    objective: Literal["reconstruction", "end_to_end"] = "reconstruction"
    """What the reconstruction is judged by: its error, or what the model's predictions lose
    when it replaces the activation (Braun et al. 2024)."""
    end_to_end: EndToEndConfig = dataclasses.field(default_factory=EndToEndConfig)
    """What counts in end-to-end training besides the predictions."""
    finish: FinishConfig = dataclasses.field(default_factory=FinishConfig)
    """The last part of the run, if it is to train for something else."""
    passes: float = 3.0
    """Passes over the harvest's training tokens."""
    samples: int | None = None
    """Rows to train on, of a synthetic world, which has no passes."""
    seed: int = 0
    """Seed of the initial weights and of all else that is random but the order of the batches."""
    data_seed: int | None = None
    """Seed of the order of the batches; `seed` if not given."""
    normaliser: NormaliserKind = "unit_mean_square"
    """Scale to train at: none, unit_mean_square (E||x||^2 = 1), sqrt_d (E||x|| = sqrt(d_in)),
    centred (mean removed, E||x||^2 = 1) or standardised (each vector by its own mean and
    deviation)."""
    outliers: float | None = None
    """Rows whose norm exceeds so many times the median are left out, and counted."""
    lens: str | None = None
    """Folder of a tuned lens that activations go through before the SAE sees them."""
    mix_chunks: int = 4
    """How many rows are shuffled together, in chunks of the harvest; `order` says which rows. Twice
    so many of every site are in memory (19 MB a chunk at width 576)."""
    order: Literal["chunks", "spread", "windows"] | None = None
    """How the harvest is gone through: spread (as many rows as mix_chunks chunks have, from all
    over the harvest, are shuffled together; nearest to independent draws), chunks (the rows of so
    many chunks, drawn at random) or windows (one window of the harvest after another: the order of
    training straight from the model, where it is the only one, and of architectures that need
    neighbouring tokens; else the default is spread). A run that goes on keeps its own."""
    start_from: str | None = None
    """An SAE to go on from (fine-tuning); its architecture and size must be those given here."""
    evaluation_rows: int = 8192
    """Held-out rows measured during training."""
    calibration_rows: int = 16384
    """Held-out rows that inference thresholds are set on at the end."""
    ranks: Literal["rows", "features"] = "rows"
    """What the processes of torchrun share: the rows of each batch, or, for a dictionary that
    outgrows one card, its features (topk, abstopk, batchtopk, mutual_choice, relu, gated,
    jumprelu). The result is the same but for rounding."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the SAE is trained; cuda: each process has a card of its own."""
    plan: bool = False
    """Only say what it would take (steps, memory, disk, time), and write nothing."""
    sae: SAEConfig = dataclasses.field(default_factory=TopKConfig)
    """The architecture and its size."""
    trainer: TrainerConfig = dataclasses.field(default_factory=TrainerConfig)
    """The optimiser and its schedule."""

    def __post_init__(self) -> None:
        check_range("passes", self.passes, above=0, high=_MOST_PASSES)
        for name in ("evaluation_rows", "calibration_rows", "mix_chunks"):
            check_range(name, getattr(self, name), low=1)
        if self.samples is not None:
            check_range("samples", self.samples, low=1)
            if not self.harvest.startswith(PREFIX):
                raise InputError(
                    "counts the rows of a synthetic world; of a harvest give passes",
                    where="samples",
                    given=self.samples,
                )
        if self.outliers is not None:
            check_range("outliers", self.outliers, above=1)
        if self.trainer.target_l0_start is not None and self.trainer.target_l0 is None:
            raise InputError("is of no use without target_l0", where="trainer.target_l0_start")

    @classmethod
    def specialise(cls, values: Mapping[str, Any]) -> type[Self]:
        """The class whose `sae` is the configuration of the architecture chosen by `sae.kind`."""
        table = values.get("sae", {})
        kind = table.get("kind", "topk") if isinstance(table, Mapping) else "topk"
        return _specialised(cls, kind if isinstance(kind, str) else "topk")


@cache
def _specialised(base: type[ConfigT], kind: str) -> type[ConfigT]:
    concrete = architecture(kind).Config
    made = dataclasses.make_dataclass(
        base.__name__,
        [("sae", concrete, dataclasses.field(default_factory=concrete))],
        bases=(base,),
        frozen=True,
        kw_only=True,
    )
    made.__doc__ = base.__doc__
    return made
