"""The training loop: batches in, a trained SAE and its metrics out.

It takes any iterator of batches, and knows nothing of how activations are stored.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sae.core.base import SparseAutoencoder, TrainingState
from sae.core.batch import RawBatch, TrainingBatch
from sae.core.finite import check_finite
from sae.core.gradients import check_trainable
from sae.distributed import FEATURES, ROWS
from sae.kernels import gradient_buffers
from sae.kernels.fastest import Shape
from sae.training import checkpoint, gradient_sums, process_group, sharded_checkpoint
from sae.training.batch_maker import BatchMaker, check_first_rows
from sae.training.held_out import HeldOutRows, measure, normalised_rows
from sae.training.l0_controller import controller_for, reached
from sae.training.numerics import Numerics
from sae.training.optimisers import averaged, clear_rows, decays, make_optimiser
from sae.training.schedules import FinishRate, lr_factor
from sae.training.snapshots import FOLDER, Snapshots
from sae.training.step import update
from sae.training.telemetry import MetricsLog, sinks
from sae.training.trainer_config import TrainerConfig
from saescope.config import to_dict
from saescope.errors import InputError, check_range
from saescope.leftovers import settle
from saescope.metrics import texts
from saescope.progress import Progress, say

CHECKPOINT = Path(FOLDER) / "last"
METRICS = "metrics.jsonl"


class BatchSource(Protocol):
    """An endless stream of activations, [batch, d_in] or a RawBatch, with a JSON-able state."""

    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Trainer:
    """Trains one SAE, with checkpoints in a run's folder.

    A Trainer made again for the same folder goes on from the last checkpoint.

    Args:
        folder: of the run; None: nothing is written.
        held_out: gives a fresh iterator of batches that are never trained on.
        calibration: the same, for setting inference thresholds; held_out if not given.
        with_loss: replaces the reconstruction loss of a batch (end-to-end training).
        finish: how many of the steps, at the end, have a learning rate of their own. What is before
            them has the rise and the fall of a run of its own.
        initialise: whether to set from the first batch what the architecture initialises from
            data; False for an SAE whose training continues.
        tag: identifies the run's configuration; a checkpoint with another tag is refused.
        seed: of the run's own randomness (masks, resampling).
        saved: called when a checkpoint is in the folder.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        batches: BatchSource,
        config: TrainerConfig,
        *,
        total_steps: int,
        held_out: HeldOutRows,
        folder: Path | None,
        calibration: HeldOutRows | None = None,
        with_loss: Callable[[RawBatch, TrainingBatch], TrainingBatch] | None = None,
        finish: FinishRate | None = None,
        initialise: bool = True,
        tag: str = "",
        seed: int = 0,
        saved: Callable[[], None] | None = None,
    ) -> None:
        check_trainable("Trainer")
        check_range("training steps", total_steps, low=1)
        process_group.check_batch(config.batch_size, config.accumulate)
        if initialise:
            check_first_rows(sae, config.batch_size, config.accumulate)
        self.sae, self.batches, self.config = sae, batches, config
        self.total_steps, self.held_out = total_steps, held_out
        self.calibration = calibration or held_out
        self.with_loss, self.initialise = with_loss, initialise
        self.finish = finish or FinishRate()
        self.folder, self.tag, self.saved = folder, tag, saved
        self.lr = config.peak_lr(sae.config, total_steps)
        self.optimiser = _optimiser(sae, config, self.lr)
        self.numerics = Numerics(
            config.kernels,
            deterministic=config.deterministic,
            like=sae.b_dec,
            shape=Shape(-(-config.batch_size // config.accumulate), sae.d_in, sae.d_sae),
        )
        self.maker = BatchMaker(sae, config.loss)
        self.controller = controller_for(sae, config, total_steps)
        self.generator = torch.Generator().manual_seed(seed)
        self.step = 0
        self.last_held_out: dict[str, Any] = {}
        self.tokens = 0
        """tokens trained on"""
        self.dead_after = config.dead_after(total_steps * config.batch_size)
        self.tokens_since_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.b_dec.device)
        self.snapshots = Snapshots(config, folder, total_steps)
        self.log = self._open_folder()

    def _open_folder(self) -> MetricsLog | None:
        """Go on from the folder's checkpoint if it has one; the log, in the process that writes."""
        config, folder, logged = self.config, self.folder, None
        if folder is None and config.telemetry != "none":
            raise InputError("needs a folder", where="trainer.telemetry", given=config.telemetry)
        if folder is not None:
            settle(folder / CHECKPOINT)
            if (folder / CHECKPOINT).exists():
                logged = self._restore(folder).get("metrics")
        process_group.check_alike("their step or kernels", (self.step, self.numerics.kernels))
        if folder is None or not process_group.first():
            return None
        extra = sinks(
            config.telemetry,
            folder,
            folder.name,
            to_dict(config),
            tag=self.tag,
            resume_step=self.step,
        )
        return MetricsLog(folder / METRICS, resume_step=self.step, sinks=extra, sealed=logged)

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
        """One step, with the evaluation and the checkpoint that are due; a line on the progress."""
        config, note, before = self.config, "", self.tokens
        terms = self.train_step(raw)
        if self.finished:
            self._settle()
        if self.snapshots.due(self.step, before, self.tokens):
            self._keep()
        if self.step % config.evaluate_every == 0 or self.finished:
            note = self._evaluate(terms)
        if self.finished and self.target_reached is False:
            self._say_why_not()
        if self.step % config.checkpoint_every == 0 or self.finished:
            self._save()
        if self.finished and self.log is not None:
            self.log.close()
        return note

    @torch.enable_grad()
    def train_step(self, raw: RawBatch | Tensor) -> dict[str, Any]:
        """One optimiser step on rows [batch, d_in]; the named terms of the loss.

        "dead" is None as long as it is not known: before `dead_after_tokens` tokens. Raises
        InputError, with nothing changed, if a row is not finite.
        """
        raw = (RawBatch(raw) if isinstance(raw, Tensor) else raw).to(self.sae.b_dec.device)
        check_finite(raw, f"step {self.step}")
        with self.numerics.running():
            return self._step(raw)

    def _step(self, raw: RawBatch) -> dict[str, Any]:
        sae, config = self.sae.train(), self.config
        state = TrainingState(
            step=self.step,
            total_steps=self.total_steps,
            dead=self.tokens_since_fired >= self.dead_after,
            penalty=self.controller.penalty if self.controller else 1.0,
            generator=self.generator,
        )
        gradient_buffers.give(each.grad for each in sae.parameters() if each.grad is not None)
        self.optimiser.zero_grad(set_to_none=True)
        terms, counts, rows = self._backward(raw, state)
        gradient_sums.add_up_gradients(sae, counts)
        # here every gradient is that of the whole batch
        lr = self._learning_rate()
        norm = update(
            sae,
            self.optimiser,
            lr=lr,
            clip=config.grad_clip,
            what=f"step {self.step} (loss {terms['loss']:.4g})",
        )
        known, tokens = self.tokens >= self.dead_after, raw.tokens
        self.tokens += tokens
        self.tokens_since_fired += tokens
        self.tokens_since_fired[counts > 0] = 0
        self._resample(raw, state)
        l0 = float(FEATURES.sum(counts.sum())) / rows
        if self.controller:
            # where decoder norms are free a penalty can bring them to nothing
            self.controller.update(l0, self.step, None if sae.unit_decoder else terms)
        self.step += 1
        return {
            **terms,
            "l0": l0,
            "dead": FEATURES.total(int(state.dead.sum())) if known else None,
            "grad_norm": norm,
            "lr": lr,
            **({"penalty": state.penalty} if self.controller else {}),
        }

    def _learning_rate(self) -> float:
        """The learning rate of this step."""
        config, (last, lr) = self.config, self.finish
        steps, falls = self.total_steps - last, decays(config.optimiser)
        if self.step >= steps:
            return lr * lr_factor(self.step - steps, last, warmup=0, decay=last if falls else 0)
        return self.lr * lr_factor(
            self.step,
            steps,
            warmup=round(config.warmup_fraction * steps),
            decay=round(config.decay_fraction * steps) if falls else 0,
        )

    def _backward(
        self, raw: RawBatch, state: TrainingState
    ) -> tuple[dict[str, float], Tensor, int]:
        """Gradients of the mean loss over micro-batches; the loss and its terms, counts, rows."""
        low = self.config.precision == "bfloat16"
        size = -(-len(raw) // self.config.accumulate)
        sums: dict[str, float] = {}
        counts = torch.zeros(self.sae.d_sae, dtype=torch.int64, device=raw.x.device)
        for start in range(0, len(raw), size):
            micro = raw if size >= len(raw) else raw.select(slice(start, start + size))
            batch = self.maker.make(micro, self.generator)
            if self.with_loss is not None:
                batch = self.with_loss(micro, batch)
            if self.step == 0 and start == 0 and self.initialise:
                self.sae.start(batch)
            batch = batch.share()
            with torch.autocast(micro.x.device.type, torch.bfloat16, enabled=low):
                output = batch.finish(self.sae.training_output(batch, state))
            share = len(micro) / len(raw)
            (output.loss * share if share < 1 else output.loss).backward()
            counts += output.counts
            for name, value in {"loss": output.loss.detach(), **output.terms}.items():
                sums[name] = sums.get(name, 0.0) + value.item() * share
        return sums, ROWS.sum(counts), len(raw)

    def _resample(self, raw: RawBatch, state: TrainingState) -> None:
        if not self.sae.resamples(state):
            return
        features = self.sae.resample(self.maker.make(raw, self.generator), state)
        if features is not None and len(features):
            clear_rows(self.optimiser, self.sae, features)
            self.tokens_since_fired[features] = 0

    def _settle(self) -> None:
        """After the last step: use the optimiser's averaged weights, if any; set thresholds."""
        with self.numerics.running(), averaged(self.optimiser, self.sae.after_step):
            released = {name: value.clone() for name, value in self.sae.state_dict().items()}
        self.sae.load_state_dict(released)
        with self.numerics.running():
            self.sae.eval().calibrate(normalised_rows(self.maker, self.calibration))
        self.snapshots.say_missed(self.tokens)

    def _averaged(self) -> AbstractContextManager[None]:
        """A context in which the SAE has the weights to release; since `_settle` it has them."""
        return nullcontext() if self.finished else averaged(self.optimiser, self.sae.after_step)

    def _evaluate(self, terms: dict[str, Any]) -> str:
        with self.numerics.running(), self._averaged():
            held_out = measure(self.sae.eval(), self.held_out)
        self.last_held_out = held_out
        values = {
            "tokens": self.tokens,
            "kernels": self.numerics.kernels,
            "train": terms,
        }
        if self.log is not None:
            self.log.append(self.step, **values, held_out=held_out)
        dead = "not yet known" if terms["dead"] is None else f"{terms['dead']:,}"
        return f"held-out {texts(('fvu', 'l0'), held_out)}, dead {dead}"

    def _keep(self) -> None:
        """Write a snapshot: a copy of the SAE with its thresholds set; the SAE is as before."""
        with self.numerics.running(), self._averaged():
            sae = self.sae.clone().eval()
            sae.calibrate(normalised_rows(self.maker, self.calibration))
        self.snapshots.save(sae.cpu().fold(), step=self.step, tokens=self.tokens)

    def release(self) -> SparseAutoencoder:
        """The trained SAE, folded, on the CPU; its metadata gains what was measured."""
        sae = self.sae.eval().cpu().fold()
        sae.metadata["held_out"] = self.last_held_out
        if self.target_reached is not None:
            asked, met = self.config.target_l0, self.target_reached
            sae.metadata["target_l0"] = {"asked": asked, "reached": met}
        sae.metadata["numerics"] = self.numerics.state_dict()
        return sae

    @property
    def target_reached(self) -> bool | None:
        """Whether the L0 measured last is the target's; None without a target, or a measurement."""
        target, found = self.config.target_l0, self.last_held_out
        return None if target is None or not found else reached(found["l0"], target)

    def _say_why_not(self) -> None:
        why = "so few of the pre-activations are positive"
        if self.controller is not None:
            why = (
                f"in {self.total_steps:,} steps at a learning rate of {self.lr:.2g} the penalty "
                f"(its factor ended at {self.controller.penalty:.3g}) brings it no nearer: train "
                "longer, raise lr, or choose another target"
            )
        say(
            f"trainer.target_l0 {self.config.target_l0:g} is not reached: "
            f"{texts(('l0',), self.last_held_out)} on held-out rows; {why}"
        )

    def _save(self) -> None:
        if self.folder is None:
            return
        sharded_checkpoint.save(
            self.folder / CHECKPOINT,
            self.sae,
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
                "tokens": self.tokens,
                "tag": self.tag,
                "batches": self.batches.state_dict(),
                "controller": self.controller.state_dict() if self.controller else None,
                "last_held_out": self.last_held_out,
                "numerics": self.numerics.state_dict(),
                "metrics": self.log.seal() if self.log else None,
            },
        )
        if self.saved is not None:
            self.saved()

    def _restore(self, folder: Path) -> dict[str, Any]:
        tensors, state = sharded_checkpoint.load(folder / CHECKPOINT, self.sae)
        if state["tag"] != self.tag:
            raise InputError(
                "holds a run with another configuration; choose another folder",
                where=str(folder),
            )
        if "numerics" in state:  # older checkpoints do not say
            self.numerics.load_state_dict(state["numerics"], where=str(folder))
        self.sae.load_state_dict(tensors["sae"])
        checkpoint.restore_optimiser(self.optimiser, tensors["optimiser"])
        self.tokens_since_fired = tensors["run"]["tokens_since_fired"].to(self.sae.b_dec.device)
        self.generator.set_state(tensors["run"]["rng"])
        if self.controller:
            self.controller.load_state_dict(state["controller"])
        self.batches.load_state_dict(state["batches"])
        self.step, self.last_held_out = state["step"], state["last_held_out"]
        # older checkpoints do not say, and took rows for tokens
        self.tokens = state.get("tokens", self.step * self.config.batch_size)
        return state


def _optimiser(sae: SparseAutoencoder, config: TrainerConfig, lr: float) -> torch.optim.Optimizer:
    return make_optimiser(
        config.optimiser,
        sae.parameters(),
        lr=lr,
        beta1=config.beta1,
        beta2=config.beta2,
        eps=config.eps,
        unit_rows=sae.unit_rows,
    )
