"""Train an SAE with SAELens on rows from standard input, and score it with SAELens' own function.

    python in_saelens_synthetic.py SETTINGS.json < ROWS

Runs in that library's own environment. ROWS are float32, one batch after another. The settings are
those of SynthSAEBench's protocol: learning rate 3e-4 held constant, no warm-up, no normaliser. The
rows to score on come with their true codes, in a file.
"""

import dataclasses
import json
import sys
import time
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
}


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
        return {"max_iterations": int(k)}
    return {"k": int(k) if kind == "topk" else float(k)}


def train(settings: dict):
    """The trained SAE in its inference form, and rows a second."""
    batch, d_in, steps = settings["batch"], settings["d_in"], settings["steps"]
    name = CLASSES[settings["architecture"]]
    config = getattr(sae_lens, f"{name}Config")(
        d_in=d_in, d_sae=settings["d_sae"], **recipe(settings)
    )
    trainer = SAETrainer(
        SAETrainerConfig(
            n_checkpoints=0,
            checkpoint_path=None,
            total_training_samples=steps * batch,
            train_batch_size_samples=batch,
            device="cpu",
            autocast=False,
            lr=LR,
            lr_end=LR,
            lr_scheduler_name="constant",
            lr_warm_up_steps=0,
            adam_beta1=0.9,
            adam_beta2=0.999,
            lr_decay_steps=0,
            n_restart_cycles=1,
            dead_feature_window=1000,
            feature_sampling_window=2000,
            save_final_checkpoint=False,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        getattr(sae_lens, name)(config),
        rows(batch, d_in),
    )
    begun = time.perf_counter()
    sae = trainer.fit()
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
