"""The `[trainer]` of a training file: how to train, whatever the architecture."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from sae.core.config import SAEConfig
from sae.training.batch_maker import LossConfig
from sae.training.numerics import KernelsKind
from sae.training.optimisers import OptimiserKind
from sae.training.schedules import base_lr, default_lr
from sae.training.telemetry import SinkKind, check_sink
from saescope.config import Config
from saescope.errors import InputError, check_range
from saescope.renamed_fields import WAS

_DEAD_AFTER = 10_000_000
"""tokens (Gao et al. 2024), or of a run that is not much longer"""
_DEAD_SHARE = 1 / 32
"""of its tokens: with 1/8 more features were dead at the end, and FVU was no lower
(docs/reports/learning_rate.md)"""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(Config):
    """How to train, whatever the architecture."""

    batch_size: int = 2048
    """Rows a step."""
    accumulate: int = 1
    """Micro-batches that a batch is split into, to save memory; their gradients are averaged into
    one step. Batch-level selectors and AuxK then see one micro-batch at a time."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs matrix products under autocast; weights and thresholds stay float32."""
    optimiser: OptimiserKind = "adam"
    """adam, signum, or the schedule-free version of either."""
    lr: float | None = None
    """Peak learning rate. If neither it nor lr_multiplier is given it follows the length of the
    run: the fewer steps, the higher."""
    lr_multiplier: float | None = None
    """Where lr is not given: so many times 2e-4 / sqrt(d_sae / 2^14), however long the run is."""
    warmup_fraction: float = 0.05
    """Fraction of the run over which the learning rate rises."""
    decay_fraction: float = 0.2
    """Fraction of the run, at its end, over which the learning rate falls to 0."""
    beta1: float = 0.9
    """Decay of the gradient mean (the momentum of signum and of the schedule-free average)."""
    beta2: float = 0.999
    """Adam's decay of the gradient square."""
    eps: float = 6.25e-10
    """Adam's epsilon (Gao et al. 2024)."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; 0 turns clipping off. The gradient is of the FVU, so 1
    hardly ever clips; 0.01, which on a synthetic world always does, finds more features in a short
    run (docs/how-to/synthetic-worlds.md)."""
    target_l0: float | None = None
    """Mean L0 to reach on held-out rows: k, for architectures that have it; else the sparsity
    coefficient is moved during training until L0 is this."""
    target_l0_start: float | None = None
    """Where that is a penalty: the L0 aimed at when the run begins, which falls by equal ratios to
    target_l0; target_l0 throughout if not given. Features that begin with many learn more."""
    target_l0_fraction: float = 0.7
    """Fraction of the run over which it falls."""
    dead_after_tokens: int | None = None
    """A feature is dead when it has not fired for this many tokens; until so many have been seen
    it is not known which are. 10 million, or a 32nd of the run's tokens if that is less, if not
    given."""
    evaluate_every: int = 250
    """Steps between held-out evaluations."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""
    snapshots: int = 0
    """How many SAEs to keep along the way, in checkpoints/tokens-NUMBER of the run: at steps of
    equal ratios from a thousandth of the run towards its end. `saescope compare` follows features
    through them."""
    snapshot_tokens: tuple[int, ...] = ()
    """Or the numbers of tokens, ascending, after which to keep the SAE."""
    kernels: KernelsKind = "auto"
    """What computes sparse operations: auto (the fastest there is; a run that is resumed keeps to
    what it began with), reference, torch, cpu (C++) or triton. SAESCOPE_KERNELS overrides it."""
    deterministic: bool = False
    """Sums have an order that neither chance (on a GPU) nor the number of threads decides, and
    nothing is chosen by measuring: a run repeats bit for bit on machines of one kind. Slower."""
    telemetry: SinkKind = "none"
    """Where metrics go besides metrics.jsonl: none, wandb or tensorboard (if installed)."""
    loss: LossConfig = field(default_factory=LossConfig, metadata={WAS: "objective"})
    """Changes to the reconstruction loss that every architecture can take."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "evaluate_every"):
            check_range(f"trainer.{name}", getattr(self, name), low=1)
        if self.dead_after_tokens is not None:
            check_range("trainer.dead_after_tokens", self.dead_after_tokens, low=1)
        check_range("trainer.checkpoint_every", self.checkpoint_every, low=1)
        self._check_snapshots()
        check_range("trainer.accumulate", self.accumulate, high=self.batch_size)
        for name in ("lr", "lr_multiplier", "target_l0"):
            if getattr(self, name) is not None:
                check_range(f"trainer.{name}", getattr(self, name), above=0)
        if self.target_l0_start is not None:
            check_range("trainer.target_l0_start", self.target_l0_start, low=self.target_l0 or 0)
        for name in ("warmup_fraction", "decay_fraction", "target_l0_fraction"):
            check_range(f"trainer.{name}", getattr(self, name), low=0, high=1)
        for name in ("beta1", "beta2"):
            check_range(f"trainer.{name}", getattr(self, name), low=0, below=1)
        check_range("trainer.eps", self.eps, above=0)
        check_range("trainer.grad_clip", self.grad_clip, low=0)
        check_sink(self.telemetry)

    def _check_snapshots(self) -> None:
        check_range("trainer.snapshots", self.snapshots, low=0)
        tokens = self.snapshot_tokens
        for each in tokens:
            check_range("trainer.snapshot_tokens", each, low=1)
        if list(tokens) != sorted(set(tokens)):
            raise InputError(
                "must ascend, each number once", where="trainer.snapshot_tokens", given=tokens
            )
        if self.snapshots and tokens:
            raise InputError(
                "say how many snapshots to keep or after which tokens, not both",
                where="trainer.snapshots",
                given=self.snapshots,
                allowed="0, with snapshot_tokens",
            )

    def with_lr(
        self, sae: SAEConfig, steps: int, recorded: Mapping[str, Any] | None = None
    ) -> Self:
        """With the learning rate that a run of so many steps takes, where none is given.

        Args: recorded, the settings that the run was begun with, if it goes on: it keeps theirs.

        >>> TrainerConfig().with_lr(SAEConfig(d_sae=4096), 1000).lr
        0.0011
        """
        lr, multiplier = self.lr, self.lr_multiplier
        if recorded is not None:
            if lr is None and multiplier is None:
                lr = recorded["lr"]
            # 1.0 in older runs, which it did not change where lr was given
            multiplier = recorded["lr_multiplier"] if multiplier is None else multiplier
        if lr is None and multiplier is None:
            lr = default_lr(sae.d_sae, steps, self.optimiser)
        return replace(self, lr=lr, lr_multiplier=multiplier)

    def peak_lr(self, sae: SAEConfig, steps: int) -> float:
        """The peak learning rate of a run of so many steps."""
        if self.lr is not None:
            return self.lr
        if self.lr_multiplier is not None:
            return base_lr(sae.d_sae, self.optimiser) * self.lr_multiplier
        return default_lr(sae.d_sae, steps, self.optimiser)

    def lr_from(self) -> str:
        """What the peak learning rate follows from, in words."""
        if self.lr is not None:
            return "trainer.lr"
        return "the steps" if self.lr_multiplier is None else "trainer.lr_multiplier"

    def dead_after(self, tokens: int) -> int:
        """`dead_after_tokens`, or what it is in a run of so many tokens.

        >>> TrainerConfig().dead_after(800_000), TrainerConfig().dead_after(10**9)
        (25000, 10000000)
        """
        if self.dead_after_tokens is not None:
            return self.dead_after_tokens
        return max(1, min(_DEAD_AFTER, round(_DEAD_SHARE * tokens)))
