"""Train SAELens' TopK on a stored stream; runs in that library's own environment.

    python in_saelens.py SETTINGS.json

Its training SAE, its trainer, its activation scaler and its own export to inference weights.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sae_lens import SAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

OWN_LR = 3e-4  # the default of its runner's and its trainer's configuration


def rows(bits: np.ndarray) -> torch.Tensor:
    """Float32 activations of stored bfloat16 bits."""
    return torch.from_numpy(np.array(bits).view(np.int16)).view(torch.bfloat16).float()


def main(settings: dict) -> None:
    """Train, export weights and what the library's own inference gives on the check rows."""
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(settings["seed"])
    stream = np.load(settings["stream"], mmap_mode="r")[: settings["steps"]]
    steps, batch, d_in = stream.shape
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=d_in,
            d_sae=settings["d_sae"],
            k=settings["k"],
            normalize_activations="expected_average_only_in",
        )
    )
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
    sae.save_inference_model(out / "saelens")
    inference = SAE.load_from_disk(str(out / "saelens"))
    check = rows(np.load(settings["held_out"], mmap_mode="r")[: settings["check_rows"]])
    with torch.no_grad():
        features = inference.encode(check)
        reconstruction = inference.decode(features)
    weights = {name: value.detach().numpy() for name, value in inference.state_dict().items()}
    np.savez(
        out / "weights.npz",
        W_enc=weights["W_enc"],
        b_enc=weights["b_enc"],
        W_dec=weights["W_dec"],
        b_dec=weights["b_dec"],
        check_features=features.numpy(),
        check_reconstruction=reconstruction.numpy(),
    )
    facts = {
        "version": importlib.metadata.version("sae-lens"),
        "torch": torch.__version__,
        "lr": lr,
        "normaliser": "expected_average_only_in",
        "warmup_steps": settings["warmup_steps"],
        "decay_steps": settings["decay_steps"],
        "seconds": seconds,
    }
    (out / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
