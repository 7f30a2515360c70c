"""Exchange SAEs with SAELens; runs in that library's own environment.

    python in_saelens_formats.py SETTINGS.json

Loads the folders it is given and notes the features that the library computes with them; trains an
SAE of every architecture that the library trains, sets one up of every architecture that it only
infers with, saves each as the library does, and notes its features too.
"""

import importlib.metadata
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import sae_lens
import torch
from sae_lens import SAE
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

BATCH = 256
TRAINED = {
    # name: (training class, further fields of its configuration)
    "standard": ("StandardTrainingSAE", {"l1_coefficient": 0.05}),
    "standard, b_dec not subtracted": (
        "StandardTrainingSAE",
        {"l1_coefficient": 0.05, "apply_b_dec_to_input": False},
    ),
    "standard, scaled": (
        "StandardTrainingSAE",
        {"l1_coefficient": 0.05, "normalize_activations": "expected_average_only_in"},
    ),
    "standard, whitened": (
        "StandardTrainingSAE",
        {"l1_coefficient": 0.05, "normalize_activations": "covariance_whitening"},
    ),
    "standard, layer_norm": (
        "StandardTrainingSAE",
        {"l1_coefficient": 0.05, "normalize_activations": "layer_norm"},
    ),
    "gated": ("GatedTrainingSAE", {"l1_coefficient": 0.05}),
    "gated, b_dec not subtracted": (
        "GatedTrainingSAE",
        {"l1_coefficient": 0.05, "apply_b_dec_to_input": False},
    ),
    "topk": ("TopKTrainingSAE", {"k": 6}),
    "topk, layer_norm": ("TopKTrainingSAE", {"k": 6, "normalize_activations": "layer_norm"}),
    "topk, scaled": (
        "TopKTrainingSAE",
        {"k": 6, "normalize_activations": "expected_average_only_in"},
    ),
    "abstopk": ("AbsTopKTrainingSAE", {"k": 6}),
    "batchtopk": ("BatchTopKTrainingSAE", {"k": 6.5}),
    "batchtopk, scaled": (
        "BatchTopKTrainingSAE",
        {"k": 6.5, "normalize_activations": "expected_average_only_in"},
    ),
    "matryoshka_batchtopk": (
        "MatryoshkaBatchTopKTrainingSAE",
        {"k": 6.0, "matryoshka_widths": [16, 32, 64]},
    ),
    "jumprelu": ("JumpReLUTrainingSAE", {"l0_coefficient": 0.02}),
    "jumprelu, b_dec not subtracted": (
        "JumpReLUTrainingSAE",
        {"l0_coefficient": 0.02, "apply_b_dec_to_input": False},
    ),
    "matching_pursuit": (
        "MatchingPursuitTrainingSAE",
        {"residual_threshold": 0.5, "max_iterations": 8, "decoder_init_norm": 1.0},
    ),
}
INFERRED = {
    "transcoder": ("Transcoder", {}),
    "skip_transcoder": ("SkipTranscoder", {}),
    "jumprelu_transcoder": ("JumpReLUTranscoder", {}),
    "jumprelu_skip_transcoder": ("JumpReLUSkipTranscoder", {}),
    "topk, rescaled by decoder norm": ("TopKSAE", {"k": 6, "rescale_acts_by_decoder_norm": True}),
}
REFUSED = {"temporal": ("TemporalSAE", {"n_heads": 2, "bottleneck_factor": 4, "kval_topk": 6})}


def note(sae: SAE, x: torch.Tensor, path: Path) -> None:
    """Features and reconstructions on the check rows, from the library's own methods."""
    with torch.no_grad():
        features = sae.encode(x)
        np.savez(path, features=features.numpy(), reconstruction=sae(x).numpy())


def train(name: str, settings: dict, rows: torch.Tensor, out: Path) -> SAE:
    """Train an SAE for some steps, save it as the library does, and load it again."""
    kind, fields = TRAINED[name]
    config = getattr(sae_lens, f"{kind}Config")(
        d_in=settings["d_in"], d_sae=settings["d_sae"], **fields
    )
    sae = getattr(sae_lens, kind)(config)
    steps = settings["steps"]
    order = torch.randint(0, len(rows), (1000, BATCH))
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=steps * BATCH,
            train_batch_size_samples=BATCH,
            lr=3e-3,
            lr_end=3e-3,
            n_batches_for_norm_estimate=20,
        ),
        sae,
        (rows[index] for index in order),
    )
    trainer.fit()
    sae.save_inference_model(out)
    if name in settings["checkpoints"]:
        sae.save_model(out.parent / f"{out.name}-checkpoint")
    return SAE.load_from_disk(out)


def build(name: str, settings: dict, out: Path) -> SAE:
    """An SAE of random weights, saved and loaded again."""
    kind, fields = {**INFERRED, **REFUSED}[name]
    if "transcoder" in name:
        fields = {**fields, "d_out": settings["d_out"], "apply_b_dec_to_input": False}
    config = getattr(sae_lens, f"{kind}Config")(
        d_in=settings["d_in"], d_sae=settings["d_sae"], **fields
    )
    sae = getattr(sae_lens, kind)(config)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        if hasattr(sae, "threshold"):
            sae.threshold.abs_()
    sae.save_model(out)
    return SAE.load_from_disk(out)


def main(settings: dict) -> None:
    """Everything, into the folder given; a note of what was made beside it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(settings["seed"])
    out = Path(settings["out"])
    x = torch.from_numpy(np.load(settings["check"]))
    for folder in settings["exports"]:
        note(SAE.load_from_disk(folder), x, Path(f"{folder}.npz"))
    rows = torch.from_numpy(np.load(settings["rows"]))
    made = []
    for number, name in enumerate((*TRAINED, *INFERRED, *REFUSED)):
        folder = out / f"own-{number}"
        if name in TRAINED:
            sae = train(name, settings, rows, folder)
        else:
            sae = build(name, settings, folder)
        if name not in REFUSED:
            note(sae, x, Path(f"{folder}.npz"))
        made.append({"name": name, "folder": str(folder), "refused": name in REFUSED})
        checkpoint = folder.parent / f"{folder.name}-checkpoint"
        if checkpoint.exists():
            made.append(
                {"name": f"{name}, checkpoint", "folder": str(checkpoint), "as": str(folder),
                 "refused": False}
            )  # fmt: skip
    facts = {
        "version": importlib.metadata.version("sae-lens"),
        "torch": torch.__version__,
        "made": made,
    }
    (out / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
