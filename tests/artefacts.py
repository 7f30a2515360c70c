"""One of everything that saescope writes, small; damage to it; and who finds what was damaged."""

import random
import shutil
from pathlib import Path

import torch

from activations import ActivationStore
from sae import EvaluateConfig, IndexConfig, TrainConfig, evaluate, index, train
from sae.analysis.lens import TunedLens
from saescope.config import from_dict
from store import Annotations, FeatureStore
from tests.tiny import D_MODEL, make_tiny_harvest, make_tiny_model

SITE = "blocks.1.hook_resid_post"


def train_config(harvest: Path, out: Path, steps: int = 12, **trainer: object) -> TrainConfig:
    rows = ActivationStore.open(str(harvest)).n_rows("train")
    values = {
        "harvest": str(harvest), "out": str(out), "passes": steps * 64 / rows + 1e-6,
        "evaluation_rows": 128, "calibration_rows": 128,
        "sae": {"kind": "topk", "d_sae": 48, "k": 4},
        "trainer": {"batch_size": 64, "evaluate_every": 4, "checkpoint_every": 4, **trainer},
    }  # fmt: skip
    return from_dict(TrainConfig.specialise({}), values, "tests")


def make_everything(root: Path) -> Path:
    """root/harvest, runs/a (evaluated), lens, stores/a (with labels); the root."""
    harvest = make_tiny_harvest(root, make_tiny_model(root / "model"), documents=30)
    train(train_config(harvest, root / "runs" / "a"))
    evaluate(EvaluateConfig(run=str(root / "runs" / "a"), tokens=0))
    path = index(IndexConfig(run=str(root / "runs" / "a"), out=str(root / "stores" / "a")))
    with (
        FeatureStore.open(path) as store,
        Annotations.open(path, sae_hash=str(store.meta["sae_hash"])) as notes,
    ):
        for feature in range(40):
            notes.set_label(feature, f"label {feature} of many words about rivers and mills")
            notes.set_note(feature, f"seen {feature} times, above all in the morning")
            notes.add_to_list(feature, f"list {feature % 3}")
    lens = TunedLens.identity([SITE], D_MODEL)
    lens.A += 0.01 * torch.randn(1, D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(0))
    lens.save(root / "lens")
    return root


def flip(path: Path, chance: random.Random) -> int:
    """Flip one bit of a file; where."""
    data = bytearray(path.read_bytes())
    bit = chance.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return bit


def copied(root: Path, to: Path, *names: str) -> Path:
    """Some of the artefacts, somewhere else."""
    for name in names:
        shutil.copytree(root / name, to / name)
    return to
