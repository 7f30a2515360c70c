"""Our SAEs in the real SAELens and dictionary_learning, and theirs here: the same features.

    python -m benchmarks.peers.formats

Ours are written in the library's format, every architecture under every normaliser, and loaded by
the library in its own environment. SAELens trains one of each architecture it has and saves it as
it does, dictionary_learning one of each class with random weights; we load them. Both sides'
features and reconstructions on the same rows are compared.
"""

import csv
import io
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.environments import PEERS, python_of
from benchmarks.running import run
from sae.architectures import architecture, list_architectures
from sae.core.base import SparseAutoencoder
from sae.core.normaliser import Normaliser, NormaliserKind
from sae.formats import format_named
from sae.formats.load import load
from saescope import __version__
from saescope.artefact import git_commit, read_json, write_bytes, write_json
from saescope.config import Config
from saescope.errors import ArtefactError, InputError, SaescopeError, check_range
from saescope.paths import remove
from saescope.progress import say

HERE = Path(__file__).parent
TOLERANCE = 1e-5
D_IN, D_OUT, D_SAE, K = 16, 12, 64, 6
ROWS, CHECK_ROWS = 3500, 500
CHECKPOINTS = ("gated", "topk", "batchtopk", "matryoshka_batchtopk", "jumprelu")
COLUMNS: tuple[str, ...] = (
    "date", "library", "version", "direction", "architecture", "library_architecture", "normaliser",
    "rows", "d_in", "d_sae", "l0", "features_max_abs", "features_max_rel", "support_differs",
    "reconstruction_max_abs", "reconstruction_max_rel", "result", "saescope", "torch", "commit",
)  # fmt: skip


@dataclass(frozen=True)
class Library:
    """A library to exchange with."""

    peer: str
    """its name in `environments`"""
    format: str
    script: Path
    config: str
    """the file that names its architecture, and the keys that lead there"""
    keys: tuple[str, ...]


LIBRARIES = (
    Library("SAELens", "saelens", HERE / "in_saelens_formats.py", "cfg.json", ("architecture",)),
    Library("dictionary_learning", "dictionary_learning",
            HERE / "in_dictionary_learning_formats.py", "config.json", ("trainer", "dict_class")),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FormatsConfig(Config):
    """Exchange SAEs of every architecture with other libraries."""

    work: str = "build/peers"
    """Folder for environments and what is exchanged."""
    results: str = "benchmarks/results/formats.csv"
    """File to write."""
    steps: int = 60
    """Steps that SAELens trains each SAE for."""
    seed: int = 0
    """Seed of data and weights."""

    def __post_init__(self) -> None:
        check_range("steps", self.steps, low=1)


def data(seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to check on, float32 [n, d_in]: sparse codes, off the origin."""
    rng = np.random.default_rng(seed)
    dictionary = rng.normal(size=(96, D_IN))
    codes = (rng.random((ROWS + CHECK_ROWS, 96)) < 0.06) * 2 * rng.random((ROWS + CHECK_ROWS, 96))
    x = torch.from_numpy(codes @ dictionary + 0.7 * rng.normal(size=D_IN)).float()
    return x[:ROWS], x[ROWS:]


def kinds(name: str) -> list[tuple[str, dict[str, Any]]]:
    """Every architecture that a format holds, with the options that change its rule."""
    found: list[tuple[str, dict[str, Any]]] = []
    for kind in format_named(name).writes:
        if kind not in list_architectures():
            continue
        if "transcoder" in kind:
            found += [(kind, {"activation": rule}) for rule in ("relu", "jumprelu")]
        else:
            found.append((kind, {}))
    return found


@torch.no_grad()
def make(
    kind: str, options: dict[str, Any], normaliser: NormaliserKind, rows: Tensor, seed: int
) -> SparseAutoencoder:
    """An SAE with random weights that are all at work, and a fitted normaliser."""
    torch.manual_seed(seed)
    cls = architecture(kind)
    known = {field.name for field in fields(cls.Config)}
    more = {"k": K} if "k" in known else {}
    d_out = D_OUT if "transcoder" in kind else None
    sae = cls(cls.Config(d_sae=D_SAE, **more, **options), D_IN, d_out)
    for name, value in sae.state_dict().items():
        if value.is_floating_point() and name != "threshold" and "log" not in name:
            value.add_(0.2 * torch.randn_like(value))
        elif name == "threshold":
            value.copy_(0.3 + 0.1 * torch.rand_like(value))
    x = rows.double()
    sae.normaliser = Normaliser.fit(
        normaliser, mean=x.mean(0), mean_square=float(x.square().sum(1).mean()), sample=rows
    )
    if d_out is not None:
        sae.output_normaliser = Normaliser.identity(D_OUT)
    sae.metadata = {"site": "blocks.3.hook_resid_post", "model": "gpt2", "context": 128}
    return sae.eval()


def export(
    config: FormatsConfig, library: Library, folder: Path, rows: Tensor, x: Tensor
) -> Iterator[dict[str, Any]]:
    """Write ours, and note our features; what was written."""
    for kind, options in kinds(library.format):
        for normaliser in get_args(NormaliserKind):
            sae = make(kind, options, normaliser, rows, config.seed)
            name = "-".join(["ours", kind, *options.values(), normaliser])
            try:
                format_named(library.format).write(sae, folder / name)
            except InputError as error:
                yield {"kind": kind, "normaliser": normaliser, "refused": str(error)}
                continue
            with torch.no_grad():
                output = sae(x)
            features = output.codes.dense()
            features = _as_saelens(sae, features, x)
            yield {
                "kind": kind,
                "normaliser": normaliser,
                "folder": str((folder / name).resolve()),
                "features": features,
                "reconstruction": output.x_hat,
            }


def _as_saelens(sae: SparseAutoencoder, features: Tensor, x: Tensor) -> Tensor:
    """Features as SAELens gives them: under layer_norm in units of each row's deviation."""
    if sae.normaliser.kind != "standardised":
        return features
    features = features / sae.normaliser.row_scale(x)
    # with Bessel's correction; elsewhere the factor is in the weights
    pursuit = sae.config.kind == "matching_pursuit"  # type: ignore[attr-defined]
    return features * ((D_IN - 1) / D_IN) ** 0.5 if pursuit else features


def exchange(config: FormatsConfig, library: Library) -> list[dict[str, Any]]:
    """Both directions; a row of results each."""
    torch.set_num_threads(1)
    folder = Path(config.work) / "formats" / library.format
    remove(folder)
    folder.mkdir(parents=True)
    rows, x = data(config.seed)
    np.save(folder / "rows.npy", rows.numpy())
    np.save(folder / "check.npy", x.numpy())
    ours = list(export(config, library, folder, rows, x))
    written = [each for each in ours if "folder" in each]
    facts = _run_library(config, library, folder, [each["folder"] for each in written])
    found = []
    for each in ours:
        row = {"direction": "from saescope", "architecture": each["kind"],
               "normaliser": each["normaliser"]}  # fmt: skip
        if "refused" in each:
            found.append({**row, "result": f"refused: {each['refused']}"})
            continue
        stored = read_json(Path(each["folder"]) / library.config)
        for key in library.keys:
            stored = stored[key]
        row["library_architecture"] = stored
        theirs = _noted(each["folder"])
        found.append({**row, **_compare(each["features"], each["reconstruction"], *theirs)})
    found += [_imported(each, x) for each in facts["made"]]
    shared = {
        "date": datetime.now(UTC).date().isoformat(), "library": library.peer,
        "version": facts["version"], "rows": len(x), "d_in": D_IN, "d_sae": D_SAE,
        "saescope": __version__, "torch": torch.__version__, "commit": git_commit() or "",
    }  # fmt: skip
    return [{**shared, **row} for row in found]


def _imported(made: dict[str, Any], x: Tensor) -> dict[str, Any]:
    row = {"direction": "to saescope", "library_architecture": made["name"]}
    try:
        sae = load(made["folder"])
    except SaescopeError as error:
        reason = str(error).partition("cfg.json: ")[2] or str(error)
        return {**row, "result": f"refused: {reason}"}
    with torch.no_grad():
        output = sae(x)
    features = _as_saelens(sae, output.codes.dense(), x)
    row |= {"architecture": sae.config.kind, "normaliser": sae.normaliser.kind}  # type: ignore[attr-defined]
    theirs = _noted(made.get("as", made["folder"]))
    return {**row, **_compare(features, output.x_hat, *theirs)}


def _noted(folder: str) -> tuple[Tensor, Tensor]:
    """The library's own features and reconstructions."""
    with np.load(f"{folder}.npz") as stored:
        return torch.from_numpy(stored["features"]), torch.from_numpy(stored["reconstruction"])


def _compare(ours: Tensor, x_hat: Tensor, theirs: Tensor, their_x_hat: Tensor) -> dict[str, Any]:
    feature = float((ours - theirs).abs().max())
    reconstruction = float((x_hat - their_x_hat).abs().max())
    relative = feature / float(theirs.abs().max())
    relative_x = reconstruction / float(their_x_hat.abs().max())
    return {
        "l0": f"{float((theirs != 0).sum(1).double().mean()):.2f}",
        "features_max_abs": f"{feature:.2e}",
        "features_max_rel": f"{relative:.2e}",
        "support_differs": int(((ours != 0) != (theirs != 0)).sum()),
        "reconstruction_max_abs": f"{reconstruction:.2e}",
        "reconstruction_max_rel": f"{relative_x:.2e}",
        "result": "same" if max(relative, relative_x) <= TOLERANCE else "DIFFERENT",
    }


def _run_library(
    config: FormatsConfig, library: Library, folder: Path, exports: list[str]
) -> dict[str, Any]:
    settings = {
        "out": str(folder.resolve()),
        "rows": str((folder / "rows.npy").resolve()),
        "check": str((folder / "check.npy").resolve()),
        "exports": exports,
        "checkpoints": CHECKPOINTS,
        "d_in": D_IN, "d_out": D_OUT, "d_sae": D_SAE,
        "steps": config.steps, "seed": config.seed, "threads": 1,
    }  # fmt: skip
    write_json(folder / "settings.json", settings)
    peer = PEERS[library.peer]
    python, log = python_of(peer, Path(config.work)), folder / "log.txt"
    # nothing of ours on its path, nothing looked up or reported outside
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
    }
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run(
            [str(python.absolute()), "-P", str(library.script),
             str((folder / "settings.json").resolve())],
            stdout=stream, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip
    if done.returncode:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise ArtefactError(f"failed: {' '.join(last)}", where=f"{library.peer}, {log}")
    return read_json(folder / "facts.json")


def compare(config: FormatsConfig) -> int:
    """Run it, write the rows; the exit code, 1 if features differ."""
    rows = [row for library in LIBRARIES for row in exchange(config, library)]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(config.results, text.getvalue().encode())
    for row in rows:
        say(
            f"{row['library']}, {row['direction']}: {row.get('architecture', '-')} / "
            f"{row.get('library_architecture', '-')}, {row.get('normaliser', '-')}: "
            f"{row['result']}, features {row.get('features_max_rel', '-')}"
        )
    different = [row for row in rows if row["result"] == "DIFFERENT"]
    say(f"{len(rows)} exchanges, {len(different)} different")
    return 1 if different else 0


if __name__ == "__main__":
    run(FormatsConfig, compare)
