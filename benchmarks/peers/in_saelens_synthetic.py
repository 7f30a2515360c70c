"""Train an SAE with SAELens on rows from standard input, and score it with SAELens' own function.

    python in_saelens_synthetic.py SETTINGS.json < ROWS

Runs in that library's own environment. ROWS are float32, one batch after another. The settings are
those that SynthSAEBench published for each architecture (for gated, of which it has none, those of
the L1 SAE). Its learning rate is 3e-4, held constant; another, with warm-up and decay, may be
given. Where sparsity is a penalty, its coefficient is moved towards the L0 asked for, as there;
that library has no such controller, so it is here. The rows to score on come with their true codes,
in a file.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
import sae_lens
import torch
from sae_lens import SAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.synthetic import eval_sae_on_synthetic_data
from sae_lens.training.sae_trainer import SAETrainer

LR = 3e-4
CLASSES = {
    "topk": "TopKTrainingSAE",
    "batchtopk": "BatchTopKTrainingSAE",
    "matryoshka": "MatryoshkaBatchTopKTrainingSAE",
    "matching_pursuit": "MatchingPursuitTrainingSAE",
    "jumprelu": "JumpReLUTrainingSAE",
    "relu": "StandardTrainingSAE",
    "gated": "GatedTrainingSAE",
}
GAIN = 12.0
"""of the integral of log(L0 / target) over a run; the published 60 of 200,000 steps makes so short
runs overshoot"""
LIMIT = math.log(100)
"""of the factor's logarithm, either way, as published"""
SMOOTHING = 0.1
"""of the L0 that the coefficient is moved by"""
ESTIMATED = 100
"""batches whose mean norm the rows are scaled by, where they are"""


class Scored:
    """Rows and their true codes, as `eval_sae_on_synthetic_data` asks for both."""

    def __init__(self, path: str) -> None:
        with np.load(path) as file:
            self.x, self.directions, self.row_ptr, self.index, self.value = (
                torch.from_numpy(file[name])
                for name in ("x", "directions", "row_ptr", "index", "value")
            )
        self.feature_vectors = self.directions
        self.next = 0

    def sample(self, count: int) -> torch.Tensor:
        """The true codes of the next rows, dense."""
        first, last = self.next, self.next + count
        self.next = last
        start, end = int(self.row_ptr[first]), int(self.row_ptr[last])
        row = torch.repeat_interleave(torch.arange(count), self.row_ptr[first : last + 1].diff())
        dense = torch.zeros(count, len(self.directions))
        dense[row, self.index[start:end]] = self.value[start:end]
        return dense

    def __call__(self, codes: torch.Tensor) -> torch.Tensor:
        """The rows of the codes drawn last."""
        return self.x[self.next - len(codes) : self.next]


def rows(batch: int, d_in: int):
    """Batches from standard input."""
    size = 4 * batch * d_in
    while len(data := sys.stdin.buffer.read(size)) == size:
        yield torch.frombuffer(bytearray(data), dtype=torch.float32).view(batch, d_in)


def recipe(settings: dict) -> dict:
    """The published settings of an architecture, at the widths' shares of d_sae."""
    kind, k, d_sae = settings["architecture"], settings["k"], settings["d_sae"]
    if kind == "matryoshka":
        widths = [max(1, d_sae // share) for share in (32, 8, 2, 1)]
        return {"k": float(k), "matryoshka_widths": widths}
    if kind == "matching_pursuit":
        return {
            "max_iterations": int(k), "residual_threshold": 0, "decoder_init_norm": 1.0,
            "stop_on_duplicate_support": False,
        }  # fmt: skip
    if kind == "jumprelu":
        return {
            "normalize_activations": "expected_average_only_in", "decoder_init_norm": 0.5,
            "jumprelu_sparsity_loss_mode": "step", "jumprelu_bandwidth": 1.0,
            "jumprelu_init_threshold": 1.0, "l0_coefficient": 1.0,
        }  # fmt: skip
    if kind in ("relu", "gated"):
        return {"l1_coefficient": 2.0, "l1_warm_up_steps": settings["steps"] // 3}
    return {"k": int(k) if kind == "topk" else float(k)}


def aim(sae, target: float, steps: int, first: int) -> None:
    """Have the penalty's coefficient brought to where the mean L0 is `target`, from a step on."""
    plain, state = sae.training_forward_pass, {"level": None, "integral": 0.0, "log": 0.0}

    def forward(step_input):
        factor = math.exp(state["log"])
        scaled = {name: factor * value for name, value in step_input.coefficients.items()}
        out = plain(dataclasses.replace(step_input, coefficients=scaled))
        l0 = float((out.feature_acts > 0).sum(-1).float().mean())
        before = l0 if state["level"] is None else state["level"]
        state["level"] = before + SMOOTHING * (l0 - before)
        if step_input.n_training_steps >= first:
            error = max(-1.0, min(1.0, math.log(max(state["level"], 1e-3) / target)))
            integral = state["integral"] + GAIN / steps * error
            state["integral"] = max(-LIMIT, min(LIMIT, integral))
            state["log"] = max(-LIMIT, min(LIMIT, state["integral"] + error))
        return out

    sae.training_forward_pass = forward


def train(settings: dict):
    """The trained SAE in its inference form, and rows a second."""
    batch, d_in, steps, kind = (
        settings[name] for name in ("batch", "d_in", "steps", "architecture")
    )
    name, lr, chosen = CLASSES[kind], settings["lr"] or LR, recipe(settings)
    sae = getattr(sae_lens, name)(
        getattr(sae_lens, f"{name}Config")(d_in=d_in, d_sae=settings["d_sae"], **chosen)
    )
    if kind in ("jumprelu", "relu", "gated"):
        aim(sae, settings["k"], steps, first=0 if kind == "jumprelu" else steps // 3)
    given: Iterator[torch.Tensor] = rows(batch, d_in)
    first = list(islice(given, ESTIMATED))
    trainer = SAETrainer(
        SAETrainerConfig(
            n_checkpoints=0,
            checkpoint_path=None,
            total_training_samples=steps * batch,
            train_batch_size_samples=batch,
            device="cpu",
            autocast=False,
            lr=lr,
            lr_end=lr,
            lr_scheduler_name="constant",
            lr_warm_up_steps=settings["warmup_steps"],
            adam_beta1=0.9,
            adam_beta2=0.999,
            lr_decay_steps=settings["decay_steps"],
            n_restart_cycles=1,
            dead_feature_window=1000,
            feature_sampling_window=2000,
            save_final_checkpoint=False,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae,
        chain(first, given),
    )
    if "normalize_activations" in chosen:  # its own fit() would use the rows up
        trainer.activation_scaler.estimate_scaling_factor(d_in, iter(first), len(first))
    begun = time.perf_counter()
    trainer.fit()
    speed = steps * batch / (time.perf_counter() - begun)
    sae.save_inference_model(settings["folder"])
    return SAE.load_from_disk(settings["folder"]), speed


def main(settings: dict) -> None:
    """Train, or load what is to be scored alone, and write the scores."""
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(settings["seed"])
    if settings["steps"]:
        sae, speed = train(settings)
    else:
        sae, speed = SAE.load_from_disk(settings["folder"]), None
    scored = Scored(settings["scored"])
    found = eval_sae_on_synthetic_data(
        sae, scored, scored, num_samples=len(scored.x), batch_size=2048
    )
    scores = dataclasses.asdict(found)
    scores |= scores.pop("classification")
    found = {"version": sae_lens.__version__, "rows_per_second": speed, **scores}
    Path(settings["results"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
