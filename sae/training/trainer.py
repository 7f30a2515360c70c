"""The training loop: batches in, a trained SAE and its metrics out; it knows of no store."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sae.base import SparseAutoencoder, TrainingState
from sae.evaluation.reconstruction import measure_reconstruction
from sae.training import checkpoint
from sae.training.schedules import base_lr, lr_factor
from sae.training.telemetry import MetricsLog
from saescope.config import Config
from saescope.errors import InputError, SaescopeError, check_range
from saescope.progress import Progress

CHECKPOINT = Path("checkpoints") / "last"
METRICS = "metrics.jsonl"


class BatchSource(Protocol):
    """An endless stream of activations [batch, d_in] whose place can be saved (JSON-able state)."""

    def __iter__(self) -> Iterator[Tensor]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(Config):
    """How to train, whatever the architecture."""

    batch_size: int = 2048
    """Tokens a step."""
    lr: float | None = None
    """Peak learning rate of Adam; 2e-4 / sqrt(d_sae / 2^14) times lr_multiplier if not given."""
    lr_multiplier: float = 1.0
    """Factor on the rule above; short runs want more than 1."""
    warmup_fraction: float = 0.05
    """Part of the run over which the learning rate rises."""
    decay_fraction: float = 0.2
    """Part of the run, at its end, over which the learning rate falls to 0."""
    beta1: float = 0.9
    """Adam's decay of the gradient mean."""
    beta2: float = 0.999
    """Adam's decay of the gradient square."""
    eps: float = 6.25e-10
    """Adam's epsilon (Gao et al. 2024)."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; 0 turns clipping off."""
    dead_after_tokens: int = 10_000_000
    """A feature is dead when it has not fired for this many tokens."""
    evaluate_every: int = 250
    """Steps between held-out evaluations."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        check_range("trainer.batch_size", self.batch_size, low=1)
        check_range("trainer.lr_multiplier", self.lr_multiplier, above=0)
        if self.lr is not None:
            check_range("trainer.lr", self.lr, above=0)
        for name in ("warmup_fraction", "decay_fraction"):
            check_range(f"trainer.{name}", getattr(self, name), low=0, high=1)
        for name in ("beta1", "beta2"):
            check_range(f"trainer.{name}", getattr(self, name), low=0, below=1)
        check_range("trainer.eps", self.eps, above=0)
        check_range("trainer.grad_clip", self.grad_clip, low=0)
        for name in ("dead_after_tokens", "evaluate_every", "checkpoint_every"):
            check_range(f"trainer.{name}", getattr(self, name), low=1)


class Trainer:
    """Trains one SAE into a run's folder; made again over the same folder, it goes on where it was.

    Args: held_out gives fresh iterators of activations [rows, d_in] that are never trained on; tag
    identifies the run's configuration, and a checkpoint with another tag is refused.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        batches: BatchSource,
        config: TrainerConfig,
        *,
        total_steps: int,
        held_out: Callable[[], Iterable[Tensor]],
        folder: Path,
        tag: str = "",
    ) -> None:
        check_range("training steps", total_steps, low=1)
        self.sae, self.batches, self.config = sae, batches, config
        self.total_steps, self.held_out = total_steps, held_out
        self.folder, self.tag = folder, tag
        self.lr = config.lr or base_lr(sae.d_sae) * config.lr_multiplier
        self.optimiser = torch.optim.Adam(
            sae.parameters(), lr=self.lr, betas=(config.beta1, config.beta2), eps=config.eps,
            fused=True,
        )  # fmt: skip
        self.step = 0
        self.last_held_out: dict[str, float] = {}
        self.tokens_since_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.b_dec.device)
        if (folder / CHECKPOINT).exists():
            self._restore()
        self.log = MetricsLog(folder / METRICS, resume_step=self.step)

    def run(self) -> SparseAutoencoder:
        """Train to the last step; the SAE, in evaluation mode."""
        config = self.config
        with Progress("training", self.total_steps, "steps", done=self.step) as progress:
            batches = iter(self.batches)
            while self.step < self.total_steps:
                terms = self.train_step(next(batches))
                note = ""
                if self.step % config.evaluate_every == 0 or self.step == self.total_steps:
                    note = self._evaluate(terms)
                if self.step % config.checkpoint_every == 0 or self.step == self.total_steps:
                    self._save()
                progress.advance(1, note)
        return self.sae.eval()

    def train_step(self, x: Tensor) -> dict[str, float]:
        """One optimiser step on x [batch, d_in]; the named parts of the loss."""
        sae, config = self.sae.train(), self.config
        y = sae.normaliser.apply(x)
        if self.step == 0:
            sae.start(y)
        state = TrainingState(
            step=self.step,
            total_steps=self.total_steps,
            dead=self.tokens_since_fired >= config.dead_after_tokens,
        )
        output = sae.training_output(y, state)
        self.optimiser.zero_grad(set_to_none=True)
        output.loss.backward()
        # the projection comes first: what it removes must not count in the clipped norm
        sae.before_step()
        clip = config.grad_clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), clip, foreach=True)
        if not torch.isfinite(norm):
            raise SaescopeError(
                f"step {self.step}: the gradient is not finite "
                f"(loss {output.loss.item()}); lower trainer.lr, or check the harvest"
            )
        factor = lr_factor(
            self.step,
            self.total_steps,
            warmup=round(config.warmup_fraction * self.total_steps),
            decay=round(config.decay_fraction * self.total_steps),
        )
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr * factor
        self.optimiser.step()
        sae.after_step()
        self.tokens_since_fired += len(x)
        self.tokens_since_fired[output.fired] = 0
        self.step += 1
        return {
            "loss": output.loss.item(),
            **{name: value.item() for name, value in output.terms.items()},
            "dead": int(state.dead.sum()),
            "grad_norm": norm.item(),
            "lr": self.lr * factor,
        }

    def _evaluate(self, terms: dict[str, float]) -> str:
        measured = measure_reconstruction(self.sae.eval(), self.held_out)
        held_out = {
            "l0": measured.l0,
            "fvu": measured.fvu,
            "cosine": measured.cosine,
            "dead_fraction": measured.dead_fraction,
            "rows": measured.rows,
        }
        tokens = self.step * self.config.batch_size
        self.last_held_out = held_out
        self.log.append(self.step, tokens=tokens, train=terms, held_out=held_out)
        return f"held-out FVU {measured.fvu:.4f}, L0 {measured.l0:.1f}, dead {terms['dead']:,}"

    def _save(self) -> None:
        checkpoint.save(
            self.folder / CHECKPOINT,
            tensors={
                "sae": dict(self.sae.state_dict()),
                "optimiser": checkpoint.optimiser_tensors(self.optimiser),
                "run": {
                    "tokens_since_fired": self.tokens_since_fired,
                    "rng": torch.get_rng_state(),
                },
            },
            state={
                "step": self.step,
                "tag": self.tag,
                "batches": self.batches.state_dict(),
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
        torch.set_rng_state(tensors["run"]["rng"])
        self.batches.load_state_dict(state["batches"])
        self.step, self.last_held_out = state["step"], state["last_held_out"]
