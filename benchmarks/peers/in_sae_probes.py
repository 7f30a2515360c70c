"""sae-probes' own benchmark of an SAE on some of its sets; runs in that library's environment.

    python in_sae_probes.py SETTINGS.json

The SAE is in SAELens' format, the model a local Hugging Face folder. Everything is the library's:
tokens, activations, the division of texts, the choice of features, the probe. Besides its metrics,
the results have which texts it trained and tested on, since repeated texts stand on both sides.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import torch
from sae_lens import SAE
from sae_probes import run_sae_evals
from sae_probes.generate_model_activations import ensure_dataset_activations
from sae_probes.utils_data import get_dataset_sizes, get_train_test_indices, get_yvals
from transformer_lens import HookedTransformer, loading_from_pretrained

SEED = 42
MOST = 5000
"""texts of a set that the library reads"""


def main(settings: dict) -> None:
    """The library's metrics of each set in the file asked for."""
    torch.set_num_threads(settings["threads"])
    folder, sets, site = Path(settings["folder"]), settings["sets"], settings["site"]
    # a folder is read as a model of the hub is, but must be known by its name
    loading_from_pretrained.OFFICIAL_MODEL_NAMES.append(settings["model"])
    model = HookedTransformer.from_pretrained_no_processing(
        settings["model"], device="cpu", dtype=torch.float32
    )
    began = time.perf_counter()
    ensure_dataset_activations(
        model_name="model",
        dataset_short_names=sets,
        hook_names=[site],
        model_cache_path=folder / "activations",
        device="cpu",
        model=model,
    )
    activations = time.perf_counter() - began
    began = time.perf_counter()
    run_sae_evals(
        sae=SAE.load_from_disk(settings["sae"], device="cpu"),
        model_name="model",
        hook_name=site,
        reg_type="l2",
        setting="normal",
        ks=settings["ks"],
        datasets=sets,
        results_path=folder / "results",
        model_cache_path=folder / "activations",
        device="cpu",
        seed=SEED,
    )
    found = {
        "version": importlib.metadata.version("sae-probes"),
        "sae_lens": importlib.metadata.version("sae-lens"),
        "activation_seconds": activations,
        "probe_seconds": time.perf_counter() - began,
        "first_token": model.tokenizer("a")["input_ids"][0],
        "bos": model.tokenizer.bos_token_id,
        "sets": {name: of_set(name, site, folder) for name in sets},
    }
    Path(settings["results"]).write_text(json.dumps(found), encoding="utf-8")


def of_set(name: str, site: str, folder: Path) -> dict:
    """The metrics of a set by k, and its division as the library makes it."""
    labels = get_yvals(name)[:MOST]
    size = get_dataset_sizes()[name]
    train = min(size - 100, 1024)
    parts = get_train_test_indices(labels, train, len(labels) - train - 1, 0.5, SEED)
    path = folder / "results" / "sae_probes_model" / "normal_setting" / f"{name}_{site}_l2.json"
    return {
        "train": parts[0].tolist(),
        "test": parts[1].tolist(),
        "labels": labels.tolist(),
        "by_k": json.loads(path.read_text(encoding="utf-8")),
    }


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
