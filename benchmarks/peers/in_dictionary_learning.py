"""Train dictionary_learning's TopK on a stored stream; runs in that library's own environment.

    python in_dictionary_learning.py SETTINGS.json

Its `trainSAE` with its `TopKTrainer`, activations normalised as it recommends, its saved weights.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE


def rows(bits: np.ndarray) -> torch.Tensor:
    """Float32 activations of stored bfloat16 bits."""
    return torch.from_numpy(np.array(bits).view(np.int16)).view(torch.bfloat16).float()


class Stream:
    """Batches from the start each time they are asked for: once for the scale, once to train."""

    def __init__(self, stored: np.ndarray) -> None:
        self.stored = stored

    def __iter__(self):
        return (rows(bits) for bits in self.stored)


class ScaledTopKTrainer(TopKTrainer):
    """Its trainer; the tokens until a feature counts as dead, fixed there, fit the run's length."""

    dead_after_tokens = 10_000_000
    made: "TopKTrainer"

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.dead_feature_threshold = self.dead_after_tokens
        ScaledTopKTrainer.made = self


def main(settings: dict) -> None:
    """Train, export weights and what the library's own inference gives on the check rows."""
    torch.set_num_threads(settings["threads"])
    stream = np.load(settings["stream"], mmap_mode="r")[: settings["steps"]]
    steps, _, d_in = stream.shape
    ScaledTopKTrainer.dead_after_tokens = settings["dead_after_tokens"]
    out = Path(settings["out"])
    trainer = {
        "trainer": ScaledTopKTrainer,
        "steps": steps,
        "activation_dim": d_in,
        "dict_size": settings["d_sae"],
        "k": settings["k"],
        "layer": 0,
        "lm_name": "stored activations",
        "lr": settings["lr"],
        "warmup_steps": settings["warmup_steps"],
        "decay_start": steps - settings["decay_steps"],
        "seed": settings["seed"],
        "device": "cpu",
    }
    started = time.perf_counter()
    trainSAE(
        Stream(stream),
        [trainer],
        steps=steps,
        save_dir=str(out / "dictionary_learning"),
        normalize_activations=True,
        device="cpu",
    )
    seconds = time.perf_counter() - started

    saved = out / "dictionary_learning" / "trainer_0" / "ae.pt"
    inference = AutoEncoderTopK.from_pretrained(saved)
    check = rows(np.load(settings["held_out"], mmap_mode="r")[: settings["check_rows"]])
    with torch.no_grad():
        features = inference.encode(check)
        reconstruction = inference.decode(features)
    weights = {name: value.numpy() for name, value in inference.state_dict().items()}
    np.savez(
        out / "weights.npz",
        W_enc=weights["encoder.weight"].T,
        b_enc=weights["encoder.bias"],
        W_dec=weights["decoder.weight"].T,
        b_dec=weights["b_dec"],
        check_features=features.numpy(),
        check_reconstruction=reconstruction.numpy(),
    )
    facts = {
        "version": importlib.metadata.version("dictionary-learning"),
        "torch": torch.__version__,
        "lr": ScaledTopKTrainer.made.lr,
        "normaliser": "normalize_activations",
        "warmup_steps": settings["warmup_steps"],
        "decay_steps": settings["decay_steps"],
        "seconds": seconds,
    }
    (out / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
