"""The training loop: batches in, a trained SAE and its metrics out; it knows of no store."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from sae.base import SparseAutoencoder, TrainingState
from sae.batch import RawBatch, TrainingBatch
from sae.training import checkpoint
from sae.training.controller import L0Controller, warmup_fraction
from sae.training.measuring import HeldOutRows, measure, normalised_rows
from sae.training.objective import BatchMaker, ObjectiveConfig
from sae.training.optimisers import OptimiserKind, averaged, clear_rows, decays, make_optimiser
from sae.training.schedules import base_lr, lr_factor
from sae.training.telemetry import MetricsLog, SinkKind, check_sink, sinks
from saescope.config import Config, to_dict
from saescope.errors import InputError, SaescopeError, check_range
from saescope.progress import Progress

CHECKPOINT = Path("checkpoints") / "last"
METRICS = "metrics.jsonl"


class BatchSource(Protocol):
    """An endless stream of activations, [batch, d_in] or a RawBatch, with a JSON-able state."""

    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(Config):
    """How to train, whatever the architecture."""

    batch_size: int = 2048
    """Rows a step."""
    accumulate: int = 1
    """Parts that a batch is split into for memory; their gradients are averaged into one step.
    Batch-level selectors and AuxK then see one part at a time."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs matrix products under autocast; weights and thresholds stay float32."""
    optimiser: OptimiserKind = "adam"
    """adam, signum, or the schedule-free version of either."""
    lr: float | None = None
    """Peak learning rate; 2e-4 / sqrt(d_sae / 2^14) times lr_multiplier if not given."""
    lr_multiplier: float = 1.0
    """Factor on the rule above; short runs want more than 1."""
    warmup_fraction: float = 0.05
    """Part of the run over which the learning rate rises."""
    decay_fraction: float = 0.2
    """Part of the run, at its end, over which the learning rate falls to 0."""
    beta1: float = 0.9
    """Decay of the gradient mean (the momentum of signum and of the schedule-free average)."""
    beta2: float = 0.999
    """Adam's decay of the gradient square."""
    eps: float = 6.25e-10
    """Adam's epsilon (Gao et al. 2024)."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; 0 turns clipping off."""
    target_l0: float | None = None
    """Mean L0 to reach on held-out rows: k, for architectures that have it; else the sparsity
    coefficient is moved during training until L0 is this."""
    dead_after_tokens: int = 10_000_000
    """A feature is dead when it has not fired for this many tokens."""
    evaluate_every: int = 250
    """Steps between held-out evaluations."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""
    telemetry: SinkKind = "none"
    """Where metrics go besides metrics.jsonl: none, wandb or tensorboard (if installed)."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Changes to the reconstruction loss that every architecture can take."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "dead_after_tokens", "evaluate_every"):
            check_range(f"trainer.{name}", getattr(self, name), low=1)
        check_range("trainer.checkpoint_every", self.checkpoint_every, low=1)
        check_range("trainer.accumulate", self.accumulate, high=self.batch_size)
        check_range("trainer.lr_multiplier", self.lr_multiplier, above=0)
        for name in ("lr", "target_l0"):
            if getattr(self, name) is not None:
                check_range(f"trainer.{name}", getattr(self, name), above=0)
        for name in ("warmup_fraction", "decay_fraction"):
            check_range(f"trainer.{name}", getattr(self, name), low=0, high=1)
        for name in ("beta1", "beta2"):
            check_range(f"trainer.{name}", getattr(self, name), low=0, below=1)
        check_range("trainer.eps", self.eps, above=0)
        check_range("trainer.grad_clip", self.grad_clip, low=0)
        check_sink(self.telemetry)


class Trainer:
    """Trains one SAE into a run's folder; made again over the same folder, it goes on where it was.

    Args:
        held_out: fresh iterators of batches that are never trained on.
        calibration: the same, to set inference thresholds on; held_out if not given.
        with_loss: puts another reconstruction loss into a batch (end-to-end training).
        initialise: set from the first batch what an architecture initialises from data; not for
            an SAE that is trained on.
        tag: identifies the run's configuration; a checkpoint with another tag is refused.
        seed: of the run's own randomness (masks, resampling).
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        batches: BatchSource,
        config: TrainerConfig,
        *,
        total_steps: int,
        held_out: HeldOutRows,
        folder: Path,
        calibration: HeldOutRows | None = None,
        with_loss: Callable[[RawBatch, TrainingBatch], TrainingBatch] | None = None,
        initialise: bool = True,
        tag: str = "",
        seed: int = 0,
    ) -> None:
        check_range("training steps", total_steps, low=1)
        self.sae, self.batches, self.config = sae, batches, config
        self.total_steps, self.held_out = total_steps, held_out
        self.calibration = calibration or held_out
        self.with_loss = with_loss
        self.initialise = initialise
        self.folder, self.tag = folder, tag
        self.lr = config.lr or base_lr(sae.d_sae, config.optimiser) * config.lr_multiplier
        self.optimiser = make_optimiser(
            config.optimiser, sae.parameters(), lr=self.lr, beta1=config.beta1, beta2=config.beta2,
            eps=config.eps,
        )  # fmt: skip
        self.maker = BatchMaker(sae, config.objective)
        self.controller = None
        if config.target_l0 is not None and sae.penalised:
            self.controller = L0Controller(
                config.target_l0,
                total_steps=total_steps,
                warmup_fraction=warmup_fraction(sae.config),
            )
        self.generator = torch.Generator().manual_seed(seed)
        self.step = 0
        self.last_held_out: dict[str, Any] = {}
        self.tokens_since_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.b_dec.device)
        if (folder / CHECKPOINT).exists():
            self._restore()
        extra = sinks(
            config.telemetry, folder, folder.name, to_dict(config), tag=tag, resume_step=self.step
        )
        self.log = MetricsLog(folder / METRICS, resume_step=self.step, sinks=extra)

    @property
    def finished(self) -> bool:
        """True after the last step."""
        return self.step >= self.total_steps

    def run(self) -> SparseAutoencoder:
        """Train to the last step; the SAE, in evaluation mode."""
        with Progress("training", self.total_steps, "steps", done=self.step) as progress:
            batches = iter(self.batches)
            while not self.finished:
                progress.advance(1, self.advance(next(batches)))
        return self.sae.eval()

    def advance(self, raw: RawBatch | Tensor) -> str:
        """One step, with the evaluation and the checkpoint that fall due; a note for people."""
        config, note = self.config, ""
        terms = self.train_step(raw)
        if self.finished:
            self._settle()
        if self.step % config.evaluate_every == 0 or self.finished:
            note = self._evaluate(terms)
        if self.step % config.checkpoint_every == 0 or self.finished:
            self._save()
        if self.finished:
            self.log.close()
        return note

    def train_step(self, raw: RawBatch | Tensor) -> dict[str, float]:
        """One optimiser step on rows [batch, d_in]; the named parts of the loss."""
        raw = RawBatch(raw) if isinstance(raw, Tensor) else raw
        sae, config = self.sae.train(), self.config
        state = TrainingState(
            step=self.step,
            total_steps=self.total_steps,
            dead=self.tokens_since_fired >= config.dead_after_tokens,
            penalty=self.controller.penalty if self.controller else 1.0,
            generator=self.generator,
        )
        self.optimiser.zero_grad(set_to_none=True)
        terms, counts, rows = self._backward(raw, state)
        # the projection comes first: what it removes must not count in the clipped norm
        sae.before_step()
        clip = config.grad_clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), clip, foreach=True)
        if not torch.isfinite(norm):
            raise SaescopeError(
                f"step {self.step}: the gradient is not finite "
                f"(loss {terms['loss']}); lower trainer.lr, or check the harvest"
            )
        factor = lr_factor(
            self.step,
            self.total_steps,
            warmup=round(config.warmup_fraction * self.total_steps),
            decay=round(config.decay_fraction * self.total_steps)
            if decays(config.optimiser)
            else 0,
        )
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr * factor
        self.optimiser.step()
        sae.after_step()
        self.tokens_since_fired += rows
        self.tokens_since_fired[counts > 0] = 0
        self._resample(raw, state)
        l0 = float(counts.sum()) / rows
        if self.controller:
            self.controller.update(l0, self.step)
        self.step += 1
        return {
            **terms,
            "l0": l0,
            "dead": int(state.dead.sum()),
            "grad_norm": norm.item(),
            "lr": self.lr * factor,
            **({"penalty": state.penalty} if self.controller else {}),
        }

    def _backward(
        self, raw: RawBatch, state: TrainingState
    ) -> tuple[dict[str, float], Tensor, int]:
        """Gradients of the mean loss over a batch's parts; the loss and its terms, counts, rows."""
        low = self.config.precision == "bfloat16"
        size = -(-len(raw) // self.config.accumulate)
        sums: dict[str, float] = {}
        counts = torch.zeros(self.sae.d_sae, dtype=torch.int64, device=raw.x.device)
        for start in range(0, len(raw), size):
            part = raw if size >= len(raw) else raw.select(slice(start, start + size))
            batch = self.maker.make(part, self.generator)
            if self.with_loss is not None:
                batch = self.with_loss(part, batch)
            if self.step == 0 and start == 0 and self.initialise:
                self.sae.start(batch)
            with torch.autocast(part.x.device.type, torch.bfloat16, enabled=low):
                output = batch.finish(self.sae.training_output(batch, state))
            share = len(part) / len(raw)
            (output.loss * share if share < 1 else output.loss).backward()
            counts += output.counts
            for name, value in {"loss": output.loss.detach(), **output.terms}.items():
                sums[name] = sums.get(name, 0.0) + value.item() * share
        return sums, counts, len(raw)

    def _resample(self, raw: RawBatch, state: TrainingState) -> None:
        if not self.sae.resamples(state):
            return
        features = self.sae.resample(self.maker.make(raw, self.generator), state)
        if features is not None and len(features):
            clear_rows(self.optimiser, self.sae, features)
            self.tokens_since_fired[features] = 0

    def _settle(self) -> None:
        """After the last step: the averaged weights, where there are, and inference thresholds."""
        with averaged(self.optimiser, self.sae.after_step):
            released = {name: value.clone() for name, value in self.sae.state_dict().items()}
        self.sae.load_state_dict(released)
        self.sae.eval().calibrate(normalised_rows(self.maker, self.calibration))

    def _evaluate(self, terms: dict[str, float]) -> str:
        with averaged(self.optimiser, self.sae.after_step):
            held_out = measure(self.sae.eval(), self.held_out)
        self.last_held_out = held_out
        values = {"tokens": self.step * self.config.batch_size, "train": terms}
        self.log.append(self.step, **values, held_out=held_out)
        return (
            f"held-out FVU {held_out['fvu']:.4f}, L0 {held_out['l0']:.1f}, dead {terms['dead']:,}"
        )

    def _save(self) -> None:
        checkpoint.save(
            self.folder / CHECKPOINT,
            tensors={
                "sae": dict(self.sae.state_dict()),
                "optimiser": checkpoint.optimiser_tensors(self.optimiser),
                "run": {
                    "tokens_since_fired": self.tokens_since_fired,
                    "rng": self.generator.get_state(),
                },
            },
            state={
                "step": self.step,
                "tag": self.tag,
                "batches": self.batches.state_dict(),
                "controller": self.controller.state_dict() if self.controller else None,
                "last_held_out": self.last_held_out,
            },
        )

    def _restore(self) -> None:
        tensors, state = checkpoint.load(self.folder / CHECKPOINT)
        if state["tag"] != self.tag:
            raise InputError(
                "holds a run with another configuration; choose another folder",
                where=str(self.folder),
            )
        self.sae.load_state_dict(tensors["sae"])
        checkpoint.restore_optimiser(self.optimiser, tensors["optimiser"])
        self.tokens_since_fired = tensors["run"]["tokens_since_fired"].to(self.sae.b_dec.device)
        self.generator.set_state(tensors["run"]["rng"])
        if self.controller:
            self.controller.load_state_dict(state["controller"])
        self.batches.load_state_dict(state["batches"])
        self.step, self.last_held_out = state["step"], state["last_held_out"]
