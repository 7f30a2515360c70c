"""Train an SAE with SAELens on a stored stream; runs in that library's own environment.

    python in_saelens.py SETTINGS.json

Its training SAE, its trainer, its activation scaler and its own export to inference weights.
"""

import dataclasses
import importlib.metadata
import json
import sys
import time
from pathlib import Path

import numpy as np
import sae_lens
import torch
from sae_lens import SAE
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

OWN_LR = 3e-4  # the default of its runner's and its trainer's configuration
NORMALISER = "expected_average_only_in"
CLASSES = {
    "topk": "TopKTrainingSAE",
    "batchtopk": "BatchTopKTrainingSAE",
    "matryoshka": "MatryoshkaBatchTopKTrainingSAE",
    "jumprelu": "JumpReLUTrainingSAE",
}
ELSEWHERE = ("d_in", "d_sae", "dtype", "device", "metadata", "normalize_activations")
"""fields that the results have a column for, or that say nothing about the training"""


def rows(bits: np.ndarray) -> torch.Tensor:
    """Float32 activations of stored bfloat16 bits."""
    return torch.from_numpy(np.array(bits).view(np.int16)).view(torch.bfloat16).float()


def recipe(settings: dict) -> dict:
    """What its documentation (training_saes.md) recommends beside the configuration's defaults."""
    kind, value, d_sae = settings["architecture"], settings["value"], settings["d_sae"]
    if kind == "jumprelu":
        return {
            "l0_coefficient": value,
            "jumprelu_sparsity_loss_mode": "tanh",
            "jumprelu_tanh_scale": 4.0,
            "jumprelu_bandwidth": 2.0,
            "jumprelu_init_threshold": 0.1,
            "pre_act_loss_coefficient": 3e-6,
            "l0_warm_up_steps": settings["steps"],
        }
    if kind == "matryoshka":
        return {"k": float(value), "matryoshka_widths": [d_sae // 4, d_sae // 2, d_sae]}
    return {"k": int(value) if kind == "topk" else float(value)}


def main(settings: dict) -> None:
    """Train, save the inference weights, note what the library's own inference gives."""
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(settings["seed"])
    stream = np.load(settings["stream"], mmap_mode="r")[: settings["steps"]]
    steps, batch, d_in = stream.shape
    name = CLASSES[settings["architecture"]]
    config = getattr(sae_lens, f"{name}Config")(
        d_in=d_in, d_sae=settings["d_sae"], normalize_activations=NORMALISER, **recipe(settings)
    )
    sae = getattr(sae_lens, name)(config)
    lr = settings["lr"] or OWN_LR
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=steps * batch,
            train_batch_size_samples=batch,
            lr=lr,
            lr_end=lr,
            lr_warm_up_steps=settings["warmup_steps"],
            lr_decay_steps=settings["decay_steps"],
            dead_feature_window=settings["dead_after_tokens"] // batch,
            save_final_checkpoint=False,
        ),
        sae,
        (rows(bits) for bits in stream),
    )
    started = time.perf_counter()
    # Estimated beforehand, from as many batches as dictionary_learning takes: its own fit() would
    # use the rows up, and every library shall train on all of them.
    estimated = min(100, steps)
    trainer.activation_scaler.estimate_scaling_factor(
        d_in, (rows(bits) for bits in stream[:estimated]), estimated
    )
    trainer.fit()
    seconds = time.perf_counter() - started

    out = Path(settings["out"])
    sae.save_inference_model(out / "sae")
    inference = SAE.load_from_disk(str(out / "sae"))
    check = rows(np.load(settings["held_out"], mmap_mode="r")[: settings["check_rows"]])
    with torch.no_grad():
        features = inference.encode(check)
        reconstruction = inference.decode(features)
    np.savez(out / "check.npz", features=features.numpy(), reconstruction=reconstruction.numpy())
    in_force = dataclasses.asdict(config)
    facts = {
        "version": importlib.metadata.version("sae-lens"),
        "torch": torch.__version__,
        "folder": "sae",
        "lr": lr,
        "normaliser": NORMALISER,
        "settings": {key: value for key, value in in_force.items() if key not in ELSEWHERE},
        "seconds": seconds,
    }
    (out / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
