"""Train with a library in its own environment; check that we read what it saved as it does."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.data import Data
from benchmarks.peers.environments import Peer, python_of
from sae.core.base import SparseAutoencoder
from saescope.artefact import write_json
from saescope.errors import ArtefactError

CHECK_ROWS = 256
TOLERANCE = 1e-5
TIES = 3e-4
"""part of the active features that rounding may decide otherwise, at a threshold or a tie"""


def train(peer: Peer, data: Data, settings: Mapping[str, Any], folder: Path, work: Path) -> None:
    """Train on all of the data: the library's folder, check.npz and facts.json in a folder.

    Raises ArtefactError with the log's last line if training fails.
    """
    path = folder / "settings.json"
    write_json(
        path,
        {
            **settings,
            "stream": str((data.folder / "stream.npy").resolve()),
            "held_out": str((data.folder / "held_out.npy").resolve()),
            "out": str(folder.resolve()),
            "steps": len(data.stream),
            "check_rows": CHECK_ROWS,
        },
    )
    python = python_of(peer, work)
    log = work / f"{peer.name}.log"
    # nothing of ours on its path, nothing looked up or reported outside
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "OMP_WAIT_POLICY": "passive",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
    }
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run(
            [str(python.absolute()), "-P", str(peer.script), str(path)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    if done.returncode:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise ArtefactError(f"training failed: {' '.join(last)}", where=f"{peer.name}, {log}")


@torch.no_grad()
def check_against_library(sae: SparseAutoencoder, folder: Path, x: Tensor) -> None:
    """That an SAE as we read it gives, on x [rows, d_in], what the library's own inference gave.

    Raises ArtefactError if features or reconstructions differ by more than 1e-5 of the largest.
    """
    with np.load(folder / "check.npz") as stored:
        theirs = torch.from_numpy(stored["features"])
        reconstruction = torch.from_numpy(stored["reconstruction"])
    ours = sae.encode_sparse(x).dense()
    active = theirs != 0
    otherwise = (ours != 0) != active
    share = float(otherwise.sum()) / max(1, int(active.sum()))
    found = {
        "choice of features": (share, TIES),
        "features": (_relative(ours.where(~otherwise, theirs), theirs), TOLERANCE),
        "reconstructions": (_relative(sae.decode(theirs, like=x), reconstruction), TOLERANCE),
    }
    for what, (difference, allowed) in found.items():
        if not difference <= allowed:
            raise ArtefactError(
                f"our {what} differ from the library's own", where=str(folder),
                given=f"{difference:.2g}", allowed=f"up to {allowed:g}",
            )  # fmt: skip


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
