"""Train with dictionary_learning on a stored stream; runs in that library's own environment.

    python in_dictionary_learning.py SETTINGS.json

Its `trainSAE` with its trainers, activations normalised as it recommends, its saved weights.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from dictionary_learning.dictionary import JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import (
    MatryoshkaBatchTopKSAE,
    MatryoshkaBatchTopKTrainer,
)
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE

CLASSES = {
    "topk": (TopKTrainer, AutoEncoderTopK),
    "batchtopk": (BatchTopKTrainer, BatchTopKSAE),
    "matryoshka": (MatryoshkaBatchTopKTrainer, MatryoshkaBatchTopKSAE),
    "jumprelu": (JumpReluTrainer, JumpReluAutoEncoder),
}
GROUPS = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2 + 1 / 32]  # as the library's demonstration has them
ELSEWHERE = (
    "trainer_class", "dict_class", "lr", "steps", "warmup_steps", "decay_start", "seed",
    "activation_dim", "dict_size", "device", "layer", "lm_name", "wandb_name", "submodule_name",
    "group_sizes",
)  # fmt: skip
"""settings that the results have a column for, or that say nothing about the training"""


def rows(bits: np.ndarray) -> torch.Tensor:
    """Float32 activations of stored bfloat16 bits."""
    return torch.from_numpy(np.array(bits).view(np.int16)).view(torch.bfloat16).float()


class Stream:
    """Batches from the start each time they are asked for: once for the scale, once to train."""

    def __init__(self, stored: np.ndarray) -> None:
        self.stored = stored

    def __iter__(self):
        return (rows(bits) for bits in self.stored)


def fitted(trainer: type, dead_after_tokens: int, made: list) -> type:
    """A trainer's class whose tokens until a feature counts as dead, fixed there, fit the run."""

    class Fitted(trainer):
        def __init__(self, **options) -> None:
            super().__init__(**options)
            self.dead_feature_threshold = dead_after_tokens
            made.append(self)

    return Fitted


def recipe(settings: dict) -> dict:
    """Its defaults; those that count steps (of runs of 100,000s) as parts of this run.

    A thousand steps of warm-up are `warmup_steps`; so are the thousand before thresholds are
    averaged and, for its weight 0.999, those averaged over; two thousand those of sparsity.
    """
    kind, value, thousand = settings["architecture"], settings["value"], settings["warmup_steps"]
    options = {"target_l0": value} if kind == "jumprelu" else {"k": int(value)}
    if kind == "jumprelu":
        options["sparsity_warmup_steps"] = 2 * thousand
    if kind in ("batchtopk", "matryoshka"):
        options["threshold_start_step"] = thousand
        options["threshold_beta"] = 1 - 1 / max(thousand, 1)
    if kind == "matryoshka":
        options["group_fractions"] = GROUPS
    if settings["lr"]:
        options["lr"] = settings["lr"]
    return options


def main(settings: dict) -> None:
    """Train, save the weights, note what the library's own inference gives on the check rows."""
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(settings["seed"])  # its JumpReLU trainer takes a seed, and does not use it
    stream = np.load(settings["stream"], mmap_mode="r")[: settings["steps"]]
    steps, _, d_in = stream.shape
    trainer, dictionary = CLASSES[settings["architecture"]]
    out, made = Path(settings["out"]), []
    options = {
        "trainer": fitted(trainer, settings["dead_after_tokens"], made),
        "steps": steps,
        "activation_dim": d_in,
        "dict_size": settings["d_sae"],
        "layer": 0,
        "lm_name": "stored activations",
        "warmup_steps": settings["warmup_steps"],
        "decay_start": steps - settings["decay_steps"],
        "seed": settings["seed"],
        "device": "cpu",
        **recipe(settings),
    }
    started = time.perf_counter()
    trainSAE(
        Stream(stream),
        [options],
        steps=steps,
        save_dir=str(out / "sae"),
        normalize_activations=True,
        device="cpu",
    )
    seconds = time.perf_counter() - started

    inference = dictionary.from_pretrained(str(out / "sae" / "trainer_0" / "ae.pt"))
    check = rows(np.load(settings["held_out"], mmap_mode="r")[: settings["check_rows"]])
    with torch.no_grad():
        features = inference.encode(check)
        reconstruction = inference.decode(features)
    np.savez(out / "check.npz", features=features.numpy(), reconstruction=reconstruction.numpy())
    in_force = made[0].config
    facts = {
        "version": importlib.metadata.version("dictionary-learning"),
        "torch": torch.__version__,
        "folder": "sae/trainer_0",
        "lr": made[0].lr,
        "normaliser": "normalize_activations",
        "settings": {key: value for key, value in in_force.items() if key not in ELSEWHERE},
        "seconds": seconds,
    }
    (out / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
