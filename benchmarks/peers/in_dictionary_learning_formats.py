"""Exchange SAEs with dictionary_learning; runs in that library's own environment.

    python in_dictionary_learning_formats.py SETTINGS.json

Loads the folders it is given and notes the features that the library computes with them; sets one
dictionary of each of its classes up with random weights, saves it as its `trainSAE` does, and notes
its features too.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import torch
from dictionary_learning.dictionary import (
    AutoEncoder,
    AutoEncoderNew,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
)
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK

K = 6
CLASSES = {
    each.__name__: each
    for each in (
        AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder, AutoEncoderTopK,
        BatchTopKSAE, MatryoshkaBatchTopKSAE,
    )
}  # fmt: skip


def note(dictionary: torch.nn.Module, x: torch.Tensor, path: Path) -> None:
    """Features and reconstructions on the check rows, from the library's own methods."""
    with torch.no_grad():
        features, reconstruction = dictionary.encode(x), dictionary(x)
    np.savez(path, features=features.numpy(), reconstruction=reconstruction.numpy())


def read(folder: Path) -> torch.nn.Module:
    """A dictionary by the library's own loader of its class."""
    trainer = json.loads((folder / "config.json").read_text(encoding="utf-8"))["trainer"]
    cls, weights = CLASSES[trainer["dict_class"]], str(folder / "ae.pt")
    if cls is AutoEncoder:  # else it scales the decoder's rows to norm 1, and the features
        return cls.from_pretrained(weights, normalize_decoder=False)
    return cls.from_pretrained(weights, k=trainer["k"]) if "k" in trainer else (
        cls.from_pretrained(weights)
    )  # fmt: skip


def build(name: str, settings: dict, folder: Path) -> torch.nn.Module:
    """A dictionary of random weights, saved and loaded again."""
    sizes = (settings["d_in"], settings["d_sae"])
    trainer = {"dict_class": name, "activation_dim": sizes[0], "dict_size": sizes[1]}
    if name in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        trainer["k"] = K
    groups = {"group_sizes": [16, 48]} if name.startswith("Matryoshka") else {}
    more = {"k": K} if "k" in trainer else {}
    dictionary = CLASSES[name](*sizes, **more, **groups)
    with torch.no_grad():
        for value in dictionary.parameters():
            value.add_(0.2 * torch.randn_like(value))
        if hasattr(dictionary, "threshold"):
            dictionary.threshold.copy_(0.3 + 0.1 * torch.rand_like(dictionary.threshold))
    folder.mkdir()
    torch.save({n: v.cpu() for n, v in dictionary.state_dict().items()}, folder / "ae.pt")
    text = json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}, indent=4)
    (folder / "config.json").write_text(text, encoding="utf-8")
    return read(folder)


def main(settings: dict) -> None:
    """Everything, into the folder given; a note of what was made beside it."""
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(settings["seed"])
    out = Path(settings["out"])
    x = torch.from_numpy(np.load(settings["check"]))
    for folder in settings["exports"]:
        note(read(Path(folder)), x, Path(f"{folder}.npz"))
    made = []
    for number, name in enumerate(CLASSES):
        folder = out / f"own-{number}"
        note(build(name, settings, folder), x, Path(f"{folder}.npz"))
        made.append({"name": name, "folder": str(folder)})
    facts = {
        "version": importlib.metadata.version("dictionary-learning"),
        "torch": torch.__version__,
        "made": made,
    }
    (out / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
