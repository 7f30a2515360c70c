"""Whether two commits give the same bits: hashes of tiny harvests and SAEs.

    python -m benchmarks.same_bits before.txt    # at one commit
    python -m benchmarks.same_bits after.txt    # at the other, on the same machine
    diff before.txt after.txt

A line for each chunk folder and each manifest of four models' harvests, together and apart, and for
the weights and the held-out metrics of an SAE of every architecture, with and without an L0 to
reach. What a manifest says of time and of the commit is left out. Only public names are used, and
those of the tests that make tiny models, so that it runs at any commit.
"""

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import sae
from activations import ActivationStore
from saescope.config import from_dict
from saescope.errors import InputError
from tests.tiny import ARCHITECTURES, make_tiny_harvest, make_tiny_model

SITES = ("blocks.1.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_post")
VOLATILE = {
    "sha256",
    "created",
    "finished",
    "seconds",
    "commit",
    "versions",
    "environment",
    "out",
    "run",
}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def steady(value: Any) -> Any:
    """A JSON value without what is of the moment."""
    if isinstance(value, dict):
        return {k: steady(v) for k, v in value.items() if k not in VOLATILE}
    if isinstance(value, list):
        return [steady(v) for v in value]
    return value


def harvest_lines(harvest: Path) -> list[str]:
    """Hashes of what a harvest is: every array's folder, and the manifest."""
    lines = []
    folders = sorted({p.parent for p in harvest.rglob("*") if p.is_file()})
    for folder in folders:
        files = sorted(p for p in folder.iterdir() if p.is_file() and "manifest" not in p.name)
        if all_of := [p.name.encode() + p.read_bytes() for p in files if p.suffix != ".lock"]:
            lines.append(f"{harvest.name}/{folder.relative_to(harvest)} {digest(b''.join(all_of))}")
    manifest = steady(ActivationStore.open(str(harvest)).manifest)
    lines.append(f"{harvest.name} manifest {digest(json.dumps(manifest, sort_keys=True).encode())}")
    return lines


def trained_line(harvest: Path, root: Path, kind: str, **settings: Any) -> str:
    name = "_".join([kind, *(str(v) for v in settings.get("trainer", {}).values())])
    pair = {"site": SITES[0]}
    if kind == "crosscoder":
        pair = {"sites": [SITES[0], SITES[2]]}
    elif "transcoder" in kind:
        pair = {"site": SITES[0], "target_site": SITES[1]}
    values = {
        "harvest": str(harvest),
        "out": str(root / "runs" / name),
        "passes": 1.5,
        "evaluation_rows": 200,
        "sae": {"kind": kind, "d_sae": 48},
        **pair,
        "trainer": {"batch_size": 64, "lr": 3e-3, **settings.get("trainer", {})},
    }
    try:
        sae.train(from_dict(sae.TrainConfig.specialise({}), values, "same_bits"))
    except InputError as error:
        return f"{name} refused: {str(error).splitlines()[0]}"
    autoencoder = sae.load(root / "runs" / name)
    state = b"".join(
        k.encode() + v.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for k, v in sorted(autoencoder.state_dict().items())
        if v.ndim
    )
    held_out = json.dumps(steady(autoencoder.metadata["held_out"]), sort_keys=True)
    return f"{name} weights {digest(state)} held_out {digest(held_out.encode())}"


def main() -> None:
    torch.set_num_threads(1)
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        into = Path(sys.argv[1]).resolve()
        os.chdir(folder)
        root = Path()  # what is on disk names no folder of the moment
        for architecture in ARCHITECTURES:
            model = make_tiny_model(root / "models" / architecture, architecture)
            for sites in (SITES, SITES[:1]):
                home = root / f"{architecture}-{len(sites)}"
                harvest = make_tiny_harvest(home, model, sites=sites, documents=40)
                named = harvest.rename(home / home.name)
                lines += harvest_lines(named)
        harvest = root / "llama-3" / "llama-3"
        for kind in sae.list_architectures():
            lines.append(trained_line(harvest, root, kind))
            lines.append(trained_line(harvest, root, kind, trainer={"target_l0": 6.0}))
    into.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
